// One virtual CPU: registers, events, and running guest code. (KVM API, "vcpu ioctls".)
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "anykvm/exit.h"
#include "anykvm/kvm_device.h"

struct kvm_cpuid_entry2;
struct kvm_debugregs;
struct kvm_fpu;
struct kvm_lapic_state;
struct kvm_msr_entry;
struct kvm_regs;
struct kvm_run;
struct kvm_sregs;
struct kvm_translation;
struct kvm_vcpu_events;
struct kvm_xcrs;

namespace anykvm {

/// A virtual CPU, made by Vm::create_vcpu(). It runs on the thread that calls run(). All methods are for that thread,
/// but set_immediate_exit(); calls from another thread wait until run() is back.
///
/// The structures are the kernel's, declared in "anykvm/kvm.h". Unless said otherwise methods throw KvmError: EINVAL
/// for a state no processor can be in.
class ANYKVM_API Vcpu {
 public:
  ~Vcpu();
  Vcpu(Vcpu&& other) noexcept;
  Vcpu& operator=(Vcpu&& other) noexcept;

  std::uint32_t id() const { return id_; }

  /// KVM_RUN: guest code until it needs the client. EINTR and EAGAIN are exits (Interrupted, NotStarted), other errors
  /// throw: EFAULT when guest memory is not accessible to this process, ENOEXEC and such from foreign KVMs.
  Exit run() {
    const long result = handle_.try_ioctl(run_request, 0ul);
    return result == 0 ? decode_exit() : refused(int(-result));
  }
  /// The shared area's beginning: struct kvm_run.
  kvm_run& run_area() const { return *run_; }
  /// Makes the next run(), or the present one when a signal also reaches its thread, return Interrupted at once. The
  /// vCPU's exits that are not complete are completed first. Any thread; stays set until cleared.
  void set_immediate_exit(bool on) const;

  /// Hands each queued write of a coalesced range to `write`, oldest first, and returns how many there were. One ring
  /// serves all vCPUs of a Vm: the caller sees to it that one thread at a time drains it.
  struct CoalescedWrite {
    std::uint64_t address;
    std::span<const std::uint8_t> data;
    bool is_port;
  };
  std::size_t drain_coalesced_mmio(const std::function<void(const CoalescedWrite&)>& write) const;

  kvm_regs regs() const;                     ///< KVM_GET_REGS
  void set_regs(const kvm_regs& regs);       ///< KVM_SET_REGS
  kvm_sregs sregs() const;                   ///< KVM_GET_SREGS
  void set_sregs(const kvm_sregs& sregs);    ///< KVM_SET_SREGS
  kvm_fpu fpu() const;                       ///< KVM_GET_FPU
  void set_fpu(const kvm_fpu& fpu);          ///< KVM_SET_FPU
  kvm_xcrs xcrs() const;                     ///< KVM_GET_XCRS, needs Kvm::cap_xcrs()
  void set_xcrs(const kvm_xcrs& xcrs);       ///< KVM_SET_XCRS, needs Kvm::cap_xcrs()
  std::vector<std::uint32_t> xsave() const;  ///< KVM_GET_XSAVE2 or KVM_GET_XSAVE: the area, 4096 bytes or more
  void set_xsave(std::span<const std::uint32_t> area);  ///< KVM_SET_XSAVE: what xsave() gave

  /// KVM_GET_MSRS, KVM_SET_MSRS: `entries` with index (and data) filled in. Return how many were done: they stop at the
  /// first that is refused.
  std::size_t get_msrs(std::span<kvm_msr_entry> entries) const;
  std::size_t set_msrs(std::span<const kvm_msr_entry> entries);
  /// One MSR. Throws KvmError EINVAL when it is refused.
  std::uint64_t msr(std::uint32_t index) const;
  void set_msr(std::uint32_t index, std::uint64_t value);

  /// KVM_GET_CPUID2, KVM_SET_CPUID2: what the guest's CPUID answers. Before the first run(); needs
  /// Kvm::cap_extended_cpuid().
  std::vector<kvm_cpuid_entry2> cpuid() const;
  void set_cpuid(std::span<const kvm_cpuid_entry2> entries);

  kvm_lapic_state lapic() const;                             ///< KVM_GET_LAPIC, needs Vm::create_irq_chip()
  void set_lapic(const kvm_lapic_state& state);              ///< KVM_SET_LAPIC
  std::uint32_t mp_state() const;                            ///< KVM_GET_MP_STATE: KVM_MP_STATE_…
  void set_mp_state(std::uint32_t state);                    ///< KVM_SET_MP_STATE
  kvm_vcpu_events events() const;                            ///< KVM_GET_VCPU_EVENTS
  void set_events(const kvm_vcpu_events& events);            ///< KVM_SET_VCPU_EVENTS
  kvm_debugregs debug_registers() const;                     ///< KVM_GET_DEBUGREGS
  void set_debug_registers(const kvm_debugregs& registers);  ///< KVM_SET_DEBUGREGS

  /// KVM_INTERRUPT: queues external interrupt `vector`. Without Vm::create_irq_chip() only. EEXIST: one is queued.
  void interrupt(std::uint8_t vector);
  /// KVM_NMI. Needs Kvm::cap_user_nmi().
  void nmi();
  /// KVM_TRANSLATE: guest-virtual `address` through the vCPU's present page tables.
  kvm_translation translate(std::uint64_t address) const;
  /// KVM_SET_SIGNAL_MASK: signals blocked while in run(), one bit each from signal 1 on; nothing restores the thread's.
  void set_signal_mask(std::uint64_t mask);
  void clear_signal_mask();
  /// KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ. Need Kvm::cap_get_tsc_khz(), Kvm::cap_tsc_control().
  std::uint32_t tsc_khz() const;
  void set_tsc_khz(std::uint32_t khz);
  /// KVM_ENABLE_CAP on the vCPU.
  void enable_capability(std::uint32_t capability, std::span<const std::uint64_t> arguments = {});

  const KvmHandle& handle() const { return handle_; }

 private:
  friend class Vm;
  Vcpu(KvmHandle handle, std::uint32_t id, std::size_t area_size);
  static const unsigned long run_request;
  Exit decode_exit() const;
  static Exit refused(int error);
  void unmap();

  KvmHandle handle_;
  std::uint32_t id_;
  std::size_t area_size_;
  kvm_run* run_ = nullptr;
};

}  // namespace anykvm
