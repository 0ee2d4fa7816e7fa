// One function of a PCI device: its configuration space and its memory BARs. (PCI Local Bus 3.0, chapter 6.)
#pragma once

#include <array>
#include <span>

#include "x86/types.h"

namespace anykvm::vmm {

class PciFunction;

/// What a function holds of the bus: its interrupt pin.
class PciInterrupts {
 public:
  virtual ~PciInterrupts() = default;
  /// Drives INTA# of the function in `slot`. Any thread.
  virtual void set_pin(unsigned slot, bool level) = 0;
};

struct PciIdentity {
  u16 vendor, device;
  u32 class_code;  ///< base class, subclass, programming interface: 24 bits
  u8 revision = 0;
  u16 subsystem_vendor = 0, subsystem = 0;
};

/// Configuration accesses and BAR accesses come from the bus, one at a time for configuration; BARs guard themselves.
class PciFunction {
 public:
  static constexpr unsigned bar_count = 6;

  explicit PciFunction(const PciIdentity& identity);
  virtual ~PciFunction() = default;
  PciFunction(const PciFunction&) = delete;
  PciFunction& operator=(const PciFunction&) = delete;

  /// An access to configuration space that does not cross a doubleword.
  virtual void read_config(unsigned offset, std::span<u8> data);
  virtual void write_config(unsigned offset, std::span<const u8> data);

  /// A memory access that falls into BAR `bar`.
  virtual void read_bar(unsigned /*bar*/, u64 /*offset*/, std::span<u8> /*data*/) {}
  virtual void write_bar(unsigned /*bar*/, u64 /*offset*/, std::span<const u8> /*data*/) {}

  /// The BAR that `gpa` falls into, or -1; `offset` is then where. Only while memory space is enabled.
  int find_bar(Gpa gpa, u64& offset) const;

  void connect(PciInterrupts& interrupts, unsigned slot) { interrupts_ = &interrupts, slot_ = slot; }

 protected:
  u8 config8(unsigned offset) const { return config_[offset]; }
  u32 config32(unsigned offset) const;
  /// Sets what a read gives.
  void set_config(unsigned offset, u64 value, unsigned bytes);
  /// Makes the set bits of `mask` writable by the guest.
  void allow_writes(unsigned offset, u32 mask, unsigned bytes);
  /// A 32-bit memory BAR; `size` is a power of two of 16 bytes or more.
  void add_memory_bar(unsigned bar, u32 size);
  /// The function has an interrupt, on INTA#.
  void use_interrupt_pin();
  /// Appends a capability (its bytes from the third on) and returns its offset.
  unsigned add_capability(u8 id, std::span<const u8> body);
  /// Any thread.
  void set_interrupt(bool level) { interrupts_->set_pin(slot_, level); }

 private:
  std::array<u8, 256> config_{}, writable_{};
  std::array<u32, bar_count> bar_size_{};
  unsigned next_capability_ = 0x40, last_capability_ = 0;
  PciInterrupts* interrupts_ = nullptr;
  unsigned slot_ = 0;
};

}  // namespace anykvm::vmm
