// One virtual machine: what a KVM VM fd stands for. One typed method per ioctl, named after it; arguments are already
// copied from the client, results are >= 0 or -errno with the kernel's choice of errno, and a bad call changes nothing.
// Reference: Documentation/virt/kvm/api.rst, "vm ioctls".
//
// Thread-safety: every method may be called from any thread, vCPU threads included.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "anykvm/kvm.h"
#include "engine/code_memory.h"
#include "vm/memory_slots.h"
#include "vm/stats.h"
#include "x86/types.h"

namespace anykvm::os {
class TimerQueue;
}
namespace anykvm::irqchip {
class ApicBus;
class IrqChips;
class Pit;
}  // namespace anykvm::irqchip
namespace anykvm::paravirt {
class VmClock;
}
namespace anykvm::vcpu {
class Vcpu;
}

namespace anykvm::vm {

class CoalescedZones;
class IoEventFds;
class IrqFds;
class IrqRouting;
class MsrFilter;
class SplitIrqChip;

class Vm : public std::enable_shared_from_this<Vm> {
 public:
  /// KVM_MAX_VCPUS and KVM_MAX_VCPU_IDS of a kernel.
  static constexpr u32 max_vcpus = 1024, max_vcpu_ids = 4096;
  /// KVM_X86_QUIRK_* that can be turned off. Two are about caches of the kernel's that nothing here has.
  static constexpr u64 quirks = KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE |
                                KVM_X86_QUIRK_FIX_HYPERCALL_INSN | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS |
                                KVM_X86_QUIRK_CD_NW_CLEARED | KVM_X86_QUIRK_SLOT_ZAP_ALL |
                                KVM_X86_QUIRK_OUT_7E_INC_RIP | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;

  /// KVM_CREATE_VM. type must be 0 (KVM_X86_DEFAULT_VM): EINVAL.
  static int create(unsigned long type, std::shared_ptr<Vm>& out);
  ~Vm();
  Vm(const Vm&) = delete;
  Vm& operator=(const Vm&) = delete;

  // --- memory ---------------------------------------------------------------------------------------------------
  int set_user_memory_region(const kvm_userspace_memory_region& region);
  int set_user_memory_region2(const kvm_userspace_memory_region2& region);
  int get_dirty_log(const kvm_dirty_log& log);  ///< EFAULT when the bitmap cannot be written
  int clear_dirty_log(const kvm_clear_dirty_log& log);
  /// A vCPU's ioctl, but what it brings in is all vCPUs'. range becomes what is left; 0 as soon as a page was done.
  int pre_fault_memory(kvm_pre_fault_memory& range) { return memory_.pre_fault(range); }
  int set_nr_mmu_pages(u64 pages);
  int set_tss_addr(u64 address);
  int set_identity_map_addr(u64 address);

  // --- vCPUs ----------------------------------------------------------------------------------------------------
  /// run points at the three pages that the client maps (kvm_run, PIO data, coalesced MMIO ring), zeroed by the caller
  /// and valid as long as the vCPU.
  int create_vcpu(u32 id, kvm_run* run, std::shared_ptr<vcpu::Vcpu>& out);
  int set_boot_cpu_id(u64 id);

  // --- interrupts -----------------------------------------------------------------------------------------------
  int create_irqchip();
  int get_irqchip(kvm_irqchip& chip);
  int set_irqchip(const kvm_irqchip& chip);
  int create_pit();
  int create_pit2(const kvm_pit_config& config);
  int get_pit(kvm_pit_state& state);
  int set_pit(const kvm_pit_state& state);
  int get_pit2(kvm_pit_state2& state);
  int set_pit2(const kvm_pit_state2& state);
  int reinject_control(const kvm_reinject_control& control);
  int irq_line(const kvm_irq_level& level);
  int irq_line_status(kvm_irq_level& level);
  int set_gsi_routing(u32 flags, std::span<const kvm_irq_routing_entry> entries);
  int signal_msi(const kvm_msi& msi);
  int irqfd(const kvm_irqfd& args);
  int ioeventfd(const kvm_ioeventfd& args);
  int register_coalesced_mmio(const kvm_coalesced_mmio_zone& zone);
  int unregister_coalesced_mmio(const kvm_coalesced_mmio_zone& zone);

  // --- time -----------------------------------------------------------------------------------------------------
  int get_clock(kvm_clock_data& clock);
  int set_clock(const kvm_clock_data& clock);
  int get_tsc_khz();
  int set_tsc_khz(u32 khz);  ///< for vCPUs created from now on; 0: the host's

  int enable_cap(const kvm_enable_cap& cap);
  int x86_set_msr_filter(const kvm_msr_filter& filter);
  int get_stats_fd();  ///< a new descriptor
  void publish_stats(os::Mapping page);
  const VmStats& stats() const { return stats_; }
  int create_device(const kvm_create_device& device);

