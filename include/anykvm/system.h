// The system descriptor: what this KVM is able to do, and how virtual machines are made. (KVM API, "System ioctls".)
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "anykvm/kvm_device.h"

struct kvm_cpuid_entry2;

namespace anykvm {

class Vm;

/// KVM itself. Thread-safe. Vms made by it do not need it to live on.
class ANYKVM_API Kvm {
 public:
  /// Opens the device. Throws KvmError: ENOENT, EACCES … when it cannot be opened, ENOTSUP when it speaks another
  /// version of the API than 12.
  explicit Kvm(std::shared_ptr<KvmDevice> device = KvmDevice::software());
  ~Kvm();
  Kvm(Kvm&&) noexcept;
  Kvm& operator=(Kvm&&) noexcept;

  /// KVM_GET_API_VERSION: 12, checked by the constructor.
  int api_version() const;
  /// KVM_GET_VCPU_MMAP_SIZE: bytes of the area a vCPU shares with its client; struct kvm_run is at its start.
  std::size_t vcpu_mmap_size() const;
  /// KVM_CHECK_EXTENSION: 0 when `capability` (KVM_CAP_…) is not there; some answer with a number of their own.
  int check_extension(long capability) const;

  /// @name Capabilities, by what they enable
  /// @{
  /// Vm::set_up_memory_slot().
  bool cap_user_memory() const;
  /// Vm::set_tss_address().
  bool cap_set_tss_address() const;
  /// Vm::set_identity_map_address().
  bool cap_set_identity_map_address() const;
  /// supported_cpuid() and Vcpu::set_cpuid().
  bool cap_extended_cpuid() const;
  /// Vcpu::nmi().
  bool cap_user_nmi() const;
  /// Vm::coalesce_mmio(): the page of the vCPU's area that holds the ring, 0 when MMIO cannot be coalesced.
  int cap_coalesced_mmio() const;
  /// How many memory slots a Vm has; 0 when it does not tell (assume 32).
  int cap_memory_slots() const;
  /// Read-only memory slots: KVM_MEM_READONLY in Vm::set_up_memory_slot().
  bool cap_readonly_memory() const;
  /// Vm::create_irq_chip(), Vm::set_irq_line().
  bool cap_irq_chip() const;
  /// Vm::create_pit().
  bool cap_pit2() const;
  /// Vm::set_gsi_routing().
  bool cap_irq_routing() const;
  /// Vm::signal_msi().
  bool cap_signal_msi() const;
  /// Vm::attach_irqfd().
  bool cap_irqfd() const;
  /// Vm::attach_ioeventfd().
  bool cap_ioeventfd() const;
  /// Vcpu::events(), Vcpu::set_events().
  bool cap_vcpu_events() const;
  /// Vcpu::debug_registers(), Vcpu::set_debug_registers().
  bool cap_debug_registers() const;
  /// Vcpu::xcrs(), Vcpu::set_xcrs().
  bool cap_xcrs() const;
  /// Vcpu::xsave(), Vcpu::set_xsave().
  bool cap_xsave() const;
  /// kvm_run::immediate_exit, and with it Vcpu::set_immediate_exit().
  bool cap_immediate_exit() const;
  /// Vcpu::mp_state(), Vcpu::set_mp_state().
  bool cap_mp_state() const;
  /// Vcpu::tsc_khz().
  bool cap_get_tsc_khz() const;
  /// Vcpu::set_tsc_khz().
  bool cap_tsc_control() const;
  /// Vm::clock(), Vm::set_clock().
  bool cap_adjust_clock() const;
  /// KVM_GET_ONE_REG and KVM_SET_ONE_REG through KvmHandle::ioctl(); not on x86.
  bool cap_one_reg() const;
  /// The most vCPUs a Vm takes, and how many its host does well with.
  int cap_max_vcpus() const;
  int cap_recommended_vcpus() const;
  /// @}

  /// KVM_GET_SUPPORTED_CPUID: the CPUID leaves a guest may be given. Asked once, then cached.
  /// Needs cap_extended_cpuid().
  const std::vector<kvm_cpuid_entry2>& supported_cpuid() const;
  /// KVM_GET_MSR_INDEX_LIST: the MSRs that are state to save and restore. Asked once, then cached.
  const std::vector<std::uint32_t>& supported_msrs() const;
  /// KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that say what the processor is able to do. Asked once, then cached.
  const std::vector<std::uint32_t>& feature_msrs() const;

  /// KVM_CREATE_VM. `type` is 0 but for machine types beyond the plain one. Throws KvmError: EINVAL, EMFILE, ENOMEM.
  Vm create_vm(unsigned long type = 0) const;

  const KvmHandle& handle() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace anykvm
