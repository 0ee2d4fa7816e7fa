// One case in the making: instructions are appended, and the registers that their addresses need are set so that they
// reach the data, as long as no instruction before has written them.
#pragma once

#include "isa/forms.h"
#include "isa/state.h"
#include "isa/values.h"

namespace anykvm::isa {

class Sequence {
 public:
  enum class Kind : u8 { few, block };
  /// `block`: many instructions, which seldom write to the registers that their addresses need.
  Sequence(Case& c, Random& random, u64 features, Kind kind = Kind::few);
  /// 64-bit code. What is appended between these two runs a few times, a branch out of it apart.
  void begin_loop();
  void end_loop();
  /// Appends an instruction of the form. false: none was found that can be compared.
  bool add(const Form& form);
  /// Sets what is still open. No add() after it.
  void finish();

 private:
  struct Branch {
    u16 field;  ///< offset of the displacement in the code
    u8 bytes;
    u16 end;  ///< of the instruction
  };

  void begin_segments();
  unsigned draw(const Form& form, u8 (&bytes)[32]);
  Fields draw_fields(const Form& form);
  bool reaches(const ZydisDecodedInstruction& d, const Operands& operands) const;
  void settle(u8* bytes, const ZydisDecodedInstruction& d, const Operands& operands);
  void settle_special(u8* bytes, const ZydisDecodedInstruction& d, const Operands& operands);
  u64 aim(u8* bytes, const ZydisDecodedInstruction& d, const ZydisDecodedOperand& o, unsigned align);
  void aim_vector_index(const ZydisDecodedInstruction& d, const ZydisDecodedOperand& o);
  void fill_memory(u64 at, const ZydisDecodedOperand& o);
  void note_uses(const ZydisDecodedInstruction& d, const Operands& operands);
  u64 target(unsigned size, unsigned align);
  u64 segment_base(ZydisRegister segment) const;
  u16 any_selector();
  u16 branch_selector();
  u64 next_ip(unsigned length) const;
  bool is_open(unsigned gpr) const { return !(written_ >> gpr & 1) && !(pinned_ >> gpr & 1); }
  bool is_known(unsigned gpr) const { return !(written_ >> gpr & 1); }
  void pin(unsigned gpr, u64 value) {
    c_.in.gpr[gpr] = value;
    pinned_ |= 1u << gpr;
  }
  bool suits_block(const ZydisDecodedInstruction& d, const Operands& operands);
  void add_boundary() {
    if (boundary_count_ < std::size(boundaries_)) boundaries_[boundary_count_++] = c_.code_length;
  }
  void finish_x87();

  Case& c_;
  Random& random_;
  u64 features_;
  u32 pinned_ = 0, written_ = 0;  ///< general registers
  u32 vectors_ = 0, vectors_pinned_ = 0, vectors_written_ = 0;
  u8 opmasks_ = 0;
  bool x87_ = false, alignment_checks_ = true, closed_ = false;
  const bool block_;
  bool loops_ = false;
  u16 loop_start_ = 0;
  u8 loop_counter_ = 0;  ///< a general register
  Lanes lanes_ = Lanes::mixed;
  Branch branches_[40];
  unsigned branch_count_ = 0;
  u16 boundaries_[48];
  unsigned boundary_count_ = 0;
};

}  // namespace anykvm::isa
