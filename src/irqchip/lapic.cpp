// The local APIC: modes, priorities, delivery and acknowledgement. Registers are in lapic_registers.cpp, the timer in
// lapic_timer.cpp, KVM_GET/SET_LAPIC in lapic_state.cpp.
// Reference: SDM volume 3, 11.4 "Local APIC", 11.8 "Handling Interrupts".
#include "irqchip/lapic.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include "irqchip/apic_bus.h"

namespace anykvm::irqchip {

namespace {
constexpr u32 esr_send_illegal_vector = 1 << 5, esr_receive_illegal_vector = 1 << 6;
constexpr u32 lvt_masked = 1 << 16;
constexpr u32 lint0_ext_int = 0x700;
constexpr u8 first_legal_vector = 16;
}  // namespace

LocalApic::LocalApic(u32 id, ApicClient& client, ApicBus& bus, os::TimerQueue& timers, bool is_bsp)
    : id_(id),
      client_(client),
      bus_(bus),
      is_bsp_(is_bsp),
      base_(default_base | base_enable | (is_bsp ? base_bsp : 0)),
      timer_(timers, &LocalApic::timer_expired, this) {
  for (std::atomic<u32>& reg : registers_) reg.store(0, std::memory_order_relaxed);
  reset();
  bus_.add(*this);
}

LocalApic::~LocalApic() {
  bus_.remove(*this);
  timer_.cancel();
  if (id_moved_) bus_.moved_ids_.fetch_sub(1);
}

void LocalApic::reset() {
  base_.store(default_base | base_enable | (is_bsp_ ? base_bsp : 0), std::memory_order_relaxed);
  reset_registers();
  set(Register::ldr, 0);
  set_id_register(id_ << 24);
}

void LocalApic::init() { reset_registers(); }

void LocalApic::reset_registers() {
  stop_timer();
  tsc_deadline_ = 0;
  pv_eoi_offered_ = false;  // the word in guest memory stays as it is: there is no interrupt to end
  set_features(features_);  // the version register
  set(Register::lvt_cmci, features_.cmci ? lvt_masked : 0);
  for (unsigned i = 0; i < 6; ++i) set(Register::lvt_timer, lvt_masked, i);
  if (is_bsp_ && bus_.has_lint0_quirk()) set(Register::lvt_lint0, lint0_ext_int);
  set(Register::dfr, ~0u);
  set(Register::svr, 0xff);
  set(Register::tpr, 0);
  if (!x2apic_mode()) set(Register::ldr, 0);
  for (Register r : {Register::esr, Register::icr, Register::icr_high, Register::divide, Register::initial_count})
    set(r, 0);
  for (Register r : {Register::irr, Register::isr, Register::tmr})
    for (unsigned word = 0; word < 8; ++word) set(r, 0, word);
  events_.store(0);
  errors_.store(0);
  update_ppr();
}

void LocalApic::set_features(const ApicFeatures& features) {
  if (features.cmci != features_.cmci) set(Register::lvt_cmci, features.cmci ? lvt_masked : 0);
  features_ = features;
  set(Register::version, (features.cmci ? 0x60014 : 0x50014) | (features.directed_eoi ? 1 << 24 : 0));
}

// --- modes -----------------------------------------------------------------------------------------------------------

void LocalApic::set_id_register(u32 value) {
  set(Register::id, value);
  const bool moved = !x2apic_mode() && value >> 24 != id_;
  if (moved == id_moved_) return;
  id_moved_ = moved;
  moved ? bus_.moved_ids_.fetch_add(1) : bus_.moved_ids_.fetch_sub(1);
}

int LocalApic::set_base(u64 value) {
  u64 reserved = ~u64{0} << features_.physical_address_bits | 0x2ff;
  if (!features_.x2apic) reserved |= base_x2apic;
  if (value & reserved || (value & base_x2apic && !(value & base_enable))) return -EINVAL;
  change_base(value);
  return 0;
}

void LocalApic::change_base(u64 value) {
  const u64 changed = base() ^ value;
  base_.store(value, std::memory_order_relaxed);
  if (changed & base_enable && value & base_enable) set_id_register(id_ << 24);
  if (changed & base_x2apic) {
    if (value & base_x2apic) {
      set_id_register(id_);
      set(Register::ldr, x2apic_ldr(id_));
    } else if (value & base_enable) {
      set_id_register(id_ << 24);
    }
  }
  if (changed) client_.wake();  // what may be taken has changed: the APIC's interrupts, or the PIC's
}

// --- interrupts in ---------------------------------------------------------------------------------------------------

int LocalApic::highest(Register r) const {
  for (unsigned word = 8; word-- != 0;)
    if (const u32 bits = get(r, word)) return static_cast<int>(word * 32 + std::bit_width(bits) - 1);
  return -1;
}

void LocalApic::set_irr(u8 vector, bool level_triggered) {
  const u32 bit = 1u << (vector % 32);
  std::atomic<u32>& tmr = registers_[slot(Register::tmr, vector / 32)];
  if (((tmr.load(std::memory_order_relaxed) & bit) != 0) != level_triggered)
    level_triggered ? tmr.fetch_or(bit) : tmr.fetch_and(~bit);
  registers_[slot(Register::irr, vector / 32)].fetch_or(bit);
  events_.fetch_or(1u << (vector / 32));  // after the IRR: acknowledge() clears in the opposite order
}

bool LocalApic::accept(const InterruptMessage& message) {
  told_.store(true, std::memory_order_release);
  return take(message);
}

bool LocalApic::take(const InterruptMessage& message) {
  switch (message.mode) {
    case DeliveryMode::fixed:
    case DeliveryMode::lowest_priority:
      if ((message.level_triggered && !message.assert) || !enabled()) return false;
      if (message.vector < first_legal_vector) {
        report_error(esr_receive_illegal_vector);
        return false;
      }
      set_irr(message.vector, message.level_triggered);
      client_.wake();
      return true;
    case DeliveryMode::smi: client_.signal_smi(); return true;
    case DeliveryMode::remote_read: client_.signal_unhalt(); return true;
    case DeliveryMode::nmi: client_.signal_nmi(); return true;
    case DeliveryMode::init:
      if (message.level_triggered && !message.assert) return false;
      client_.signal_init();
      return true;
    case DeliveryMode::start_up: client_.signal_sipi(message.vector); return true;
    case DeliveryMode::ext_int: return false;  // INTR reaches the CPU through takes_pic_output()
  }
  return false;
}

bool LocalApic::deliver_lvt(Register lvt) {
  const u32 entry = get(lvt);
  if (!hardware_enabled() || entry & lvt_masked) return false;
  const u8 vector = static_cast<u8>(entry);
  const bool has_mode = lvt != Register::lvt_timer && lvt != Register::lvt_error;
  const auto mode = has_mode ? static_cast<DeliveryMode>(entry >> 8 & 7) : DeliveryMode::fixed;
  if (mode == DeliveryMode::fixed && vector < first_legal_vector) {
    errors_.fetch_or(esr_receive_illegal_vector);  // without an error interrupt, which may be what failed
    return false;
  }
  return take({.vector = vector, .mode = mode});
}

void LocalApic::report_error(u32 bit) {
  errors_.fetch_or(bit);
  deliver_lvt(Register::lvt_error);
}

void LocalApic::send_ipi(u32 icr_low, u32 destination) {
  const InterruptMessage message{
      .destination = destination,
      .vector = static_cast<u8>(icr_low),
      .mode = static_cast<DeliveryMode>(icr_low >> 8 & 7),
      .shorthand = static_cast<Shorthand>(icr_low >> 18 & 3),
      .logical = (icr_low >> 11 & 1) != 0,
      .level_triggered = (icr_low >> 15 & 1) != 0,
      .assert = (icr_low >> 14 & 1) != 0,
  };
  const bool has_vector = message.mode == DeliveryMode::fixed || message.mode == DeliveryMode::lowest_priority;
  if (has_vector && message.vector < first_legal_vector) return report_error(esr_send_illegal_vector);
  bus_.send(message, this);
}

// --- interrupts into the CPU -----------------------------------------------------------------------------------------

void LocalApic::update_ppr() {
  const u8 task = static_cast<u8>(get(Register::tpr));
  const int in_service = highest(Register::isr);
  const u8 service = in_service < 0 ? 0 : static_cast<u8>(in_service & 0xf0);
  ppr_ = (task & 0xf0) >= service ? task : service;
  set(Register::ppr, ppr_);
}

int LocalApic::deliverable() const {
  const u32 words = events_.load(std::memory_order_acquire) & 0xff;
  if (words == 0 || !hardware_enabled()) return -1;
  const int vector = highest(Register::irr);
  return vector >= 0 && (vector & 0xf0) > (ppr_ & 0xf0) ? vector : -1;
}

int LocalApic::pending() {
  if (pv_eoi_offered_) sync_pv_eoi();
  const u32 events = events_.load(std::memory_order_acquire);
  if (events == 0) return -1;
  if (events & timer_event) take_timer_event();
  return deliverable();
}

int LocalApic::acknowledge() {
  const int vector = pending();
  if (vector < 0) return -1;
  const unsigned word = static_cast<unsigned>(vector) / 32;
  const u32 bit = 1u << (vector % 32);
  std::atomic<u32>& irr = registers_[slot(Register::irr, word)];
  if ((irr.fetch_and(~bit) & ~bit) == 0) {
    events_.fetch_and(~(1u << word));
    if (irr.load() != 0) events_.fetch_or(1u << word);  // one arrived in between
  }
  set(Register::isr, get(Register::isr, word) | bit, word);
  update_ppr();
  if (pv_eoi_) offer_pv_eoi(static_cast<u8>(vector));
  return vector;
}

bool LocalApic::takes_pic_output() const {
  return !hardware_enabled() || (get(Register::lvt_lint0) & (lvt_masked | 0x700)) == lint0_ext_int;
}

void LocalApic::set_tpr(u64 cr8) { set_tpr_register(static_cast<u8>((cr8 & 15) << 4)); }

void LocalApic::set_tpr_register(u8 tpr) {
  if (pv_eoi_offered_) sync_pv_eoi();
  set(Register::tpr, tpr);
  update_ppr();
  wake_if_deliverable();
}

void LocalApic::wake_if_deliverable() {
  if (deliverable() >= 0) client_.wake();
}

bool LocalApic::has_page() const { return (hardware_enabled() && !x2apic_mode()) || bus_.has_mmio_hole_quirk(); }

u32 LocalApic::vapic_word() const {
  const u32 isr = static_cast<u32>(std::max(highest(Register::isr), 0));
  const u32 irr = static_cast<u32>(std::max(highest(Register::irr), 0));
  return (get(Register::tpr) & 0xff) | (isr & 0xf0) << 8 | irr << 24;
}

void LocalApic::end_of_interrupt() {
  const int highest_vector = highest(Register::isr);
  if (highest_vector < 0) return;  // guests write EOI without an interrupt, too
  const u8 vector = static_cast<u8>(highest_vector);
  set(Register::isr, get(Register::isr, vector / 32) & ~(1u << (vector % 32)), vector / 32);
  update_ppr();
  if (timer_mode() == TimerMode::periodic && vector == static_cast<u8>(get(Register::lvt_timer)))
    last_eoi_ns_.store(os::monotonic_ns(), std::memory_order_relaxed);

  const bool level_triggered = test_vector(Register::tmr, vector);
  const bool suppressed = level_triggered && get(Register::svr) >> 12 & 1;
  if (EoiSink* sink = bus_.eoi_sink(); sink && !suppressed && (level_triggered || sink->wants_edge_eoi(vector)))
    sink->eoi(vector, level_triggered, client_);
  wake_if_deliverable();
}

// --- paravirtual EOI -------------------------------------------------------------------------------------------------

void LocalApic::set_pv_eoi(PvEoi* hook) {
  sync_pv_eoi();
  pv_eoi_ = hook;
}

void LocalApic::offer_pv_eoi(u8 vector) {
  // Only when the EOI has no effect but to clear the bit: nothing waits for it, here or in a chip.
  const EoiSink* sink = bus_.eoi_sink();
  if (events_.load(std::memory_order_relaxed) != 0 || test_vector(Register::tmr, vector) ||
      (sink && sink->wants_edge_eoi(vector)))
    return;
  pv_eoi_offered_ = pv_eoi_->offer();
}

void LocalApic::sync_pv_eoi() {
  if (!pv_eoi_offered_) return;
  pv_eoi_offered_ = false;
  if (!pv_eoi_->withdraw()) end_of_interrupt();
}

}  // namespace anykvm::irqchip
