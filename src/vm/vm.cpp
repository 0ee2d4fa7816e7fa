#include "vm/vm.h"

#include <linux/kvm_para.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "engine/engine.h"
#include "irqchip/apic_bus.h"
#include "irqchip/irqchip.h"
#include "os/client_ram.h"
#include "os/seccomp.h"
#include "os/timer_queue.h"
#include "os/tsc.h"
#include "paravirt/clock.h"
#include "vcpu/vcpu.h"
#include "vm/coalesced_io.h"
#include "vm/ioeventfd.h"
#include "vm/irq_routing.h"
#include "vm/irqfd.h"
#include "vm/msr_filter.h"
#include "vm/split_irqchip.h"

namespace anykvm::vm {

Vm::Vm()
    : memory_([this] { flush_all_tlbs(); }),
      timers_(std::make_unique<os::TimerQueue>()),
      clock_(std::make_unique<paravirt::VmClock>()),
      apic_bus_(std::make_unique<irqchip::ApicBus>()),
      routing_(std::make_unique<IrqRouting>(*apic_bus_)),
      ioeventfds_(std::make_unique<IoEventFds>()),
      irqfds_(std::make_unique<IrqFds>(*routing_)),
      default_tsc_khz_(os::host_tsc_khz()) {}

Vm::~Vm() = default;

int Vm::create(unsigned long type, std::shared_ptr<Vm>& out) {
  if (type != 0) return -EINVAL;
  out.reset(new Vm);
  return 0;
}

// --- memory -------------------------------------------------------------------------------------------------------

int Vm::set_user_memory_region(const kvm_userspace_memory_region& region) {
  const int result = memory_.set_region(region);
  if (result == 0 && region.memory_size && !(region.flags & KVM_MEM_READONLY)) offer_to_engine(region);
  return result;
}

/// Other processes can map what is in a file.
void Vm::offer_to_engine(const kvm_userspace_memory_region& region) {
  engine::Kind kind{};
  if (!engine::default_kind(kind) || kind != engine::Kind::direct || os::seccomp_filter_added()) return;
  bool has_run = false;
  for_each_vcpu([&](vcpu::Vcpu& vcpu) { has_run |= vcpu.has_run(); });
  os::share_client_ram(reinterpret_cast<u8*>(region.userspace_addr), region.memory_size, has_run);
}

int Vm::set_user_memory_region2(const kvm_userspace_memory_region2& region) {
  // Without guest_memfd nothing but the flag for it tells the two apart, and that flag is refused.
  return set_user_memory_region(
      {region.slot, region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr});
}

int Vm::get_dirty_log(const kvm_dirty_log& log) { return memory_.get_dirty_log(log); }
int Vm::clear_dirty_log(const kvm_clear_dirty_log& log) { return memory_.clear_dirty_log(log); }

/// How much the kernel's shadow MMU may use. Nothing here grows with the guest.
int Vm::set_nr_mmu_pages(u64 pages) { return pages < 64 ? -EINVAL : 0; }

void Vm::flush_all_tlbs() {
  u64 asked = 0;
  for_each_vcpu([&](vcpu::Vcpu& vcpu) {
    vcpu.flush_tlb_and_wait();
    ++asked;
  });
  std::lock_guard lock(stats_mutex_);
  stats_.add(VmStat::remote_tlb_flush_requests);
  if (asked) stats_.add(VmStat::remote_tlb_flush);
}

/// Where Intel CPUs without unrestricted guest mode need three pages. Nothing here does.
int Vm::set_tss_addr(u64 address) { return address > 0xffffd000 ? -EINVAL : 0; }

int Vm::set_identity_map_addr(u64) {
  std::lock_guard lock(mutex_);
  return vcpus_.empty() ? 0 : -EINVAL;
}

// --- vCPUs --------------------------------------------------------------------------------------------------------

int Vm::create_vcpu(u32 id, kvm_run* run, std::shared_ptr<vcpu::Vcpu>& out) {
  std::lock_guard lock(mutex_);
  if (id >= max_vcpu_ids_ || vcpus_.size() >= max_vcpus) return -EINVAL;
  if (std::ranges::find(vcpus_, id, &Member::id) != vcpus_.end()) return -EEXIST;
  auto vcpu = std::make_shared<vcpu::Vcpu>(shared_from_this(), id, run);
  if (vcpus_.empty()) vcpu->own_coalesced_ring();
  vcpu->set_disabled_quirks(disabled_quirks_);
  vcpus_.push_back({id, vcpu});
  out = std::move(vcpu);
  return 0;
}

std::vector<std::shared_ptr<vcpu::Vcpu>> Vm::vcpus() {
  std::vector<std::shared_ptr<vcpu::Vcpu>> alive;
  std::lock_guard lock(mutex_);
  alive.reserve(vcpus_.size());
  for (const Member& member : vcpus_)
    if (std::shared_ptr<vcpu::Vcpu> vcpu = member.vcpu.lock()) alive.push_back(std::move(vcpu));
  return alive;
}

int Vm::set_boot_cpu_id(u64 id) {
  std::lock_guard lock(mutex_);
  if (!vcpus_.empty()) return -EBUSY;
  if (id > max_vcpu_ids_) return -EINVAL;
  boot_cpu_id_ = static_cast<u32>(id);
  return 0;
}

// --- interrupts ---------------------------------------------------------------------------------------------------

int Vm::create_irqchip() {
  std::lock_guard lock(mutex_);
  if (local_apics_.load()) return -EEXIST;
  if (!vcpus_.empty()) return -EINVAL;
  chips_ = std::make_unique<irqchip::IrqChips>(*apic_bus_);
  routing_->attach(*chips_);
  // From here on local APICs may arm timers, whose thread a seccomp filter might forbid later.
  timers_->start();
  chips_published_.store(chips_.get(), std::memory_order_release);
  local_apics_.store(true, std::memory_order_release);
  return 0;
}

/// Local APICs here, PIC and I/O APIC in the client, which says of how many GSIs it wants to hear the EOIs.
int Vm::create_split_irqchip(u64 reserved_pins) {
  if (reserved_pins > IrqRouting::max_routes) return -EINVAL;
  if (local_apics_.load() || !vcpus_.empty()) return -EEXIST;
  split_ = std::make_unique<SplitIrqChip>(*apic_bus_, static_cast<u32>(reserved_pins));
  timers_->start();
  local_apics_.store(true, std::memory_order_release);
  return 0;
}

int Vm::get_irqchip(kvm_irqchip& chip) { return chips() ? chips()->get_state(chip) : -ENXIO; }
int Vm::set_irqchip(const kvm_irqchip& chip) { return chips() ? chips()->set_state(chip) : -ENXIO; }

int Vm::create_pit2(const kvm_pit_config& config) {
  std::lock_guard lock(mutex_);
  if (chips_ && chips_->pit()) return -EEXIST;
  if (!chips_) return -ENOENT;
  return chips_->create_pit(*timers_, *routing_, config.flags);
}

int Vm::create_pit() { return create_pit2({.flags = KVM_PIT_SPEAKER_DUMMY}); }

irqchip::Pit* Vm::pit() { return chips() ? chips()->pit() : nullptr; }

int Vm::get_pit(kvm_pit_state& state) {
  kvm_pit_state2 both;
  if (const int error = get_pit2(both)) return error;
  std::ranges::copy(both.channels, state.channels);
  return 0;
}

int Vm::set_pit(const kvm_pit_state& state) {
  kvm_pit_state2 both;
  if (const int error = get_pit2(both)) return error;
  std::ranges::copy(state.channels, both.channels);
  return set_pit2(both);
}

int Vm::get_pit2(kvm_pit_state2& state) {
  if (!pit()) return -ENXIO;
  pit()->get_state(state);
  return 0;
}

int Vm::set_pit2(const kvm_pit_state2& state) {
  if (!pit()) return -ENXIO;
  pit()->set_state(state);
  return 0;
}

int Vm::reinject_control(const kvm_reinject_control& control) {
  if (!pit()) return -ENXIO;
  pit()->set_reinject(control.pit_reinject != 0);
  return 0;
}

int Vm::irq_line(const kvm_irq_level& level) {
  if (!has_local_apics()) return -ENXIO;
  routing_->set_irq(level.irq, level.level != 0);
  return 0;
}

int Vm::irq_line_status(kvm_irq_level& level) {
  if (!has_local_apics()) return -ENXIO;
  level.status = routing_->set_irq(level.irq, level.level != 0);
  return 0;
}

int Vm::set_gsi_routing(u32 flags, std::span<const kvm_irq_routing_entry> entries) {
  if (!has_local_apics()) return -EINVAL;
  if (const int error = routing_->set_gsi_routing(flags, entries)) return error;
  if (split_) split_->routes_changed(entries);
  return 0;
}

int Vm::signal_msi(const kvm_msi& msi) { return has_local_apics() ? routing_->signal_msi(msi) : -EINVAL; }

int Vm::irqfd(const kvm_irqfd& args) {
  if (!(args.flags & KVM_IRQFD_FLAG_DEASSIGN)) {
    if (!has_local_apics()) return -EAGAIN;
    if (!chips() && args.flags & KVM_IRQFD_FLAG_RESAMPLE) return -EINVAL;  // the EOI is the client's to see
  }
  return irqfds_->ioctl(args);
}

int Vm::ioeventfd(const kvm_ioeventfd& args) { return ioeventfds_->ioctl(args); }

template <class Change>
int Vm::change_coalesced_zones(Change change) {
  std::unique_ptr<const CoalescedZones> old;
  {
    std::lock_guard lock(mutex_);
    auto next =
        coalesced_owner_ ? std::make_unique<CoalescedZones>(*coalesced_owner_) : std::make_unique<CoalescedZones>();
    if (const int error = change(*next)) return error;
    if (next->empty()) next.reset();
    coalesced_.store(next.get(), std::memory_order_seq_cst);
    old = std::exchange(coalesced_owner_, std::move(next));
  }
  flush_all_tlbs();  // when it returns, no vCPU reads the old one
  return 0;
}

int Vm::register_coalesced_mmio(const kvm_coalesced_mmio_zone& zone) {
  constexpr std::size_t max_zones = 1000;  // what a kernel's I/O bus holds
  if (zone.pio > 1) return -EINVAL;
  return change_coalesced_zones([&](CoalescedZones& zones) {
    if (zones.size() >= max_zones) return -ENOSPC;
    zones.add(zone);
    return 0;
  });
}

int Vm::unregister_coalesced_mmio(const kvm_coalesced_mmio_zone& zone) {
  if (zone.pio > 1) return -EINVAL;
  return change_coalesced_zones([&](CoalescedZones& zones) {
    zones.remove(zone);
    return 0;
  });
}

// --- time ---------------------------------------------------------------------------------------------------------

int Vm::get_clock(kvm_clock_data& clock) { return clock_->get_clock(clock); }

int Vm::set_clock(const kvm_clock_data& clock) {
  if (const int error = clock_->set_clock(clock)) return error;
  for_each_vcpu([](vcpu::Vcpu& vcpu) { vcpu.clock_changed(); });
  return 0;
}

int Vm::get_tsc_khz() { return static_cast<int>(default_tsc_khz_.load(std::memory_order_relaxed)); }

int Vm::set_tsc_khz(u32 khz) {
  default_tsc_khz_.store(khz ? khz : os::host_tsc_khz(), std::memory_order_relaxed);
  return 0;
}

// --- capabilities -------------------------------------------------------------------------------------------------

int Vm::enable_manual_dirty_log(u64 options) {
  constexpr u64 all = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
  if (options & ~(options & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE ? all : u64{KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}))
    return -EINVAL;
  memory_.set_manual_dirty_log(static_cast<u32>(options));
  return 0;
}

int Vm::enable_cap(const kvm_enable_cap& cap) {
  if (cap.flags) return -EINVAL;
  const u64 value = cap.args[0];
  // MemorySlots' own lock is taken before mutex_ where a change of the slots flushes the vCPUs' TLBs.
  if (cap.cap == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) return enable_manual_dirty_log(value);
  std::lock_guard lock(mutex_);
  switch (cap.cap) {
    case KVM_CAP_EXCEPTION_PAYLOAD: exception_payload_.store(value != 0); return 0;
    case KVM_CAP_X86_TRIPLE_FAULT_EVENT: triple_fault_event_.store(value != 0); return 0;
    case KVM_CAP_EXIT_HYPERCALL:
      if (value & ~(1ull << KVM_HC_MAP_GPA_RANGE)) return -EINVAL;
      hypercall_exits_.store(value);
      return 0;
    case KVM_CAP_X2APIC_API:
      if (value & ~(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)) return -EINVAL;
      if (value & KVM_X2APIC_API_USE_32BIT_IDS) apic_bus_->set_x2apic_format(true);
      if (value & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) apic_bus_->disable_broadcast_quirk();
      return 0;
    case KVM_CAP_MAX_VCPU_ID:
      if (value > max_vcpu_ids || boot_cpu_id_ > value) return -EINVAL;
      if (max_vcpu_ids_set_) return max_vcpu_ids_ == value ? 0 : -EINVAL;
      if (value == 0) return 0;
      max_vcpu_ids_ = static_cast<u32>(value);
      max_vcpu_ids_set_ = true;
      return 0;
    case KVM_CAP_DISABLE_QUIRKS2:
      if (value & ~quirks) return -EINVAL;
      [[fallthrough]];
    case KVM_CAP_DISABLE_QUIRKS: disable_quirks(value & quirks); return 0;
    case KVM_CAP_MSR_PLATFORM_INFO: hides_platform_info_.store(value == 0); return 0;
    case KVM_CAP_X86_APIC_BUS_CYCLES_NS:
      // The longest count, divided by 128, must be a number of ns.
      if (value == 0 || value > ~0ull / (0xffffffffull * 128)) return -EINVAL;
      if (!local_apics_.load()) return -ENXIO;
      if (!vcpus_.empty()) return -EINVAL;
      apic_bus_->set_bus_cycle_ns(value);
      return 0;
    case KVM_CAP_SPLIT_IRQCHIP: return create_split_irqchip(value);
    case KVM_CAP_X86_USER_SPACE_MSR:
      if (value & ~u64{KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER})
        return -EINVAL;
      user_space_msrs_.store(static_cast<u32>(value));
      intercepts_msrs_.store(value != 0 || msr_filter_owner_);
      return 0;
    case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
      if (value > 1) return -EINVAL;
      exits_on_emulation_failure_.store(value != 0);
      return 0;
    case KVM_CAP_X86_DISABLE_EXITS:
      // PAUSE and C-states never exit; MWAIT is as on a host that cannot leave it to the guest.
      if (value & ~u64{KVM_X86_DISABLE_VALID_EXITS}) return -EINVAL;
      if (value & KVM_X86_DISABLE_EXITS_HLT) halts_in_guest_.store(true);
      return 0;
    case KVM_CAP_HALT_POLL: return value >> 32 ? -EINVAL : 0;  // a halt never polls, so that any limit is kept
    default: return -EINVAL;
  }
}

int Vm::x86_set_msr_filter(const kvm_msr_filter& filter) {
  std::unique_ptr<const MsrFilter> next;
  if (const int error = MsrFilter::create(filter, next)) return error;
  {
    std::lock_guard lock(mutex_);
    msr_filter_.store(next.get(), std::memory_order_seq_cst);
    msr_filter_owner_.swap(next);
    intercepts_msrs_.store(msr_filter_owner_ || user_space_msrs_.load() != 0);
  }
  flush_all_tlbs();  // when it returns, no vCPU reads the old one
  return 0;
}

/// With mutex_ held.
void Vm::disable_quirks(u64 disabled) {
  disabled_quirks_ |= disabled;
  if (disabled & KVM_X86_QUIRK_LINT0_REENABLED) apic_bus_->disable_lint0_quirk();
  if (disabled & KVM_X86_QUIRK_LAPIC_MMIO_HOLE) apic_bus_->disable_mmio_hole_quirk();
  for (const Member& member : vcpus_)
    if (const std::shared_ptr<vcpu::Vcpu> vcpu = member.vcpu.lock()) vcpu->set_disabled_quirks(disabled_quirks_);
}

namespace {
std::string stats_id() { return "kvm-" + std::to_string(getpid()); }
}  // namespace

int Vm::get_stats_fd() {
  std::lock_guard lock(stats_mutex_);
  return stats_.open(stats_id());
}

void Vm::publish_stats(os::Mapping page) { stats_.publish(std::move(page), stats_id()); }

/// No kind of device is made this way on x86 but VFIO's file, which this is built without.
int Vm::create_device(const kvm_create_device&) { return -ENODEV; }

}  // namespace anykvm::vm
