// One virtual machine: memory slots, interrupt controllers and lines, events, vCPUs. (KVM API, "VM ioctls".)
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "anykvm/device.h"
#include "anykvm/kvm_device.h"

struct kvm_clock_data;
struct kvm_irq_routing_entry;
struct kvm_irqchip;
struct kvm_pit_state2;

namespace anykvm {

class Vcpu;

/// A virtual machine, made by Kvm::create_vm(). Thread-safe but for moving it. Its vCPUs keep the machine itself alive.
///
/// Order matters to KVM, and the methods throw when it is not kept: create_irq_chip() before the first vCPU,
/// create_pit() after create_irq_chip(), memory before the first Vcpu::run().
class ANYKVM_API Vm {
 public:
  ~Vm();
  Vm(Vm&&) noexcept;
  Vm& operator=(Vm&&) noexcept;

  /// KVM_CHECK_EXTENSION on the VM: like Kvm::check_extension(), for this machine type.
  int check_extension(long capability) const;
  /// KVM_ENABLE_CAP. Throws KvmError: EINVAL when the capability or an argument is unknown.
  void enable_capability(std::uint32_t capability, std::span<const std::uint64_t> arguments = {}) const;

  /// KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR: three pages and one page of guest-physical addresses below 4 GiB that
  /// KVM on Intel hosts needs for itself, outside every slot. Before the first vCPU. Throw KvmError: EINVAL, EEXIST.
  void set_tss_address(std::uint64_t gpa) const;
  void set_identity_map_address(std::uint64_t gpa) const;

  /// @name Memory slots
  /// A slot is a number first and a range of guest memory when it is set up. The number is handed out once.
  /// @{
  class MemorySlot {
   public:
    MemorySlot() = default;
    std::int32_t number() const { return number_; }

   private:
    friend class Vm;
    explicit MemorySlot(std::int32_t number) : number_(number) {}
    std::int32_t number_ = -1;
  };

  /// Takes a free slot for `size` bytes, a multiple of 4096. Throws KvmError ENOSPC when all are taken, EINVAL.
  MemorySlot allocate_memory_slot(std::uint64_t size);
  /// KVM_SET_USER_MEMORY_REGION: the slot's bytes at `host` are the guest's at `gpa`; both page-aligned, and `host`
  /// stays mapped while the slot is set up. `flags`: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY. A slot that is set up
  /// can be moved and its flags changed. Throws KvmError: EEXIST when it overlaps another, EINVAL.
  void set_up_memory_slot(MemorySlot slot, void* host, std::uint64_t gpa, std::uint32_t flags = 0);
  /// Takes the slot's memory away from the guest; the slot can be set up again.
  void disable_memory_slot(MemorySlot slot);
  /// Disables the slot when it is set up, and gives its number back.
  void free_memory_slot(MemorySlot slot);
  /// KVM_GET_DIRTY_LOG: one bit per page written since the last call, the first page in bit 0 of the first word.
  /// The slot is set up with KVM_MEM_LOG_DIRTY_PAGES; otherwise throws KvmError ENOENT.
  std::vector<std::uint64_t> dirty_log(MemorySlot slot) const;
  /// @}

  /// KVM_REGISTER_COALESCED_MMIO: writes to the range are queued (Vcpu::drain_coalesced_mmio) instead of an exit each.
  /// Needs Kvm::cap_coalesced_mmio(). `size` in bytes. Throws KvmError: ENOSPC, ENXIO.
  void coalesce_mmio(std::uint64_t gpa, std::uint32_t size) const;
  void uncoalesce_mmio(std::uint64_t gpa, std::uint32_t size) const;

  /// @name Interrupts
  /// @{
  /// KVM_CREATE_IRQCHIP: 8259 pair, I/O APIC and a local APIC in each vCPU. Needs Kvm::cap_irq_chip().
  /// Throws KvmError: EEXIST, EINVAL when there is a vCPU already.
  void create_irq_chip();
  bool has_irq_chip() const;
  /// KVM_CREATE_PIT2: the 8254 timer. `speaker_dummy`: KVM answers port 0x61 as well. Needs Kvm::cap_pit2().
  void create_pit(bool speaker_dummy = true) const;
  /// KVM_IRQ_LINE: drives the line of a GSI. Needs create_irq_chip(). Throws KvmError ENXIO without it.
  void set_irq_line(std::uint32_t gsi, bool level) const;
  /// KVM_SIGNAL_MSI. Returns whether a vCPU took it (false: the guest has it masked). Needs Kvm::cap_signal_msi().
  bool signal_msi(std::uint64_t address, std::uint32_t data) const;
  /// KVM_SET_GSI_ROUTING: replaces the whole table. Needs Kvm::cap_irq_routing(). Throws KvmError: EINVAL, E2BIG.
  void set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) const;
  /// KVM_IRQFD: a write to `event_fd` is an edge on `gsi`; with `resample_fd` a level, lowered at the guest's EOI,
  /// which is then told there. Needs Kvm::cap_irqfd(). Throws KvmError: EINVAL, EBADF, EBUSY.
  void attach_irqfd(int event_fd, std::uint32_t gsi, std::optional<int> resample_fd = {}) const;
  void detach_irqfd(int event_fd, std::uint32_t gsi) const;
  /// KVM_GET_IRQCHIP, KVM_SET_IRQCHIP: chip_id of `chip` says which one.
  void get_irq_chip(kvm_irqchip& chip) const;
  void set_irq_chip(const kvm_irqchip& chip) const;
  /// KVM_GET_PIT2, KVM_SET_PIT2.
  void get_pit(kvm_pit_state2& pit) const;
  void set_pit(const kvm_pit_state2& pit) const;
  /// @}

  /// KVM_IOEVENTFD: a guest's write of `size` bytes (0: any, 1, 2, 4, 8) at `address` signals `event_fd` without an
  /// exit; with `match` only a write of that value does. Needs Kvm::cap_ioeventfd(). Throws KvmError: EINVAL, EEXIST,
  /// ENOSPC.
  struct IoEvent {
    std::uint64_t address;
    std::uint32_t size = 0;
    bool is_port = false;
    std::optional<std::uint64_t> match = {};
  };
  void attach_ioeventfd(int event_fd, const IoEvent& event) const;
  void detach_ioeventfd(int event_fd, const IoEvent& event) const;

  /// KVM_GET_CLOCK, KVM_SET_CLOCK: the guest's kvmclock, in nanoseconds. Needs Kvm::cap_adjust_clock().
  kvm_clock_data clock() const;
  void set_clock(const kvm_clock_data& clock) const;

  /// A vCPU id that this Vm has not handed out: sequential from 0. A vCPU's id is its local APIC's.
  std::uint32_t allocate_vcpu_id();
  /// KVM_CREATE_VCPU. Throws KvmError: EEXIST, EINVAL when `id` is beyond KVM_CAP_MAX_VCPU_ID.
  Vcpu create_vcpu(std::uint32_t id) const;
  Vcpu create_vcpu();

  /// KVM_CREATE_DEVICE: `type` is KVM_DEV_TYPE_…. Throws KvmError: ENODEV, ENOTTY where KVM has no devices.
  Device create_device(std::uint32_t type) const;

  const KvmHandle& handle() const;

 private:
  friend class Kvm;
  Vm(KvmHandle handle, std::size_t vcpu_mmap_size);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace anykvm
