// See ioapic.h.
#include "irqchip/ioapic.h"

#include <utility>

#include "irqchip/apic_bus.h"

namespace anykvm::irqchip {

namespace {
constexpr u32 select_offset = 0x00, window_offset = 0x10;
constexpr u32 id_register = 0, version_register = 1, arbitration_register = 2, first_entry_register = 0x10;
constexpr u32 version = 0x11;

// Bits of a redirection entry.
constexpr u64 delivery_status = 1 << 12, remote_irr = 1 << 14, trigger_level = 1 << 15, masked = 1 << 16;
constexpr u64 read_only = delivery_status | remote_irr;
}  // namespace

IoApic::IoApic(ApicBus& bus) : bus_(bus) {
  for (u64& entry : entries_) entry = masked;
}

// --- pins ------------------------------------------------------------------------------------------------------------

int IoApic::set_pin(unsigned pin, unsigned source, bool level) {
  const u32 bit = 1u << source;
  sources_[pin] = level ? sources_[pin] | bit : sources_[pin] & ~bit;
  return update_pin(pin, sources_[pin] != 0);
}

int IoApic::update_pin(unsigned pin, bool level) {
  const u32 bit = 1u << pin;
  if (!level) {
    requests_ &= ~bit;
    return 1;
  }
  const bool was_up = requests_ & bit;
  requests_ |= bit;
  if (!level_triggered(pin)) {
    edges_delivered_ &= ~bit;
    if (was_up) return 0;  // no edge
  }
  return deliver(pin);
}

InterruptMessage IoApic::message(unsigned pin) const {
  const u64 entry = entries_[pin];
  return {
      .destination = static_cast<u32>(entry >> 56),
      .vector = static_cast<u8>(entry),
      .mode = static_cast<DeliveryMode>(entry >> 8 & 7),
      .logical = (entry >> 11 & 1) != 0,
      .level_triggered = level_triggered(pin),
  };
}

int IoApic::deliver(unsigned pin) {
  u64& entry = entries_[pin];
  const bool level = level_triggered(pin);
  if (entry & masked || (level && entry & remote_irr)) return -1;
  if (!level) edges_delivered_ |= 1u << pin;
  const int taken = bus_.send(message(pin));
  if (level && taken > 0) entry |= remote_irr;
  return taken;
}

u32 IoApic::eoi(u8 vector, bool level, u32 hold) {
  u32 ended = 0;
  for (unsigned pin = 0; pin < pins; ++pin) {
    if (this->vector(pin) != vector) continue;
    ended |= 1u << pin;
    if (!level || !level_triggered(pin)) continue;
    entries_[pin] &= ~remote_irr;
    if (!(hold >> pin & 1) && requests_ >> pin & 1) deliver(pin);
  }
  return ended;
}

void IoApic::resume(u32 which) {
  for (unsigned pin = 0; pin < pins; ++pin)
    if (which >> pin & 1 && level_triggered(pin) && requests_ >> pin & 1) deliver(pin);
}

// --- registers -------------------------------------------------------------------------------------------------------

u32 IoApic::read(Gpa gpa) const {
  switch (gpa - base_) {
    case select_offset: return select_;
    case window_offset: return read_register();
    default: return 0;
  }
}

void IoApic::write(Gpa gpa, u32 value) {
  switch (gpa - base_) {
    case select_offset: select_ = value & 0xff; break;
    case window_offset: write_register(value); break;
    default: break;
  }
}

u32 IoApic::read_register() const {
  switch (select_) {
    case id_register:
    case arbitration_register: return (id_ & 15) << 24;
    case version_register: return (pins - 1) << 16 | version;
    default: break;
  }
  const u32 index = select_ - first_entry_register;
  if (index / 2 >= pins) return ~0u;
  return static_cast<u32>(entries_[index / 2] >> (index & 1 ? 32 : 0));
}

void IoApic::write_register(u32 value) {
  if (select_ == id_register) id_ = value >> 24 & 15;
  const u32 index = select_ - first_entry_register;
  if (select_ >= first_entry_register && index / 2 < pins) write_entry(index / 2, index & 1, value);
}

void IoApic::write_entry(unsigned pin, bool high, u32 value) {
  const u32 bit = 1u << pin;
  u64& entry = entries_[pin];
  const bool was_masked = entry & masked;
  if (high) {
    entry = u64{value} << 32 | static_cast<u32>(entry);
  } else {
    entry = (entry & (~u64{0xffffffff} | read_only)) | (value & ~read_only);
    // Guests end a level-triggered interrupt by switching the entry to edge and back, for lack of an EOI register.
    if (!level_triggered(pin)) entry &= ~remote_irr;
  }
  const bool is_masked = entry & masked;
  if (was_masked && !is_masked) unmasked_ |= bit;
  if (!level_triggered(pin) || is_masked || !(requests_ & bit) || entry & remote_irr) return;
  if (held_pins_ & bit)
    held_ |= bit;
  else
    deliver(pin);
}

// --- state -----------------------------------------------------------------------------------------------------------

void IoApic::get_state(kvm_ioapic_state& state) const {
  state = {};
  state.base_address = base_;
  state.ioregsel = select_;
  state.id = id_;
  state.irr = requests_ & ~edges_delivered_;
  for (unsigned pin = 0; pin < pins; ++pin) state.redirtbl[pin].bits = entries_[pin];
}

void IoApic::set_state(const kvm_ioapic_state& state) {
  base_ = state.base_address;
  select_ = state.ioregsel & 0xff;
  id_ = state.id & 15;
  for (unsigned pin = 0; pin < pins; ++pin) entries_[pin] = state.redirtbl[pin].bits;
  requests_ = edges_delivered_ = 0;
  for (unsigned pin = 0; pin < pins; ++pin)
    if (state.irr >> pin & 1) update_pin(pin, true);
}

}  // namespace anykvm::irqchip
