// FOP, FIP and FDP around native code of the x87 unit.
#pragma once

#include "engine/interpret/operands.h"
#include "x86/x87_environment.h"

namespace anykvm::engine {

/// Keeps the host's addresses out of the x87 unit's pointers to its last instruction: what they were before an
/// instruction that runs on the unit, and what they are to be behind it.
class X87Pointers {
 public:
  X87Pointers(Context& c, const Instruction& i) : c_(c), i_(i) {
    if (touches()) std::memcpy(before_, c.cpu.state.fpu.x87 + offset, sizeof before_);
  }
  void settle() const {
    if (!touches()) return;
    x86::CpuState& s = c_.cpu.state;
    std::memcpy(s.fpu.x87 + offset, before_, sizeof before_);
    if (!i_.moves_x87_pointers) return;
    note_x87_instruction(s.fpu,
                         {.opcode = u16(i_.immediate),
                          .code_selector = s.segment[x86::cs].selector,
                          .rip = s.rip,
                          .has_operand = i_.has_memory,
                          .data_selector = s.segment[i_.segment].selector,
                          .offset = i_.has_memory ? effective_offset(c_, i_) : 0},
                         x87_exception_waits(s.fpu));
  }

 private:
  static constexpr unsigned offset = 6;  ///< FOP; FIP and FDP behind it
  bool touches() const { return i_.unit == Unit::x87 || i_.unit == Unit::mmx; }

  Context& c_;
  const Instruction& i_;
  u8 before_[18];
};

}  // namespace anykvm::engine
