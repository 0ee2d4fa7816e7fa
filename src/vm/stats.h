// Counters of a VM or a vCPU, and the file in which a client reads them (KVM_GET_STATS_FD).
// Reference: api.rst 4.133 KVM_GET_STATS_FD.
//
// The file is a memfd: header, descriptors and the counters themselves, which are counted there, too, from the first
// KVM_GET_STATS_FD on. So reading them is read(2) or pread(2) as with the kernel's file, and needs nobody's help. The
// same lies in a page of the vCPU's or VM's own memfd, where `anykvm top` finds it.
#pragma once

#include <array>
#include <span>
#include <string>

#include "os/memory_file.h"
#include "x86/types.h"

namespace anykvm::vm {

struct StatDescription {
  const char* name;
  u32 flags;  ///< KVM_STATS_TYPE_ | KVM_STATS_UNIT_ | KVM_STATS_BASE_
  s16 exponent = 0;
};

enum class VmStat : u8 { remote_tlb_flush, remote_tlb_flush_requests, count };
extern const StatDescription vm_stats[unsigned(VmStat::count)];

enum class VcpuStat : u8 {
  exits,
  io_exits,
  mmio_exits,
  signal_exits,
  request_irq_exits,
  halt_exits,
  halt_wakeup,
  halt_wait_ns,
  blocking,
  hypercalls,
  irq_injections,
  nmi_injections,
  insn_emulation,  ///< instructions that the reference engine executed: all of them when it is the engine
  insn_emulation_fail,
  tlb_flush,
  page_walks,
  translations,      ///< blocks that the translator has made
  native_stretches,  ///< of user code on the host CPU itself, between two stops
  count
};
extern const StatDescription vcpu_stats[unsigned(VcpuStat::count)];

/// One writer at a time, who also is the only one to call open(); readers of the file need no lock.
class StatsFile {
 public:
  ~StatsFile();
  StatsFile(const StatsFile&) = delete;
  StatsFile& operator=(const StatsFile&) = delete;

  /// A new descriptor of the file, read-only and close-on-exec; -errno. id names the object, as "kvm-PID".
  int open(const std::string& id);
  /// From now on the counters are in this page, in the file's format. Before anybody counts.
  void publish(os::Mapping page, const std::string& id);
  /// Any thread.
  u64 value(unsigned index) const { return __atomic_load_n(&values_[index], __ATOMIC_RELAXED); }

 protected:
  static constexpr unsigned max_stats = 32;
  explicit StatsFile(std::span<const StatDescription> descriptions) : descriptions_(descriptions) {}

  void count(unsigned index, u64 amount) { store(index, values_[index] + amount); }
  void store(unsigned index, u64 value) {
    __atomic_store_n(&values_[index], value, __ATOMIC_RELAXED);
    if (in_file_) [[unlikely]]
      __atomic_store_n(&in_file_[index], value, __ATOMIC_RELAXED);
  }

 private:
  int create(const std::string& id);
  std::size_t image_size() const;
  /// Writes the whole file; where the counters are in it.
  u64* write_image(u8* image, const std::string& id) const;

  const std::span<const StatDescription> descriptions_;
  std::array<u64, max_stats> own_{};
  u64* values_ = own_.data();
  u64* in_file_ = nullptr;
  os::Mapping page_, file_;
  int fd_ = -1;
};

class VmStats final : public StatsFile {
 public:
  VmStats() : StatsFile(vm_stats) {}
  void add(VmStat stat, u64 amount = 1) { count(unsigned(stat), amount); }
};

class VcpuStats final : public StatsFile {
 public:
  VcpuStats() : StatsFile(vcpu_stats) {}
  void add(VcpuStat stat, u64 amount = 1) { count(unsigned(stat), amount); }
  void set(VcpuStat stat, u64 value) { store(unsigned(stat), value); }
};

}  // namespace anykvm::vm
