// The local APIC's registers as the guest reaches them: the xAPIC page and the x2APIC MSRs.
// Reference: SDM volume 3, table 11-1 "Local APIC Register Address Map", table 11-6 "x2APIC Register Address Space".
#include <cstring>

#include "irqchip/apic_bus.h"
#include "irqchip/lapic.h"

namespace anykvm::irqchip {

namespace {
constexpr u32 esr_illegal_register = 1 << 7;
constexpr u32 lvt_masked = 1 << 16;
constexpr u32 lvt_mode = 0x700, lvt_polarity = 1 << 13, lvt_level = 1 << 15;
constexpr u32 icr_busy = 1 << 12;
constexpr u64 x2apic_icr_reserved = 0xfff32000;  // bits 31-20, 17, 16, 13

constexpr u32 msr_apic_base = 0x1b, msr_tsc_deadline = 0x6e0, msr_x2apic_first = 0x800, msr_x2apic_last = 0x8ff;
}  // namespace

bool LocalApic::read_register(u32 offset, u32& value) {
  const auto r = static_cast<Register>(offset);
  if (offset >= static_cast<u32>(Register::isr) && offset < static_cast<u32>(Register::esr)) {
    value = get(r);
    return true;
  }
  switch (r) {
    case Register::id:
    case Register::version:
    case Register::tpr:
    case Register::ppr:
    case Register::ldr:
    case Register::svr:
    case Register::esr:
    case Register::icr:
    case Register::lvt_timer:
    case Register::lvt_thermal:
    case Register::lvt_performance:
    case Register::lvt_lint0:
    case Register::lvt_lint1:
    case Register::lvt_error:
    case Register::initial_count:
    case Register::divide: value = get(r); return true;
    case Register::lvt_cmci: value = get(r); return features_.cmci;
    case Register::current_count: value = current_count(); return true;
    case Register::apr:
    case Register::dfr:
    case Register::icr_high: value = get(r); return !x2apic_mode();
    default: value = 0; return false;
  }
}

bool LocalApic::write_register(u32 offset, u32 value) {
  const auto r = static_cast<Register>(offset);
  const bool x2apic = x2apic_mode();
  switch (r) {
    case Register::id:
      if (x2apic) return false;
      set_id_register(value & 0xff000000);
      return true;
    case Register::tpr:
      set(r, value & 0xff);
      update_ppr();
      wake_if_deliverable();
      return true;
    case Register::eoi:
      if (x2apic && value != 0) return false;
      end_of_interrupt();
      return true;
    case Register::ldr:
      if (x2apic) return false;
      set(r, value & 0xff000000);
      return true;
    case Register::dfr:
      if (x2apic) return false;
      set(r, value | 0x0fffffff);
      return true;
    case Register::svr: write_svr(value); return true;
    case Register::esr:
      if (x2apic && value != 0) return false;
      set(r, errors_.exchange(0));
      return true;
    case Register::icr:  // xAPIC: the x2APIC's is a 64-bit register
      set(r, value & ~icr_busy);
      send_ipi(value & ~icr_busy, get(Register::icr_high) >> 24);
      return true;
    case Register::icr_high:
      if (x2apic) return false;
      set(r, value & 0xff000000);
      return true;
    case Register::lvt_timer:
    case Register::lvt_thermal:
    case Register::lvt_performance:
    case Register::lvt_lint0:
    case Register::lvt_lint1:
    case Register::lvt_error: write_lvt(r, value); return true;
    case Register::lvt_cmci:
      if (!features_.cmci) return false;
      write_lvt(r, value);
      return true;
    case Register::initial_count:
      if (timer_mode() != TimerMode::tsc_deadline) start_count(value, value);
      return true;
    case Register::divide: write_divide(value & 0xb); return true;
    case Register::self_ipi:
      if (!x2apic || value > 0xff) return false;
      send_ipi(static_cast<u32>(Shorthand::self) << 18 | value, 0);
      return true;
    default: return false;  // read-only or reserved
  }
}

void LocalApic::write_svr(u32 value) {
  set(Register::svr, value & (0x3ff | (features_.directed_eoi ? 1 << 12 : 0)));
  if (software_enabled()) return;
  if (features_.cmci) set(Register::lvt_cmci, get(Register::lvt_cmci) | lvt_masked);
  for (unsigned i = 0; i < 6; ++i) set(Register::lvt_timer, get(Register::lvt_timer, i) | lvt_masked, i);
  client_.wake();  // the PIC may have lost its way in through LINT0
}

void LocalApic::write_lvt(Register r, u32 value) {
  if (!software_enabled()) value |= lvt_masked;
  u32 writable = lvt_masked | 0xff;
  switch (r) {
    case Register::lvt_timer: writable |= features_.tsc_deadline ? 3 << 17 : 1 << 17; break;
    case Register::lvt_cmci:
    case Register::lvt_thermal:
    case Register::lvt_performance: writable |= lvt_mode; break;
    case Register::lvt_lint0:
    case Register::lvt_lint1: writable |= lvt_mode | lvt_polarity | lvt_level; break;
    default: break;
  }
  const TimerMode mode_before = timer_mode();
  set(r, value & writable);
  if (r == Register::lvt_timer) timer_mode_changed(mode_before);
  if (r == Register::lvt_lint0) client_.wake();  // the PIC's INTR may be up
}

bool LocalApic::write_x2apic_icr(u64 value) {
  if (value & x2apic_icr_reserved) return false;
  const u32 low = static_cast<u32>(value) & ~icr_busy;
  set(Register::icr, low);
  set(Register::icr_high, static_cast<u32>(value >> 32));
  send_ipi(low, static_cast<u32>(value >> 32));
  return true;
}

// --- the page --------------------------------------------------------------------------------------------------------

void LocalApic::mmio_read(u32 offset, void* data, unsigned length) {
  if (!hardware_enabled() || x2apic_mode()) {
    std::memset(data, 0xff, length);
    return;
  }
  sync_pv_eoi();
  if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
  std::memset(data, 0, length);
  offset &= 0xfff;
  if ((offset & 15) + length > 4) return;
  u32 value;
  if (read_register(offset & ~15u, value))
    std::memcpy(data, reinterpret_cast<const u8*>(&value) + (offset & 15), length);
  else if (static_cast<Register>(offset) != Register::eoi)
    report_error(esr_illegal_register);
}

void LocalApic::mmio_write(u32 offset, const void* data, unsigned length) {
  if (!hardware_enabled() || x2apic_mode()) return;
  sync_pv_eoi();
  if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
  offset &= 0xfff;
  if (length != 4 || offset & 15) return;  // registers are 32 bits wide, whole and aligned
  u32 value;
  std::memcpy(&value, data, sizeof value);
  if (!write_register(offset, value)) report_error(esr_illegal_register);
}

// --- MSRs ------------------------------------------------------------------------------------------------------------

LocalApic::MsrResult LocalApic::read_msr(u32 index, u64& value, bool /*by_client*/) {
  switch (index) {
    case msr_apic_base: value = base(); return MsrResult::ok;
    case msr_tsc_deadline:
      if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
      value = hardware_enabled() && timer_mode() == TimerMode::tsc_deadline ? tsc_deadline_ : 0;
      return MsrResult::ok;
    default: break;
  }
  if (index < msr_x2apic_first || index > msr_x2apic_last) return MsrResult::not_mine;
  if (!x2apic_mode()) return MsrResult::gp;
  sync_pv_eoi();
  if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
  const u32 offset = (index - msr_x2apic_first) << 4;
  u32 low = 0;
  if (!read_register(offset, low)) return MsrResult::gp;
  value = low;
  if (static_cast<Register>(offset) == Register::icr) value |= u64{get(Register::icr_high)} << 32;
  return MsrResult::ok;
}

LocalApic::MsrResult LocalApic::write_msr(u32 index, u64 value, bool by_client) {
  switch (index) {
    case msr_apic_base: {
      const bool from_x2apic = x2apic_mode(), from_disabled = !hardware_enabled();
      const bool to_x2apic = value & base_x2apic, to_disabled = !(value & base_enable);
      if (!by_client && ((from_x2apic && !to_x2apic && !to_disabled) || (from_disabled && to_x2apic)))
        return MsrResult::gp;
      return set_base(value) == 0 ? MsrResult::ok : MsrResult::gp;
    }
    case msr_tsc_deadline:
      if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
      if (hardware_enabled() && timer_mode() == TimerMode::tsc_deadline) start_tsc_deadline(value);
      return MsrResult::ok;
    default: break;
  }
  if (index < msr_x2apic_first || index > msr_x2apic_last) return MsrResult::not_mine;
  if (!x2apic_mode()) return MsrResult::gp;
  sync_pv_eoi();
  if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
  const u32 offset = (index - msr_x2apic_first) << 4;
  if (static_cast<Register>(offset) == Register::icr) return write_x2apic_icr(value) ? MsrResult::ok : MsrResult::gp;
  if (value >> 32) return MsrResult::gp;
  return write_register(offset, static_cast<u32>(value)) ? MsrResult::ok : MsrResult::gp;
}

}  // namespace anykvm::irqchip
