// The VM's kvmclock: nanoseconds of guest time as a linear function of the host's TSC, the same for all vCPUs, and the
// synchronisation of their TSCs.
// Reference: Documentation/virt/kvm/api.rst 4.29, 4.30; Documentation/virt/kvm/x86/timekeeping.rst.
#pragma once

#include <atomic>
#include <mutex>

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::paravirt {

/// Cycles to nanoseconds as pvclock does it: shift left by `shift` (right when negative), then * multiplier >> 32.
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
  /// The same at an instant of the host's TSC.
  u64 ns_at(u64 host_tsc) const;

  /// KVM_GET_CLOCK: with KVM_CLOCK_TSC_STABLE, REALTIME and HOST_TSC when the host's TSC is invariant.
  int get_clock(kvm_clock_data& data) const;
  /// KVM_SET_CLOCK: EINVAL for unknown flags. Afterwards the VM must make every vCPU call Paravirt::on_enter() (wake
  /// it, or set its attention), so that it refreshes its page.
  int set_clock(const kvm_clock_data& data);
  /// What KVM_CHECK_EXTENSION(KVM_CAP_ADJUST_CLOCK) returns.
  static u32 clock_flags();

  /// True when guest time is an exact function of the host's TSC (PVCLOCK_TSC_STABLE_BIT).
  bool stable() const { return stable_; }
  /// Changes whenever vCPUs must write their pages again.
  u32 generation() const { return generation_.load(std::memory_order_acquire); }
  /// One point of the clock: guest time `ns` at host TSC `tsc`. Fixed between set_clock()s when stable.
  struct Reference {
    u64 tsc, ns;
  };
  Reference reference() const;

  /// CLOCK_REALTIME - guest time: what the wall clock page holds.
  u64 wall_clock_base_ns() const;

  /// The offset (guest TSC = scaled host TSC + offset) for a vCPU whose TSC the client sets to `value` (0 at creation).
  /// Values within a second of what the TSCs of the vCPUs before would now show mean "the same as theirs", as they
  /// cannot all be written at one instant. `scaled_host_tsc`: the host's TSC at the vCPU's rate.
  u64 tsc_offset_for(u64 value, u64 scaled_host_tsc, u32 guest_khz, bool by_client);

  /// The GPA last written to the wall clock MSR; VM-wide like the clock.
  std::atomic<u64> wall_clock_msr{0};

 private:
  const bool stable_;
  const TscScale scale_;
  mutable std::mutex mutex_;
  std::atomic<u32> generation_{1};
  /// The reference point, readable without the lock: a sequence counter, odd while it changes.
  std::atomic<u32> sequence_{0};
  std::atomic<u64> reference_tsc_, reference_ns_;
  // TSC synchronisation, under mutex_
  bool tsc_set_by_client_ = false;
  bool tsc_known_ = false;
  u64 last_tsc_write_ = 0, last_tsc_host_ns_ = 0, current_offset_ = 0;
  u32 last_tsc_khz_ = 0;
};

}  // namespace anykvm::paravirt
