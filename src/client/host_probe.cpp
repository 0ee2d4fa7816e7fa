// The probe's host side: layout of the guest (see host_probe_guest.S), the child process, the verdict.
#include "client/host_probe.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "anykvm/anykvm.h"

extern "C" {
extern const std::uint8_t anykvm_probe_begin[], anykvm_probe_end[];
}

namespace anykvm {

namespace {

constexpr std::size_t memory_size = 2 << 20;
constexpr std::uint64_t code_base = 0x1000, pml4 = 0x2000, pdpt = 0x3000, low_directory = 0x4000,
                        high_directory = 0x5000, gdt = 0x7000;
constexpr std::uint16_t stage_port = 0x80;
constexpr std::uint8_t stage_done = 0x4b;

std::string stage_name(int stage) {
  switch (stage) {
    case 0: return "does not run guest code";
    case 1: return "does not take a guest into long mode with paging";
    case 2: return "does not get a guest past its interrupt set-up";
    case 3: return "does not deliver an interrupt";
    default: return "does not run a guest's SSE code";
  }
}

void store(std::uint8_t* memory, std::uint64_t at, std::uint64_t value) {
  std::memcpy(memory + at, &value, sizeof value);
}

void lay_out(std::uint8_t* memory) {
  constexpr std::uint64_t present_writable = 3, large = 1 << 7, uncached = 1 << 4;
  std::memcpy(memory + code_base, anykvm_probe_begin, std::size_t(anykvm_probe_end - anykvm_probe_begin));
  store(memory, pml4, pdpt | present_writable);
  store(memory, pdpt, low_directory | present_writable);
  store(memory, pdpt + 3 * 8, high_directory | present_writable);
  store(memory, low_directory, present_writable | large);
  constexpr std::uint64_t apic = 0xfee0'0000;
  store(memory, high_directory + (apic >> 21 & 511) * 8, apic | present_writable | large | uncached);
  store(memory, gdt + 8, 0x00af'9b00'0000'ffff);   // 64-bit code
  store(memory, gdt + 16, 0x00cf'9300'0000'ffff);  // data
}

void set_protected_mode(Vcpu& vcpu) {
  kvm_sregs sregs = vcpu.sregs();
  kvm_segment flat{.base = 0, .limit = 0xffff'ffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
  flat.selector = 0x08;
  flat.type = 0xb;
  sregs.cs = flat;
  sregs.gdt = {.base = gdt, .limit = 3 * 8 - 1};
  sregs.cr0 = 0x11;  // PE, ET
  vcpu.set_sregs(sregs);
  kvm_regs regs{};
  regs.rip = code_base;
  regs.rflags = 2;
  vcpu.set_regs(regs);
}

std::string describe(const Exit& exit, std::uint32_t reason) {
  std::string text = " (exit reason " + std::to_string(reason);
  if (const auto* error = std::get_if<exits::InternalError>(&exit)) {
    text = " (internal error " + std::to_string(error->suberror);
    static constexpr char digits[] = "0123456789abcdef";
    if (!error->instruction.empty()) text += ", instruction bytes";
    for (const auto byte : error->instruction) text += {' ', digits[byte >> 4], digits[byte & 15]};
  }
  return text + ")";
}

}  // namespace

std::string run_probe_guest(std::shared_ptr<KvmDevice> device, const std::function<bool(char stage)>& progress) {
  Kvm kvm(std::move(device));
  if (!kvm.cap_user_memory() || !kvm.cap_irq_chip() || !kvm.cap_extended_cpuid())
    return "lacks user memory, interrupt chips or CPUID";
  Vm vm = kvm.create_vm();
  if (kvm.cap_set_identity_map_address()) vm.set_identity_map_address(0xfeff'c000);
  if (kvm.cap_set_tss_address()) vm.set_tss_address(0xfeff'd000);
  vm.create_irq_chip();
  void* mapped = mmap(nullptr, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return "gets no memory for a guest";
  lay_out(static_cast<std::uint8_t*>(mapped));
  vm.set_up_memory_slot(vm.allocate_memory_slot(memory_size), mapped, 0);
  Vcpu vcpu = vm.create_vcpu();
  vcpu.set_cpuid(kvm.supported_cpuid());
  set_protected_mode(vcpu);

  for (int stage = 0;;) {
    const Exit exit = vcpu.run();
    const auto* out = std::get_if<exits::IoOut>(&exit);
    if (!out || out->port != stage_port) return stage_name(stage) + describe(exit, vcpu.run_area().exit_reason);
    stage = out->data[0];
    if (stage == stage_done) return {};
    if (!progress(char(stage))) return "is not asked any more";
    if (stage == 3) return stage_name(3);
  }
}

namespace {

[[noreturn]] void child(const std::string& path, int result) {
  std::string verdict;
  try {
    verdict = run_probe_guest(KvmDevice::host(path), [&](char stage) { return write(result, &stage, 1) == 1; });
  } catch (const std::exception& error) {
    verdict = std::string("fails with ") + error.what();
  }
  // Stages are bytes below ' '; a verdict follows them as text, and '+' alone is success.
  verdict = verdict.empty() ? "+" : verdict;
  const auto written = write(result, verdict.data(), verdict.size());
  _exit(written == ssize_t(verdict.size()) ? 0 : 1);
}

/// All that the child writes, until it ends or the time is up; `in_time` tells which.
std::string read_verdict(int fd, std::chrono::milliseconds limit, bool& in_time) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::string text;
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd wait{fd, POLLIN, 0};
    in_time = left.count() > 0 && poll(&wait, 1, int(left.count())) > 0;
    if (!in_time) return text;
    char buffer[256];
    const ssize_t got = read(fd, buffer, sizeof buffer);
    if (got <= 0) return text;
    text.append(buffer, std::size_t(got));
  }
}

}  // namespace

HostProbe probe_host_kvm(const std::string& path, std::chrono::milliseconds limit) {
  if (access(path.c_str(), R_OK | W_OK) != 0) return {false, path + ": " + std::strerror(errno)};
  int ends[2];
  if (pipe(ends) != 0) return {false, std::string("cannot probe: ") + std::strerror(errno)};
  const pid_t pid = fork();
  if (pid < 0) {
    close(ends[0]);
    close(ends[1]);
    return {false, std::string("cannot probe: ") + std::strerror(errno)};
  }
  if (pid == 0) {
    close(ends[0]);
    child(path, ends[1]);
  }
  close(ends[1]);
  bool in_time = false;
  const std::string text = read_verdict(ends[0], limit, in_time);
  close(ends[0]);
  kill(pid, SIGKILL);
  // A child that hangs inside a broken driver does not die; it must not hang this process too.
  for (int tries = 0; waitpid(pid, nullptr, WNOHANG) == 0 && tries < 100; ++tries)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));

  std::size_t stages = 0;
  while (stages < text.size() && text[stages] < ' ') ++stages;
  const std::string verdict = text.substr(stages);
  if (verdict == "+") return {true, path + " runs a stock guest"};
  if (!verdict.empty()) return {false, path + " " + verdict};
  const std::string stage = stage_name(stages ? text[stages - 1] : 0);
  if (!in_time)
    return {false, path + " " + stage + ": the probe's guest made no progress within " + std::to_string(limit.count()) +
                       " ms"};
  return {false, path + " " + stage + ": the probe's process died"};
}

}  // namespace anykvm
