#include "abi/statistics.h"

#include <semaphore.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "abi/vm_file.h"
#include "engine/engine.h"
#include "os/client_ram.h"
#include "os/clock.h"
#include "os/process_identity.h"
#include "os/signal_handlers.h"
#include "os/signals_blocked.h"
#include "os/write_all.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::abi {
namespace {

struct Watched {
  VmFile* file;
  u64 process;  ///< a forked child has no VMs of its parent's
  u64 began_ns;
};

/// Of the process; never destroyed, since VMs may outlive static objects.
struct Watch {
  std::mutex mutex;
  std::vector<Watched> vms;
  sem_t wanted;  ///< posted by the signal's handler
  Watch() { sem_init(&wanted, 0, 0); }
};

Watch& watch() {
  static Watch* const all = new Watch;
  return *all;
}

bool wanted() {
  static const bool wanted = std::getenv("ANYKVM_STATS") != nullptr;
  return wanted;
}

/// The columns of a table have room for so many vCPUs; the total counts them all.
constexpr std::size_t most_columns = 8;

[[gnu::format(printf, 2, 3)]] void append(std::string& text, const char* format, ...) {
  char part[64];
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(part, sizeof part, format, rest);
  va_end(rest);
  text += part;
}

void append_row(std::string& text, const vm::StatDescription& description, double seconds,
                const std::vector<u64>& values) {
  u64 total = 0;
  for (const u64 value : values) total += value;
  if (total == 0 || (description.flags & KVM_STATS_TYPE_MASK) != KVM_STATS_TYPE_CUMULATIVE) return;
  append(text, "  %-26s %15llu %13.1f", description.name, static_cast<unsigned long long>(total),
         static_cast<double>(total) / seconds);
  if (values.size() > 1 && values.size() <= most_columns)
    for (const u64 value : values) append(text, " %14llu", static_cast<unsigned long long>(value));
  text += '\n';
}

/// Whether user code can run on the host CPU itself, and why not.
void append_direct(std::string& text) {
  const os::ClientRamReport ram = os::client_ram_report();
  if (ram.moved)
    append(text, "  guest RAM moved to files: %llu MiB\n", static_cast<unsigned long long>(ram.moved >> 20));
  if (ram.reason) text += std::string("  guest RAM left where it was: ") + ram.reason + '\n';
  if (const char* obstacle = engine::direct_obstacle())
    text += std::string("  user code is translated: ") + obstacle + '\n';
}

std::string table(const Watched& watched) {
  VmFile& file = *watched.file;
  const double seconds = std::max(1e-9, static_cast<double>(os::monotonic_ns() - watched.began_ns) * 1e-9);
  const std::lock_guard lock(file.mutex);
  std::string text;
  engine::Kind kind{};
  engine::default_kind(kind);
  append(text, "anykvm: kvm-%d, %zu vCPUs, %s, %.3f s\n", getpid(), file.vcpus.size(), engine::name_of(kind), seconds);
  if (kind == engine::Kind::direct) append_direct(text);
  append(text, "  %-26s %15s %13s", "", "total", "per second");
  if (file.vcpus.size() > 1 && file.vcpus.size() <= most_columns)
    for (const auto& each : file.vcpus) append(text, "         vcpu-%u", each.vcpu->id());
  text += '\n';
  for (unsigned i = 0; i < std::size(vm::vcpu_stats); ++i) {
    std::vector<u64> values;
    for (const auto& each : file.vcpus) values.push_back(each.vcpu->stats().value(i));
    append_row(text, vm::vcpu_stats[i], seconds, values);
  }
  for (unsigned i = 0; i < std::size(vm::vm_stats); ++i)
    append_row(text, vm::vm_stats[i], seconds, {file.vm->stats().value(i)});
  return text;
}

void print_all() {
  Watch& all = watch();
  const std::lock_guard lock(all.mutex);
  for (const Watched& each : all.vms)
    if (each.process == os::process_identity()) os::write_all(STDERR_FILENO, table(each));
}

/// A thread that prints, since a signal handler cannot.
void print_on_signal() {
  if (!os::take_unused_signal(SIGUSR2, [](int) { sem_post(&watch().wanted); })) return;
  const os::SignalsBlocked blocked;
  std::thread([] {
    for (;;)
      if (sem_wait(&watch().wanted) == 0) print_all();
  }).detach();
}

}  // namespace

void begin_statistics(VmFile& file) {
  if (!wanted()) return;
  Watch& all = watch();
  const std::lock_guard lock(all.mutex);
  static u64 prepared = 0;  // in which process
  if (prepared != os::process_identity()) {
    if (prepared == 0) std::atexit(print_all);
    prepared = os::process_identity();
    print_on_signal();
  }
  all.vms.push_back({&file, os::process_identity(), os::monotonic_ns()});
}

void end_statistics(VmFile& file) {
  if (!wanted()) return;
  Watch& all = watch();
  const std::lock_guard lock(all.mutex);
  const auto found = std::ranges::find(all.vms, &file, &Watched::file);
  if (found == all.vms.end()) return;
  if (found->process == os::process_identity()) os::write_all(STDERR_FILENO, table(*found));
  all.vms.erase(found);
}

}  // namespace anykvm::abi
