// Steal time: how long the vCPU's thread wanted to run and did not, in the guest or in its client.
// Reference: Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME.
//
// As in KVM it is the scheduler's run_delay, of which the first sample is the whole since the thread began. Here a
// sample is a system call, and so is taken at an entry, at most every 100 us.
#include <asm/kvm_para.h>

#include <utility>

#include "os/tsc.h"
#include "paravirt/paravirt.h"

namespace anykvm::paravirt {

namespace {
constexpr u64 samples_per_ms = 10;
}

u64 Paravirt::stolen_since_last_sample() {
  const u64 now = os::host_tsc();
  if (!run_delay_ || now - sampled_tsc_ < os::host_tsc_khz() / samples_per_ms) return 0;
  sampled_tsc_ = now;
  u64 delay_ns;
  if (!run_delay_->read(delay_ns)) return 0;
  const u64 before_ns = std::exchange(sampled_delay_ns_, delay_ns);
  return delay_ns > before_ns ? delay_ns - before_ns : 0;  // another thread may have waited less
}

void Paravirt::enter_steal_time() {
  const u64 stolen = stolen_since_last_sample();
  if (!stolen && !preempted_shown_) return;
  auto* const area = guest_memory(steal_time_ & KVM_STEAL_VALID_BITS, sizeof(kvm_steal_time));
  if (!area) return;
  auto& shared = *reinterpret_cast<kvm_steal_time*>(area);

  if (preempted_shown_) {
    preempted_shown_ = false;
    // Others may have left word here instead of sending an IPI for a TLB flush.
    const u8 left = __atomic_exchange_n(&shared.preempted, u8(0), __ATOMIC_ACQ_REL);
    if (left & KVM_VCPU_FLUSH_TLB) cpu_.mmu.flush_all();
  }
  if (!stolen) return;
  const u32 version = (shared.version + 1) | 1;
  __atomic_store_n(&shared.version, version, __ATOMIC_RELEASE);
  __atomic_store_n(&shared.steal, shared.steal + stolen, __ATOMIC_RELEASE);
  __atomic_store_n(&shared.version, version + 1, __ATOMIC_RELEASE);
}

/// Only a vCPU that will sleep says so: an exit to the client is too short to be worth a store into guest memory.
void Paravirt::on_block() {
  if (!(steal_time_ & KVM_MSR_ENABLED)) return;
  auto* const area = guest_memory(steal_time_ & KVM_STEAL_VALID_BITS, sizeof(kvm_steal_time));
  if (!area) return;
  __atomic_store_n(&reinterpret_cast<kvm_steal_time*>(area)->preempted, u8(KVM_VCPU_PREEMPTED), __ATOMIC_RELEASE);
  preempted_shown_ = true;
}

}  // namespace anykvm::paravirt
