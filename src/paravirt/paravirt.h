// One vCPU's paravirtual devices: kvmclock, steal time, PV EOI, the hypercalls. See docs/paravirt.md.
// Reference: Documentation/virt/kvm/x86/{msr,cpuid,hypercalls}.rst.
//
// How the vCPU wires it (all calls on the vCPU's thread):
//  - It owns one Paravirt beside its Cpu, and implements Client.
//  - Machine::read_msr/write_msr: local APIC first, then paravirt (Initiator::guest), then not_mine (x86/msr answers).
//    KVM_GET/SET_MSRS: the same order with Initiator::host, ending in x86::get_msr/set_msr.
//  - Machine::hypercall: `return paravirt.hypercall();` The engine gives RIP behind the instruction.
//  - The run loop calls on_enter() each time before Engine::run, and on_leave() when it is about to block (HLT) or to
//    return from KVM_RUN. Guest memory is written through Machine::page(gpa, true): call on_enter, on_leave and the
//    PV EOI methods under the same os::run_guarded as the engine, for the client may have unmapped its RAM.
//  - PV EOI: after Engine::run and before anything looks at the local APIC, `if (paravirt.collect_pv_eoi())
//  apic.eoi()`;
//    before Engine::run, when one interrupt is in service, nothing is pending in the IRR and the vector in service
//    needs no EOI broadcast, `paravirt.arm_pv_eoi()`.
#pragma once

#include <atomic>

#include "paravirt/clock.h"
#include "x86/cpu.h"
#include "x86/msr.h"

namespace anykvm::paravirt {

/// What KVM's feature leaf (0x40000001 EAX) offers.
u32 kvm_features();

/// Hypercalls act on other vCPUs through this; implemented by vcpu::Vcpu.
class Client {
 public:
  /// KVM_HC_KICK_CPU: the vCPU with this APIC ID leaves HLT (or its next HLT at once), interrupts enabled or not.
  virtual void kick_cpu(u32 apic_id) = 0;
  /// An IPI to one vCPU: fixed, lowest-priority, SMI, NMI ... as ICR's delivery mode says. False: no such vCPU.
  virtual bool send_ipi(u32 apic_id, u32 icr) = 0;
  /// False: no in-kernel local APICs, the hypercalls on IPIs do not exist.
  virtual bool has_local_apic() = 0;

 protected:
  ~Client() = default;
};

class Paravirt {
 public:
  Paravirt(x86::Cpu& cpu, VmClock& clock, Client& client, u32 vcpu_id);

  /// 0x11, 0x12, 0x4b564d00-0x4b564dff, and the host's writes of IA32_TSC (synchronised between vCPUs).
  x86::Machine::MsrResult read_msr(u32 index, u64& value, x86::Initiator initiator);
  x86::Machine::MsrResult write_msr(u32 index, u64 value, x86::Initiator initiator);

  /// VMCALL/VMMCALL: arguments and result in the guest's registers. exit: KVM_EXIT_HYPERCALL, Cpu::exit filled.
  x86::Result hypercall();

  void on_enter();
  enum class Leave : u8 { to_client, to_block };
  void on_leave(Leave why);

  /// RESET/INIT do not touch these; KVM turns them off at vCPU reset.
  void reset();

  // --- PV EOI ---------------------------------------------------------------------------------------------------
  bool pv_eoi_enabled() const { return pv_eoi_ & 1; }
  /// Tells the guest that its next EOI may be a store; remembered until collected.
  void arm_pv_eoi();
  /// True when the guest has ended the interrupt by that store: the caller does the EOI now. Disarms in any case.
  bool collect_pv_eoi() { return pv_eoi_armed_ && collect_armed_pv_eoi(); }

  // --- time -----------------------------------------------------------------------------------------------------
  /// KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ (0: the host's). EINVAL: no such rate.
  u32 tsc_khz() const { return tsc_khz_; }
  int set_tsc_khz(u32 khz);
  /// KVM_KVMCLOCK_CTRL: the guest learns that it was stopped. EINVAL: kvmclock is off.
  int kvmclock_ctrl();
  /// The instant of CLOCK_MONOTONIC at which the guest's TSC reaches a value (now, when it has).
  u64 monotonic_ns_of_tsc(u64 guest_tsc) const;
  /// After anything else has changed the TSC's offset.
  void tsc_changed() { clock_pending_ = true; }

  /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
  void enforce_features(bool on) { enforce_features_ = on; }

  u64 poll_control() const { return poll_control_; }

 private:
  bool has(unsigned feature) const;
  void update_clock();
  void update_steal_time();
  void write_wall_clock();
  bool collect_armed_pv_eoi();
  u64 clock_pairing(u64 gpa, u64 type);
  u64 send_ipi(u64 low, u64 high, u64 min, u64 icr, unsigned cluster);

  x86::Cpu& cpu_;
  VmClock& clock_;
  Client& client_;
  u32 tsc_khz_;
  u64 system_time_ = 0, steal_time_ = 0, pv_eoi_ = 0, poll_control_ = 1;
  u32 clock_generation_ = 0;
  bool clock_pending_ = false, wall_clock_pending_ = false, guest_stopped_ = false;
  bool pv_eoi_armed_ = false, enforce_features_ = false;
  // steal time: host TSC cycles in the run loop since the last sample, thread CPU time at that sample
  bool in_guest_ = false, marked_preempted_ = false, steal_pending_ = false;
  u64 entered_tsc_ = 0, run_cycles_ = 0, sampled_cpu_ns_ = 0, sampled_tsc_ = 0, steal_ns_ = 0;
};

}  // namespace anykvm::paravirt
