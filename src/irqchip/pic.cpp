// See pic.h.
#include "irqchip/pic.h"

#include <utility>

namespace anykvm::irqchip {

namespace {
constexpr unsigned none = 8;  ///< of highest_priority()
constexpr u8 spurious_line = 7;

constexpr u8 icw1 = 0x10, icw1_needs_icw4 = 0x01, icw4_auto_eoi = 0x02, icw4_special_fully_nested = 0x10;
constexpr u8 ocw3 = 0x08, ocw3_read_isr = 0x01, ocw3_read = 0x02, ocw3_poll = 0x04, ocw3_special_mask = 0x20,
             ocw3_set_special_mask = 0x40;
constexpr u8 poll_answer_pending = 0x80;

/// Which initialisation word the data port takes next: kvm_pic_state::init_state.
enum Initialisation : u8 { ready = 0, wants_icw2 = 1, wants_icw3 = 2, wants_icw4 = 3 };
}  // namespace

Pic::Pic() {
  chips_[master].elcr_mask = 0xf8;  // the timer, the keyboard and the cascade are edge-triggered for good
  chips_[slave].elcr_mask = 0xde;   // and so are the RTC and the coprocessor's error
}

// --- lines -----------------------------------------------------------------------------------------------------------

int Pic::set_line(unsigned line, unsigned source, bool level) {
  const u32 bit = 1u << source;
  sources_[line] = level ? sources_[line] | bit : sources_[line] & ~bit;
  const int result = set_input(chips_[line / 8], line % 8, sources_[line] != 0);
  update();
  return result;
}

int Pic::set_input(Chip& chip, unsigned line, bool level) {
  const u8 bit = static_cast<u8>(1 << line);
  bool is_new = true;
  if (level) {
    if (chip.elcr & bit || !(chip.last_irr & bit)) {
      is_new = !(chip.irr & bit);
      chip.irr |= bit;
    }
    chip.last_irr |= bit;
  } else {
    if (chip.elcr & bit) chip.irr &= static_cast<u8>(~bit);
    chip.last_irr &= static_cast<u8>(~bit);
  }
  return chip.imr & bit ? -1 : is_new;
}

unsigned Pic::highest_priority(const Chip& chip, u8 lines) {
  for (unsigned priority = 0; priority < none; ++priority)
    if (lines >> ((priority + chip.priority_add) & 7) & 1) return priority;
  return none;
}

/// The line that the chip raises its INT for, -1 if none: requested, unmasked, and above what is in service.
int Pic::request(const Chip& chip) const {
  const unsigned requested = highest_priority(chip, static_cast<u8>(chip.irr & ~chip.imr));
  if (requested == none) return -1;
  u8 blocking = chip.isr;
  if (chip.special_mask) blocking &= static_cast<u8>(~chip.imr);
  if (chip.special_fully_nested_mode && &chip == &chips_[master]) blocking &= static_cast<u8>(~(1 << cascade_line));
  if (requested >= highest_priority(chip, blocking)) return -1;
  return static_cast<int>((requested + chip.priority_add) & 7);
}

void Pic::update() {
  if (request(chips_[slave]) >= 0) {
    // A pulse rather than a level: the slave's INT goes down at each acknowledge and up again for the next request.
    set_input(chips_[master], cascade_line, true);
    set_input(chips_[master], cascade_line, false);
  }
  output_ = request(chips_[master]) >= 0;
}

// --- service ---------------------------------------------------------------------------------------------------------

void Pic::acknowledge(Chip& chip, unsigned line) {
  const u8 bit = static_cast<u8>(1 << line);
  chip.isr |= bit;
  if (!(chip.elcr & bit)) chip.irr &= static_cast<u8>(~bit);
  if (chip.auto_eoi) {
    if (chip.rotate_on_auto_eoi) chip.priority_add = (line + 1) & 7;
    end_service(chip, line);
  }
}

u8 Pic::acknowledge() {
  unsigned line = spurious_line;
  const Chip* speaker = &chips_[master];
  if (const int requested = request(chips_[master]); requested >= 0) {
    line = static_cast<unsigned>(requested);
    acknowledge(chips_[master], line);
    if (line == cascade_line) {
      speaker = &chips_[slave];
      const int on_slave = request(chips_[slave]);
      line = on_slave >= 0 ? static_cast<unsigned>(on_slave) : spurious_line;
      if (on_slave >= 0) acknowledge(chips_[slave], line);
    }
  }
  update();
  return static_cast<u8>(speaker->irq_base + line);
}

void Pic::end_service(Chip& chip, unsigned line) {
  chip.isr &= static_cast<u8>(~(1 << line));
  ended_ |= 1u << (line + 8 * index(chip));
}

// --- ports -----------------------------------------------------------------------------------------------------------

void Pic::write(u16 port, u8 value) {
  if ((port & ~1) == 0x4d0) {
    Chip& chip = chips_[port & 1];
    chip.elcr = value & chip.elcr_mask;
    return;
  }
  Chip& chip = chips_[port >> 7 & 1];
  port & 1 ? write_data(chip, value) : write_command(chip, value);
  update();
}

u8 Pic::read(u16 port) {
  if ((port & ~1) == 0x4d0) return chips_[port & 1].elcr;
  Chip& chip = chips_[port >> 7 & 1];
  if (chip.poll) {
    chip.poll = 0;
    return poll(chip);
  }
  if (port & 1) return chip.imr;
  return chip.read_reg_select ? chip.isr : chip.irr;
}

/// The read after the poll command is the acknowledge cycle of this chip.
u8 Pic::poll(Chip& chip) {
  const int line = request(chip);
  if (line < 0) return spurious_line;
  acknowledge(chip, static_cast<unsigned>(line));
  if (&chip == &chips_[slave]) chips_[master].irr &= static_cast<u8>(~(1 << cascade_line));
  update();
  return static_cast<u8>(poll_answer_pending | line);
}

void Pic::initialise(Chip& chip, u8 value) {
  chip.init4 = value & icw1_needs_icw4;
  // Edges that were waiting are gone; whoever waits for them to be served (the PIT) must not wait for ever.
  ended_ |= static_cast<u32>(chip.irr & ~chip.elcr) << (8 * index(chip));
  chip.last_irr = 0;
  chip.irr &= chip.elcr;
  chip.imr = 0;
  chip.isr = 0;
  chip.priority_add = 0;
  chip.special_mask = 0;
  chip.read_reg_select = 0;
  if (!chip.init4) chip.special_fully_nested_mode = chip.auto_eoi = 0;
  chip.init_state = wants_icw2;
}

void Pic::write_command(Chip& chip, u8 value) {
  if (value & icw1) return initialise(chip, value);
  if (!(value & ocw3)) return write_ocw2(chip, value);
  if (value & ocw3_poll) chip.poll = 1;
  if (value & ocw3_read) chip.read_reg_select = value & ocw3_read_isr;
  if (value & ocw3_set_special_mask) chip.special_mask = (value & ocw3_special_mask) != 0;
}

void Pic::write_ocw2(Chip& chip, u8 value) {
  const bool rotate = value & 0x80, specific = value & 0x40, eoi = value & 0x20;
  if (!eoi) {
    if (!specific)
      chip.rotate_on_auto_eoi = rotate;
    else if (rotate)
      chip.priority_add = (value + 1) & 7;
    return;
  }
  unsigned line = value & 7;
  if (!specific) {
    u8 in_service = chip.isr;
    if (chip.special_mask) in_service &= static_cast<u8>(~chip.imr);
    const unsigned priority = highest_priority(chip, in_service);
    if (priority == none) return;
    line = (priority + chip.priority_add) & 7;
  }
  if (rotate) chip.priority_add = (line + 1) & 7;
  end_service(chip, line);
}

void Pic::write_data(Chip& chip, u8 value) {
  switch (chip.init_state) {
    case wants_icw2:
      chip.irq_base = value & 0xf8;
      chip.init_state = wants_icw3;
      break;
    case wants_icw3:  // how the chips are cascaded is known
      chip.init_state = chip.init4 ? wants_icw4 : ready;
      break;
    case wants_icw4:
      chip.special_fully_nested_mode = (value & icw4_special_fully_nested) != 0;
      chip.auto_eoi = (value & icw4_auto_eoi) != 0;
      chip.init_state = ready;
      break;
    default:
      unmasked_ |= static_cast<u32>(chip.imr & ~value) << (8 * index(chip));
      chip.imr = value;
      break;
  }
}

// --- state -----------------------------------------------------------------------------------------------------------

kvm_pic_state Pic::get_state(unsigned chip) const { return chips_[chip]; }

void Pic::set_state(unsigned chip, const kvm_pic_state& state) {
  static_cast<kvm_pic_state&>(chips_[chip]) = state;
  update();
}

}  // namespace anykvm::irqchip
