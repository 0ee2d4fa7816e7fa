// Steal time: how long the vCPU's thread wanted to run and did not.
// Reference: Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME.
//
// KVM has the scheduler's run_delay; a process finds it in /proc, which costs a system call per entry and files that a
// client's seccomp filter may forbid. Here it is a difference of clocks: the time spent inside the run loop, by the
// TSC, less the CPU time of the thread, sampled at most every 10 ms. Blocking in HLT and time in the client are outside
// the loop. CPU time that the client's code uses between two KVM_RUNs makes the sum smaller, never larger: idle time is
// not reported as stolen.
#include <asm/kvm_para.h>
#include <pthread.h>

#include <cstring>
#include <ctime>

#include "os/tsc.h"
#include "paravirt/paravirt.h"

namespace anykvm::paravirt {
namespace {

constexpr u64 sample_period_ms = 10;

u64 thread_cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return u64(t.tv_sec) * 1'000'000'000 + u64(t.tv_nsec);
}

}  // namespace

u64 Paravirt::stolen_since_last_sample(u64 now) {
  const u64 host_khz = os::host_tsc_khz();
  const void* const thread = reinterpret_cast<const void*>(pthread_self());
  if (sampled_thread_ == thread && run_cycles_ < host_khz * sample_period_ms) return 0;
  const u64 cpu_ns = thread_cpu_ns();
  const u64 ran_ns = u64(u128(run_cycles_) * 1'000'000 / host_khz), used_ns = cpu_ns - sampled_cpu_ns_;
  const u64 stolen = sampled_thread_ == thread && ran_ns > used_ns ? ran_ns - used_ns : 0;
  sampled_thread_ = thread;
  sampled_cpu_ns_ = cpu_ns;
  run_cycles_ = 0;
  entered_tsc_ = now;
  return stolen;
}

void Paravirt::enter_steal_time() {
  const u64 stolen = stolen_since_last_sample(entered_tsc_);
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

void Paravirt::on_leave(Leave why) {
  if (running_) run_cycles_ += os::host_tsc() - entered_tsc_;
  running_ = false;
  // Only a vCPU that will sleep says so: an exit to the client is too short to be worth a store into guest memory.
  if (why != Leave::to_block || !(steal_time_ & KVM_MSR_ENABLED)) return;
  auto* const area = guest_memory(steal_time_ & KVM_STEAL_VALID_BITS, sizeof(kvm_steal_time));
  if (!area) return;
  __atomic_store_n(&reinterpret_cast<kvm_steal_time*>(area)->preempted, u8(KVM_VCPU_PREEMPTED), __ATOMIC_RELEASE);
  preempted_shown_ = true;
}

}  // namespace anykvm::paravirt
