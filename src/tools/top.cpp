// A vCPU's descriptor is a memfd that has the counters in a page behind kvm_run, in the format of KVM_GET_STATS_FD; it
// is found in /proc/PID/fd, which shows the descriptors of processes that one may look into.
#include "tools/top.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "abi/descriptor_file.h"
#include "abi/limits.h"
#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::tools {

namespace {

namespace fs = std::filesystem;

struct Column {
  const char* counter;
  const char* title;
};
constexpr Column columns[] = {
    {"exits", "exits"},
    {"io_exits", "io"},
    {"mmio_exits", "mmio"},
    {"halt_exits", "halts"},
    {"irq_injections", "irqs"},
    {"hypercalls", "calls"},
    {"insn_emulation", "emulated"},
    {"page_walks", "walks"},
    {"translations", "translated"},
};

struct Sample {
  int pid = 0;
  std::string vcpu;  ///< "vcpu-0"
  u64 counters[std::size(columns)] = {};
};
/// By the number of the vCPU's file: a process may have several VMs, and a descriptor may be open more than once.
using Samples = std::map<u64, Sample>;

/// The page of counters, wherever its parts are in it.
class StatsPage {
 public:
  explicit StatsPage(int fd) {
    valid_ = pread(fd, bytes_, sizeof bytes_, abi::vcpu_mmap_size) == static_cast<ssize_t>(sizeof bytes_);
    std::memcpy(&header_, bytes_, sizeof header_);
    const u64 end = u64{header_.desc_offset} + u64{header_.num_desc} * (sizeof(kvm_stats_desc) + header_.name_size);
    valid_ = valid_ && header_.num_desc != 0 && header_.name_size != 0 && end <= sizeof bytes_ &&
             header_.id_offset + header_.name_size <= sizeof bytes_;
  }
  bool valid() const { return valid_; }
  std::string id() const { return text(header_.id_offset); }
  u64 counter(std::string_view name) const {
    for (u32 i = 0; i < header_.num_desc; ++i) {
      const u32 at = header_.desc_offset + i * static_cast<u32>(sizeof(kvm_stats_desc) + header_.name_size);
      if (text(at + static_cast<u32>(sizeof(kvm_stats_desc))) != name) continue;
      kvm_stats_desc descriptor;
      std::memcpy(&descriptor, bytes_ + at, sizeof descriptor);
      u64 value = 0;
      if (const u64 from = u64{header_.data_offset} + descriptor.offset; from + sizeof value <= sizeof bytes_)
        std::memcpy(&value, bytes_ + from, sizeof value);
      return value;
    }
    return 0;
  }

 private:
  std::string text(u32 at) const {
    const char* begin = reinterpret_cast<const char*>(bytes_ + at);
    return {begin, strnlen(begin, header_.name_size)};
  }

  bool valid_;
  kvm_stats_header header_;
  u8 bytes_[abi::stats_page_size];
};

std::optional<Sample> read_vcpu(int fd) {
  abi::FdKind kind;
  if (!abi::read_mark(fd, kind) || kind != abi::FdKind::vcpu) return {};
  const StatsPage page(fd);
  if (!page.valid()) return {};
  Sample sample;
  const std::string id = page.id();  // "kvm-PID/vcpu-N"
  const auto slash = id.find('/');
  if (!id.starts_with("kvm-") || slash == std::string::npos) return {};
  std::from_chars(id.data() + 4, id.data() + slash, sample.pid);
  sample.vcpu = id.substr(slash + 1);
  for (std::size_t i = 0; i < std::size(columns); ++i) sample.counters[i] = page.counter(columns[i].counter);
  return sample;
}

void read_process(const fs::path& folder, Samples& samples) {
  std::error_code error;
  for (fs::directory_iterator each(folder / "fd", error), end; !error && each != end; each.increment(error)) {
    std::error_code gone;
    if (!fs::read_symlink(each->path(), gone).string().starts_with("/memfd:kvm-vcpu:")) continue;
    const int fd = open(each->path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    if (const u64 number = abi::file_number(fd); !samples.contains(number))
      if (const auto sample = read_vcpu(fd)) samples[number] = *sample;
    close(fd);
  }
}

Samples read_all() {
  Samples samples;
  std::error_code error;
  for (fs::directory_iterator each("/proc", error), end; !error && each != end; each.increment(error))
    if (std::isdigit(each->path().filename().c_str()[0])) read_process(each->path(), samples);
  return samples;
}

struct Row {
  std::string name;
  unsigned vcpus = 0;
  double rates[std::size(columns)] = {};
};

std::string command_of(int pid) {
  std::string name;
  std::getline(std::ifstream(fmt::format("/proc/{}/comm", pid)), name);
  return name;
}

/// What has changed between two samples: by process, and under each the vCPUs.
std::map<int, std::vector<Row>> rows_of(const Samples& before, const Samples& now, double seconds) {
  std::map<int, std::vector<Row>> rows;
  for (const auto& [number, sample] : now) {
    const auto old = before.find(number);
    auto& process = rows[sample.pid];
    if (process.empty()) process.push_back({command_of(sample.pid)});
    Row vcpu{sample.vcpu, 1};
    for (std::size_t i = 0; i < std::size(columns); ++i)
      vcpu.rates[i] =
          static_cast<double>(sample.counters[i] - (old == before.end() ? 0 : old->second.counters[i])) / seconds;
    ++process[0].vcpus;
    for (std::size_t i = 0; i < std::size(columns); ++i) process[0].rates[i] += vcpu.rates[i];
    process.push_back(std::move(vcpu));
  }
  return rows;
}

void print_row(const std::string& pid, const Row& row) {
  fmt::print("{:>8} {:<15.15} {:>5}", pid, row.name, row.vcpus);
  for (const double rate : row.rates) fmt::print(" {:>10.0f}", rate);
  fmt::print("\n");
}

void print_table(const std::map<int, std::vector<Row>>& rows, bool each_vcpu) {
  fmt::print("{:>8} {:<15} {:>5}", "PID", "per second", "vCPUs");
  for (const Column& column : columns) fmt::print(" {:>10}", column.title);
  fmt::print("\n");
  for (const auto& [pid, process] : rows) {
    print_row(std::to_string(pid), process[0]);
    for (std::size_t i = 1; each_vcpu && i < process.size(); ++i) print_row("", process[i]);
  }
  if (rows.empty()) fmt::print("(no virtual CPUs of anykvm's in the processes that you may look into)\n");
  std::fflush(stdout);
}

}  // namespace

int top(const TopOptions& options) {
  const bool terminal = isatty(STDOUT_FILENO);
  using Clock = std::chrono::steady_clock;
  auto at = Clock::now();
  Samples before = read_all();
  for (unsigned table = 0; options.tables == 0 || table < options.tables; ++table) {
    std::this_thread::sleep_for(options.interval);
    Samples now = read_all();
    const auto time = Clock::now();
    if (terminal) fmt::print("\033[H\033[2J");
    print_table(rows_of(before, now, std::chrono::duration<double>(time - at).count()), options.each_vcpu);
    before = std::move(now);
    at = time;
  }
  return 0;
}

}  // namespace anykvm::tools