  // --- for the vCPUs --------------------------------------------------------------------------------------------
  MemorySlots& memory() { return memory_; }
  engine::CodeMemory& code_memory() { return code_memory_; }
  IoEventFds& ioeventfds() { return *ioeventfds_; }
  irqchip::IrqChips* chips() { return chips_published_.load(std::memory_order_acquire); }  ///< nullptr: no irqchip
  irqchip::ApicBus& apic_bus() { return *apic_bus_; }
  IrqRouting& routing() { return *routing_; }
  os::TimerQueue& timers() { return *timers_; }
  paravirt::VmClock& clock() { return *clock_; }
  bool exception_payload_enabled() const { return exception_payload_.load(std::memory_order_relaxed); }
  bool triple_fault_event_enabled() const { return triple_fault_event_.load(std::memory_order_relaxed); }
  u64 hypercall_exits_enabled() const { return hypercall_exits_.load(std::memory_order_relaxed); }
  /// Whether any of the next two is set.
  bool intercepts_msrs() const { return intercepts_msrs_.load(std::memory_order_relaxed); }
  u32 user_space_msrs() const { return user_space_msrs_.load(std::memory_order_relaxed); }  ///< KVM_MSR_EXIT_REASON_*
  /// nullptr: all are allowed. Good while the caller is in guest mode.
  const MsrFilter* msr_filter() const { return msr_filter_.load(std::memory_order_acquire); }
  /// nullptr: none. Good while the caller is in guest mode.
  const CoalescedZones* coalesced_zones() const { return coalesced_.load(std::memory_order_acquire); }
  bool hides_platform_info() const { return hides_platform_info_.load(std::memory_order_relaxed); }
  bool halts_in_guest() const { return halts_in_guest_.load(std::memory_order_relaxed); }
  bool exits_on_emulation_failure() const { return exits_on_emulation_failure_.load(std::memory_order_relaxed); }
  bool is_boot_cpu(u32 id) const { return id == boot_cpu_id_; }
  bool has_local_apics() const { return local_apics_.load(std::memory_order_acquire); }

  /// Calls f(vcpu::Vcpu&) for every vCPU alive, without a lock that f could meet.
  template <class F>
  void for_each_vcpu(F f) {
    for (const std::shared_ptr<vcpu::Vcpu>& vcpu : vcpus()) f(*vcpu);
  }
  std::vector<std::shared_ptr<vcpu::Vcpu>> vcpus();

 private:
  Vm();
  struct Member {
    u32 id;
    std::weak_ptr<vcpu::Vcpu> vcpu;  ///< the ID stays taken when the vCPU has gone
  };
  void flush_all_tlbs();
  void offer_to_engine(const kvm_userspace_memory_region& region);
  irqchip::Pit* pit();
  void disable_quirks(u64 quirks);
  int enable_manual_dirty_log(u64 options);
  int create_split_irqchip(u64 reserved_pins);
  template <class Change>
  int change_coalesced_zones(Change change);

  std::mutex mutex_;  ///< vCPU creation, chips, capabilities
  MemorySlots memory_;
  engine::CodeMemory code_memory_;
  std::unique_ptr<os::TimerQueue> timers_;
  std::unique_ptr<paravirt::VmClock> clock_;
  std::unique_ptr<irqchip::ApicBus> apic_bus_;
  std::unique_ptr<irqchip::IrqChips> chips_;
  std::atomic<irqchip::IrqChips*> chips_published_{nullptr};
  std::atomic<bool> local_apics_{false};
  std::unique_ptr<SplitIrqChip> split_;  ///< KVM_CAP_SPLIT_IRQCHIP, in place of chips_
  std::unique_ptr<IrqRouting> routing_;
  std::unique_ptr<IoEventFds> ioeventfds_;
  std::unique_ptr<IrqFds> irqfds_;
  std::vector<Member> vcpus_;
  std::mutex stats_mutex_;
  VmStats stats_;
  u64 disabled_quirks_ = 0;  ///< KVM_X86_QUIRK_*
  u32 boot_cpu_id_ = 0;
  u32 max_vcpu_ids_ = max_vcpu_ids;
  bool max_vcpu_ids_set_ = false;
  std::atomic<u32> default_tsc_khz_;
  std::atomic<bool> exception_payload_{false}, triple_fault_event_{false};
  std::atomic<u64> hypercall_exits_{0};
  std::atomic<bool> hides_platform_info_{false}, halts_in_guest_{false}, exits_on_emulation_failure_{false};
  std::unique_ptr<const MsrFilter> msr_filter_owner_;  ///< under mutex_
  std::atomic<const MsrFilter*> msr_filter_{nullptr};
  std::unique_ptr<const CoalescedZones> coalesced_owner_;  ///< under mutex_
  std::atomic<const CoalescedZones*> coalesced_{nullptr};
  std::atomic<u32> user_space_msrs_{0};
  std::atomic<bool> intercepts_msrs_{false};
};

}  // namespace anykvm::vm
