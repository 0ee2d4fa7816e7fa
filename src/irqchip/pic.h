// The two cascaded 8259 interrupt controllers of a PC, with the edge/level control registers of its chip set.
// Reference: Intel 8259A data sheet; 82371 (PIIX3) data sheet for ELCR; api.rst 4.26 KVM_GET_IRQCHIP.
// As in KVM: always cascaded, always 8086 mode; ICW1's LTIM is ignored in favour of ELCR.
//
// Not thread-safe: IrqChips holds the lock. Lines are numbered 0 - 15 over both chips.
#pragma once

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::irqchip {

class Pic {
 public:
  Pic();

  static bool covers(u16 port, unsigned size) {
    return size == 1 ? (port & ~0x81) == 0x20 || (port & ~1) == 0x4d0
                     : size == 2 && (port == 0x20 || port == 0xa0 || port == 0x4d0);
  }
  u8 read(u16 port);
  void write(u16 port, u8 value);

  /// A line changes; `source` names one of the up to 32 parties that share it: the line is the OR of them.
  /// 1: a new request; 0: coalesced into one that is still waiting; -1: masked.
  int set_line(unsigned line, unsigned source, bool level);

  /// INTR to the CPUs.
  bool output() const { return output_; }
  /// The CPU's acknowledge cycle: the vector (of a spurious interrupt when the request has gone).
  u8 acknowledge();

  kvm_pic_state get_state(unsigned chip) const;
  void set_state(unsigned chip, const kvm_pic_state& state);

  /// Lines whose service has ended (EOI, automatic or not), or whose waiting edge was dropped by an initialisation,
  /// since the last call.
  u32 take_ended() {
    const u32 ended = ended_;
    ended_ = 0;
    return ended;
  }
  /// Lines that were unmasked since the last call.
  u32 take_unmasked() {
    const u32 unmasked = unmasked_;
    unmasked_ = 0;
    return unmasked;
  }

 private:
  static constexpr unsigned master = 0, slave = 1, cascade_line = 2;
  struct Chip : kvm_pic_state {};

  int set_input(Chip& chip, unsigned line, bool level);
  /// 0 (highest) to 7, 8 if lines is empty.
  static unsigned highest_priority(const Chip& chip, u8 lines);
  int request(const Chip& chip) const;
  void update();
  void acknowledge(Chip& chip, unsigned line);
  void end_service(Chip& chip, unsigned line);
  void initialise(Chip& chip, u8 icw1);
  void write_ocw2(Chip& chip, u8 value);
  void write_command(Chip& chip, u8 value);
  void write_data(Chip& chip, u8 value);
  u8 poll(Chip& chip);
  unsigned index(const Chip& chip) const { return &chip == &chips_[slave]; }

  Chip chips_[2] = {};
  u32 sources_[16] = {};
  u32 ended_ = 0, unmasked_ = 0;
  bool output_ = false;
};

}  // namespace anykvm::irqchip
