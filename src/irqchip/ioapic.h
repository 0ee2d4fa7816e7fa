// The 82093AA I/O APIC: 24 pins that become messages to the local APICs.
// Reference: Intel 82093AA data sheet; api.rst 4.26 KVM_GET_IRQCHIP. Version 0x11 as KVM's, so without an EOI register.
//
// Not thread-safe: IrqChips holds the lock.
#pragma once

#include <atomic>

#include "anykvm/kvm.h"
#include "irqchip/interrupt_message.h"
#include "x86/types.h"

namespace anykvm::irqchip {

class ApicBus;

class IoApic {
 public:
  static constexpr unsigned pins = KVM_IOAPIC_NUM_PINS;
  static constexpr Gpa default_base = 0xfec00000;
  static constexpr u64 window_size = 0x100;

  explicit IoApic(ApicBus& bus);

  bool covers(Gpa gpa) const {  // any thread
    const Gpa base = base_.load(std::memory_order_relaxed);
    return gpa >= base && gpa - base < window_size;
  }
  u32 read(Gpa gpa) const;
  void write(Gpa gpa, u32 value);

  /// A pin changes; `source` names one of the up to 32 parties that share it: the pin is the OR of them.
  /// > 0: how many CPUs the interrupt reached, or that the pin went down; 0: coalesced; -1: masked or waiting for EOI.
  int set_pin(unsigned pin, unsigned source, bool level);

  /// A local APIC ended this vector. Returns the pins it stood for. Level-triggered ones are free again, and interrupt
  /// again at once while their line is still up, unless they are in `hold`: then resume() decides.
  u32 eoi(u8 vector, bool level_triggered, u32 hold);
  /// Delivers from these pins if they are up, level-triggered, unmasked and not waiting for EOI.
  void resume(u32 pins);

  /// Level-triggered pins in `hold` are not delivered when the guest unmasks them while they are up: they are reported
  /// by take_held() instead, to be sampled again and then resumed.
  void set_held_pins(u32 hold) { held_pins_ = hold; }
  u32 take_held() {
    const u32 held = held_;
    held_ = 0;
    return held;
  }
  /// Pins that were unmasked since the last call.
  u32 take_unmasked() {
    const u32 unmasked = unmasked_;
    unmasked_ = 0;
    return unmasked;
  }

  u8 vector(unsigned pin) const { return static_cast<u8>(entries_[pin]); }
  InterruptMessage message(unsigned pin) const;

  void get_state(kvm_ioapic_state& state) const;
  void set_state(const kvm_ioapic_state& state);

 private:
  int update_pin(unsigned pin, bool level);
  int deliver(unsigned pin);
  u32 read_register() const;
  void write_register(u32 value);
  void write_entry(unsigned pin, bool high, u32 value);
  bool level_triggered(unsigned pin) const { return entries_[pin] >> 15 & 1; }

  ApicBus& bus_;
  std::atomic<Gpa> base_{default_base};  ///< the client may move it
  u32 select_ = 0, id_ = 0;
  u32 requests_ = 0;         ///< pins up (level), or with an edge that nothing has lowered yet
  u32 edges_delivered_ = 0;  ///< of requests_: edges that are on their way already; GET_IRQCHIP leaves them out
  u64 entries_[pins];
  u32 sources_[pins] = {};
  u32 held_pins_ = 0, held_ = 0, unmasked_ = 0;
};

}  // namespace anykvm::irqchip
