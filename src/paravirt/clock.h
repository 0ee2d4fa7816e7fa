// The VM's kvmclock: nanoseconds of guest time as a linear function of the host's TSC, the same for all vCPUs, and the
// synchronisation of their TSCs.
// Reference: Documentation/virt/kvm/api.rst 4.29, 4.30; Documentation/virt/kvm/x86/timekeeping.rst.
#pragma once

#include <atomic>
#include <mutex>

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::paravirt {

/// Cycles to nanoseconds in the terms of the guest's page: shifted left by `shift` (right when negative), then
/// * multiplier >> 32.
struct TscScale {
  u32 multiplier = 0;
  s8 shift = 0;
  u64 ns(u64 cycles) const {
    const u64 shifted = shift >= 0 ? cycles << shift : cycles >> -shift;
    return u64(u128(shifted) * multiplier >> 32);
  }
};
TscScale tsc_scale(u64 tsc_hz);

class VmClock {
 public:
  VmClock();  ///< guest time starts at 0

  /// Guest nanoseconds now.
  u64 now_ns() const;
  /// KVM_GET_CLOCK: with KVM_CLOCK_TSC_STABLE, REALTIME and HOST_TSC when the host's TSC is invariant.
  int get_clock(kvm_clock_data& data) const;
  /// KVM_SET_CLOCK: EINVAL for unknown flags. Afterwards the VM must make every vCPU call Paravirt::on_enter() (wake
  /// it, or set its attention), so that it refreshes its page.
  int set_clock(const kvm_clock_data& data);
  /// What KVM_CHECK_EXTENSION(KVM_CAP_ADJUST_CLOCK) returns.
  static u32 clock_flags();

  /// True when guest time is an exact function of the TSC and the TSC is the same on all vCPUs, so that one may use
  /// another's page (PVCLOCK_TSC_STABLE_BIT).
  bool stable() const { return invariant_ && synchronized_.load(std::memory_order_acquire); }
  /// Changes whenever vCPUs must write their pages again.
  u32 generation() const { return generation_.load(std::memory_order_acquire); }
  /// One point of the clock: guest time `ns` at host TSC `tsc`. Fixed between set_clock()s when the TSC is invariant;
  /// else now, and vCPUs should write their pages at every entry.
  struct Point {
    u64 tsc, ns;
  };
  Point reference() const;
  bool drifts() const { return !invariant_; }

  /// CLOCK_REALTIME - guest time: what the wall clock page holds.
  u64 wall_clock_base_ns() const;

  /// A vCPU's part in the synchronisation of TSCs; owned by its Paravirt.
  struct VcpuTsc {
    u32 generation = 0;  ///< 0: not yet synchronised
  };
  void add_vcpu();
  void remove_vcpu(const VcpuTsc& vcpu);
  /// The offset (guest TSC = scaled host TSC + offset) for a vCPU whose TSC is set to `value`: 0 at creation, or by the
  /// client. Values within a second of what the TSCs of the vCPUs before would now show mean "the same as theirs", as
  /// they cannot all be written at one instant. `scaled_host_tsc`: the host's TSC at the vCPU's rate.
  u64 synchronize_tsc(VcpuTsc& vcpu, u64 value, u64 scaled_host_tsc, u32 guest_khz, bool by_client);
  /// The client has set the offset itself (KVM_VCPU_TSC_OFFSET): that of the vCPUs before, or a new one.
  void adopt_tsc_offset(VcpuTsc& vcpu, u64 offset, u64 value, u32 guest_khz);

  /// The GPA last written to the wall clock MSR; VM-wide like the clock.
  std::atomic<u64> wall_clock_msr{0};

 private:
  /// The TSC when that is invariant, else CLOCK_MONOTONIC_RAW in ns.
  u64 count() const;
  u64 ns_of(u64 counts) const { return invariant_ ? scale_.ns(counts) : counts; }
  /// With mutex_ held: the vCPU's TSC is in step with the others', or they have to follow.
  void join(VcpuTsc& vcpu, bool same, u64 offset, u64 value, u32 guest_khz, u64 now);
  void update_synchronized();

  const bool invariant_;
  const TscScale scale_;
  mutable std::mutex mutex_;  ///< writers
  std::atomic<u32> generation_{1};
  /// Guest time base_ns_ was at base_count_. Read without the lock: sequence_ is odd while they change.
  std::atomic<u32> sequence_{0};
  std::atomic<u64> base_count_, base_ns_{0};
  // Synchronisation of the vCPUs' TSCs, under mutex_.
  std::atomic<bool> synchronized_{true};
  bool set_by_client_ = false;
  u32 vcpus_ = 0, matched_ = 0, tsc_generation_ = 0, last_khz_ = 0;
  u64 last_value_ = 0, last_ns_ = 0, offset_ = 0;
};

}  // namespace anykvm::paravirt
