// Emits a guest instruction of 64-bit code again with its registers renamed and its memory operand replaced.
#pragma once

#include "engine/translate/analysis.h"
#include "engine/translate/assembler.h"

namespace anykvm::engine::translate {

struct Renaming {
  Register registers[16];  ///< host register for each general register that ModRM, the opcode or VEX.vvvv names
  Place memory;            ///< what becomes of the memory operand
  int high_byte = -1;      ///< whose low byte takes the place of AH-DH beside a memory operand; -1: none
};

/// false: the instruction cannot be encoded so (AH-DH together with a register that needs REX).
bool rewrite(Assembler& a, const GuestInstruction& g, const u8* bytes, const Renaming& renaming);

}  // namespace anykvm::engine::translate
