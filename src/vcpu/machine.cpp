// What the vCPU is to its CPU, its local APIC and its paravirtual devices: the machine around them.
#include "engine/engine.h"
#include "irqchip/apic_bus.h"
#include "irqchip/irqchip.h"
#include "os/attention.h"
#include "vcpu/vcpu.h"
#include "vm/coalesced_io.h"
#include "vm/ioeventfd.h"
#include "vm/vm.h"

namespace anykvm::vcpu {
namespace {

constexpr u32 msr_apic_base = 0x1b, msr_platform_info = 0xce;
constexpr u64 apic_base_bits =
    irqchip::LocalApic::base_bsp | irqchip::LocalApic::base_x2apic | irqchip::LocalApic::base_enable | 0xfffffffff000;

}  // namespace

x86::HostPage Vcpu::page(Gpa gpa, bool for_write) { return vm_->memory().page(gpa, for_write, slot_hint_); }

unsigned Vcpu::ram(x86::RamRange* out, unsigned most) { return vm_->memory().ranges(out, most); }

u64 Vcpu::ram_version() { return vm_->memory().version(); }

/// In a signal handler: whether the guest's memory is at fault for what happened here.
bool Vcpu::accepts_fault(const void* address) {
  const std::optional<Gpa> gpa = vm_->memory().gpa_of_host(address);
  if (gpa) refused_gpa_ = *gpa;
  return gpa.has_value();
}

bool Vcpu::mmio_read(Gpa gpa, void* data, unsigned length) {
  if (apic_ && apic_->covers(gpa)) {
    apic_->mmio_read(static_cast<u32>(gpa & ~page_mask), data, length);
    return true;
  }
  irqchip::IrqChips* chips = vm_->chips();
  return chips && chips->mmio_read(gpa, data, length);
}

bool Vcpu::mmio_write(Gpa gpa, const void* data, unsigned length) {
  if (apic_ && apic_->covers(gpa)) {
    apic_->mmio_write(static_cast<u32>(gpa & ~page_mask), data, length);
    return true;
  }
  irqchip::IrqChips* chips = vm_->chips();
  return (chips && chips->mmio_write(gpa, data, length)) ||
         vm_->ioeventfds().write(vm::IoEventFds::Bus::mmio, gpa, data, length) || coalesce(false, gpa, data, length);
}

bool Vcpu::pio_in(u16 port, void* data, unsigned size) {
  stats_.add(vm::VcpuStat::io_exits);
  irqchip::IrqChips* chips = vm_->chips();
  return chips && chips->pio_read(port, data, size);
}

bool Vcpu::pio_out(u16 port, const void* data, unsigned size) {
  stats_.add(vm::VcpuStat::io_exits);
  irqchip::IrqChips* chips = vm_->chips();
  return (chips && chips->pio_write(port, data, size)) ||
         vm_->ioeventfds().write(vm::IoEventFds::Bus::pio, port, data, size) || coalesce(true, port, data, size);
}

void Vcpu::own_coalesced_ring() {
  coalesced_ring_ = reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<u8*>(run_) + 2 * page_size);
}

bool Vcpu::coalesce(bool pio, u64 address, const void* data, unsigned length) const {
  const vm::CoalescedZones* zones = vm_->coalesced_zones();
  return zones && coalesced_ring_ && zones->covers(pio, address, length) &&
         vm::put_into_ring(*coalesced_ring_, pio, address, data, length);
}

Vcpu::MsrResult Vcpu::read_msr(u32 index, u64& value) {
  if (vm_->intercepts_msrs()) [[unlikely]]
    return read_filtered_msr(index, value);
  return read_own_msr(index, value);
}

Vcpu::MsrResult Vcpu::write_msr(u32 index, u64 value) {
  if (vm_->intercepts_msrs()) [[unlikely]]
    return write_filtered_msr(index, value);
  return write_own_msr(index, value);
}

/// The MSRs of the APIC and of the paravirtual devices; not_mine: those that are CPU state.
Vcpu::MsrResult Vcpu::read_own_msr(u32 index, u64& value) {
  if (index == msr_platform_info && vm_->hides_platform_info()) return MsrResult::gp;
  if (apic_) {
    if (const MsrResult result = apic_->read_msr(index, value); result != MsrResult::not_mine) return result;
  } else if (index == msr_apic_base) {
    value = apic_base_;
    return MsrResult::ok;
  }
  return paravirt_.read_msr(index, value, x86::Initiator::guest);
}

Vcpu::MsrResult Vcpu::write_own_msr(u32 index, u64 value) {
  if (apic_) {
    if (const MsrResult result = apic_->write_msr(index, value); result != MsrResult::not_mine) return result;
  } else if (index == msr_apic_base) {
    if (value & ~apic_base_bits) return MsrResult::gp;
    apic_base_ = value;
    return MsrResult::ok;
  }
  return paravirt_.write_msr(index, value, x86::Initiator::guest);
}

void Vcpu::cpuid(u32 leaf, u32 subleaf, u32 out[4]) {
  cpu_.cpuid.lookup(leaf, subleaf, cpu_.state, apic_base() & irqchip::LocalApic::base_enable, out);
}

u64 Vcpu::read_cr8() { return apic_ ? apic_->tpr() : cr8_; }

x86::Result Vcpu::write_cr8(u64 value) {
  if (value > 15) return cpu_.gp();
  if (apic_) {
    apic_->set_tpr(value);
    return x86::Result::ok;
  }
  if (value < cr8_) {
    // The client, whose APIC this is, may have an interrupt that gets through now.
    tpr_lowered_ = true;
    os::raise_attention(cpu_.attention);
  }
  cr8_ = value;
  return x86::Result::ok;
}

x86::Result Vcpu::hypercall() {
  stats_.add(vm::VcpuStat::hypercalls);
  return paravirt_.hypercall(vm_->hypercall_exits_enabled());
}

u64 Vcpu::tsc_deadline_ns(u64 guest_tsc) { return paravirt_.monotonic_ns_of_tsc(guest_tsc); }

void Vcpu::ioapic_eoi(u8 vector) {
  ioapic_eoi_ = vector;
  os::raise_attention(cpu_.attention);
}

/// The guest's TSC was set: what the APIC and the clock page derive from it is stale.
void Vcpu::tsc_moved() {
  tsc_offset_seen_ = cpu_.state.tsc_offset;
  paravirt_.tsc_changed();
}

}  // namespace anykvm::vcpu
