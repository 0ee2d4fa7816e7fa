// One virtual CPU: what a KVM vCPU fd stands for. One typed method per ioctl, named after it; arguments are already
// copied from the client, results are >= 0 or -errno with the kernel's choice of errno, and a bad call changes nothing.
// Reference: Documentation/virt/kvm/api.rst, "vcpu ioctls" and chapter 5, "The kvm_run structure". See docs/vcpu.md.
//
// Thread-safety: the ioctls may be called from any thread and wait for a KVM_RUN in progress, as the kernel's do; the
// section "any thread" never waits.
#pragma once

#include <atomic>
#include <csignal>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "anykvm/kvm.h"
#include "x86/cpu.h"
#include "x86/machine.h"

namespace anykvm::engine {
class Engine;
}
namespace anykvm::irqchip {
class LocalApic;
}
namespace anykvm::vm {
class Vm;
}

namespace anykvm::vcpu {

class Vcpu final : public x86::Machine {
 public:
  Vcpu(std::shared_ptr<vm::Vm> vm, u32 id, kvm_run* run);
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  u32 id() const { return id_; }
  vm::Vm& vm() { return *vm_; }

  // --- ioctls ---------------------------------------------------------------------------------------------------
  int run();

  int get_regs(kvm_regs& regs);
  int set_regs(const kvm_regs& regs);
  int get_sregs(kvm_sregs& sregs);
  int set_sregs(const kvm_sregs& sregs);
  int get_sregs2(kvm_sregs2& sregs);
  int set_sregs2(const kvm_sregs2& sregs);
  int get_fpu(kvm_fpu& fpu);
  int set_fpu(const kvm_fpu& fpu);
  int get_xsave(kvm_xsave& xsave);        ///< the first 4096 bytes
  int set_xsave(const kvm_xsave& xsave);  ///< 4096 bytes
  int get_xsave2(std::span<u8> area);     ///< area: KVM_CAP_XSAVE2 bytes
  int set_xsave(std::span<const u8> area);
  int get_xcrs(kvm_xcrs& xcrs);
  int set_xcrs(const kvm_xcrs& xcrs);
  int get_msrs(std::span<kvm_msr_entry> entries);        ///< how many were read, up to the first that cannot be
  int set_msrs(std::span<const kvm_msr_entry> entries);  ///< how many were written
  int get_lapic(kvm_lapic_state& lapic);
  int set_lapic(const kvm_lapic_state& lapic);
  int get_mp_state(kvm_mp_state& state);
  int set_mp_state(const kvm_mp_state& state);
  int get_vcpu_events(kvm_vcpu_events& events);
  int set_vcpu_events(const kvm_vcpu_events& events);
  int get_debugregs(kvm_debugregs& regs);
  int set_debugregs(const kvm_debugregs& regs);
  int set_cpuid2(std::span<const kvm_cpuid_entry2> entries);
  /// Fills entries, count becomes their number; E2BIG (count set to what is needed) when there is too little room.
  int get_cpuid2(std::span<kvm_cpuid_entry2> entries, u32& count);
  int translate(kvm_translation& translation);
  int interrupt(const kvm_interrupt& interrupt);
  int nmi();
  int set_signal_mask(const u64* mask);  ///< nullptr: none
  int get_tsc_khz();
  int set_tsc_khz(u32 khz);
  int kvmclock_ctrl();
  int enable_cap(const kvm_enable_cap& cap);

 private:
  std::shared_ptr<vm::Vm> vm_;
  u32 id_;
  kvm_run* run_;
};

}  // namespace anykvm::vcpu
