// One vCPU's paravirtual devices: kvmclock, steal time, PV EOI, the hypercalls. See docs/paravirt.md.
// Reference: Documentation/virt/kvm/x86/{msr,cpuid,hypercalls}.rst.
//
// How the vCPU wires it (all calls on the vCPU's thread, or under its mutex):
//  - It owns one Paravirt beside its Cpu. With in-kernel local APICs it calls set_local_apic() once.
//  - Machine::read_msr/write_msr: local APIC first, then paravirt (Initiator::guest), then not_mine (x86/msr answers).
//    KVM_GET/SET_MSRS: the same order with Initiator::host, ending in x86::get_msr/set_msr.
//  - Machine::hypercall: `return paravirt.hypercall(vm.hypercall_exits_enabled());` The engine gives RIP behind the
//  instruction.
//  - The run loop calls on_enter() each time before Engine::run, and on_block() when it is about to block (HLT). They
//    touch guest memory through Machine::page(gpa, true), and so do the PV EOI hooks inside LocalApic: call all of them
//    under an os::run_guarded, as the engine, for the client may have unmapped its RAM.
//  - ApicClient::tsc_deadline_ns is monotonic_ns_of_tsc().
#pragma once

#include <atomic>

#include "irqchip/lapic.h"
#include "os/run_delay.h"
#include "paravirt/clock.h"
#include "x86/cpu.h"
#include "x86/msr.h"

namespace anykvm::paravirt {

class Paravirt final : private irqchip::PvEoi {
 public:
  /// The vCPU's TSC starts at 0, in step with those of the VM's other vCPUs. tsc_khz: the VM's default (0: the host's).
  Paravirt(x86::Cpu& cpu, VmClock& clock, u32 tsc_khz = 0);
  ~Paravirt();
  Paravirt(const Paravirt&) = delete;
  Paravirt& operator=(const Paravirt&) = delete;

  /// Without it, PV EOI does nothing and the IPI hypercalls fail.
  void set_local_apic(irqchip::LocalApic& apic, irqchip::ApicBus& bus) { apic_ = &apic, bus_ = &bus; }

  /// Without it, no time is stolen.
  void set_run_delay(os::RunDelay& run_delay) { run_delay_ = &run_delay; }

  /// 0x11, 0x12, 0x4b564d00-0x4b564dff; IA32_TSC and TSC_ADJUST, whose writes the clock page and the APIC's timer
  /// follow (and the client's are synchronised between vCPUs).
  x86::Machine::MsrResult read_msr(u32 index, u64& value, x86::Initiator initiator);
  x86::Machine::MsrResult write_msr(u32 index, u64 value, x86::Initiator initiator);

  /// VMCALL/VMMCALL: arguments and result in the guest's registers. exit: KVM_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE;
  /// the vCPU takes the arguments from RBX, RCX, RDX, and puts the client's answer into RAX (32 bits outside 64-bit
  /// mode). exits_enabled: KVM_CAP_EXIT_HYPERCALL's mask.
  x86::Result hypercall(u64 exits_enabled = 0);

  void on_enter();
  void on_block();

  /// RESET/INIT do not touch these; KVM turns them off at vCPU reset.
  void reset();

  // --- time -----------------------------------------------------------------------------------------------------
  /// KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ (0: the host's). EINVAL: no such rate.
  u32 tsc_khz() const { return tsc_khz_; }
  int set_tsc_khz(u32 khz);
  /// KVM_VCPU_TSC_OFFSET.
  void set_tsc_offset(u64 offset);
  /// KVM_KVMCLOCK_CTRL: the guest learns that it was stopped. EINVAL: kvmclock is off.
  int kvmclock_ctrl();
  /// The instant of CLOCK_MONOTONIC at which the guest's TSC reaches a value (now, when it has).
  u64 monotonic_ns_of_tsc(u64 guest_tsc) const;
  /// After anything else has changed the TSC's offset or ratio.
  void tsc_changed();

  /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
  void enforce_features(bool on) { enforce_features_ = on; }

  u64 poll_control() const { return poll_control_; }

 private:
  bool offer() override;
  bool withdraw() override;

  bool has(unsigned feature) const;
  u8* guest_memory(Gpa gpa, unsigned size);
  bool write_guest(Gpa gpa, const void* data, unsigned size);
  void update_clock_page();
  void write_wall_clock();
  x86::Machine::MsrResult write_async_pf(u64 value);
  void enter_steal_time();
  u64 stolen_since_last_sample();
  void set_tsc(u64 value, bool by_client);
  u64 run_hypercall(u64 number, const u64 (&arguments)[4], bool long_mode);
  u64 send_ipis(const u64 (&arguments)[4], unsigned bitmap_bits);
  u64 pair_clocks(Gpa gpa, u64 type);

  x86::Cpu& cpu_;
  VmClock& clock_;
  irqchip::LocalApic* apic_ = nullptr;
  irqchip::ApicBus* bus_ = nullptr;
  u32 tsc_khz_ = 0;
  TscScale tsc_scale_;  ///< of the guest's TSC
  VmClock::VcpuTsc tsc_;
  u64 system_time_ = 0, steal_time_ = 0, pv_eoi_ = 0, poll_control_ = 1;
  u64 async_pf_ = 0, async_pf_int_ = 0;  ///< kept for the guest: its memory is never long in coming
  u32 clock_generation_ = 0;
  bool clock_pending_ = false, wall_clock_pending_ = false, guest_stopped_ = false, enforce_features_ = false;
  bool preempted_shown_ = false;
  os::RunDelay* run_delay_ = nullptr;
  u64 sampled_tsc_ = 0, sampled_delay_ns_ = 0;
};

}  // namespace anykvm::paravirt
