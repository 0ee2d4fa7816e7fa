// Every instruction form of the opcode maps: legacy one-byte, 0F, 0F38, 0F3A; VEX maps 1 to 3; EVEX maps 1 to 3, 5 and
// 6; x87. A form is an opcode with its mandatory prefix, W, L, ModRM.reg where that is part of the opcode, and memory
// or registers. The undefined ones are forms, too: what the host calls #UD, the engine must.
#pragma once

#include <vector>

#include "engine/native/decoded.h"
#include "isa/random.h"
#include "isa/state.h"

namespace anykvm::isa {

enum class Encoding : u8 { legacy, vex, evex };

/// The parts of an encoding that a form leaves open.
struct Fields {
  u8 reg = 0, rm = 0;                   ///< 0..31; in memory forms rm is ModRM.rm and REX.B
  u8 vvvv = 0;                          ///< 0..31
  u8 mod = 0, sib = 0, index_high = 0;  ///< memory; index_high is REX.X
  u8 mask = 0;                          ///< EVEX.aaa
  bool zeroing = false;
  bool short_vex = false;  ///< C5 where that can be
  bool rex = false;        ///< a REX prefix even if it says nothing
};

struct Form {
  enum Kind : u8 { plain, memory, registers };

  Encoding encoding = Encoding::legacy;
  u8 map = 0, opcode = 0;
  u8 pp = 0;  ///< 0, 66, F3, F2 as VEX counts them
  u8 l = 0;   ///< 0..3
  bool w = false, broadcast = false;
  Kind kind = plain;
  s8 reg = -1, rm = -1;  ///< part of the opcode, or any
  bool defined = false;  ///< Zydis decodes it
  bool faults = false;   ///< always ends in an exception at CPL 3, as far as known
  bool masks = false;    ///< names a mask register
  bool takes_vvvv = false, takes_mask = false, takes_zeroing = false, needs_sib = false, needs_mask = false;
  ZydisMnemonic mnemonic = ZYDIS_MNEMONIC_INVALID;

  /// Bytes up to displacement and immediate, which the caller fills; returns how many.
  unsigned assemble(const Fields& fields, Mode mode, u8* out) const;
};

using Operands = ZydisDecodedOperand[ZYDIS_MAX_OPERAND_COUNT];

bool decode(Mode mode, const u8* bytes, unsigned available, engine::Decoded& out);

/// Why an instruction cannot be compared; nullptr: it can.
const char* exclusion(const ZydisDecodedInstruction& d, const Operands& operands);

/// All forms of a mode that can be compared. `with_evex`: the EVEX maps, too.
std::vector<Form> enumerate_forms(Mode mode, bool with_evex);

}  // namespace anykvm::isa
