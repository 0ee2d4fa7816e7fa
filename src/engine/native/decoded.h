// A guest instruction as Zydis decodes it, with what Zydis gets wrong put right. Everybody who decodes does it here.
#pragma once

#include <Zydis/Zydis.h>

#include <span>

#include "x86/types.h"

namespace anykvm::engine {

struct Decoded {
  ZydisDecodedInstruction instruction;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];

  std::span<const ZydisDecodedOperand> all_operands() const { return {operands, instruction.operand_count}; }
  ZydisMnemonic mnemonic() const { return instruction.mnemonic; }
  bool is_register(unsigned n) const { return operands[n].type == ZYDIS_OPERAND_TYPE_REGISTER; }
  bool is_memory(unsigned n) const { return operands[n].type == ZYDIS_OPERAND_TYPE_MEMORY; }
  bool is_immediate(unsigned n) const { return operands[n].type == ZYDIS_OPERAND_TYPE_IMMEDIATE; }
  ZydisRegisterClass register_class(unsigned n) const { return ZydisRegisterGetClass(operands[n].reg.value); }
  unsigned register_id(unsigned n) const { return unsigned(ZydisRegisterGetId(operands[n].reg.value)); }
  unsigned bytes(unsigned n) const { return operands[n].size / 8; }
};

/// Of the x87 unit, whichever extension it came with (FISTTP: SSE3).
inline bool is_x87_instruction(const ZydisDecodedInstruction& instruction) {
  return instruction.meta.isa_ext == ZYDIS_ISA_EXT_X87 || instruction.meta.category == ZYDIS_CATEGORY_X87_ALU;
}

/// Stores to [rDI], an operand that nothing in the instruction names.
inline bool is_mask_move(ZydisMnemonic mnemonic) {
  return mnemonic == ZYDIS_MNEMONIC_MASKMOVQ || mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU ||
         mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU;
}

/// Segment overrides, 66, 67, LOCK, REPNE, REP. Not REX.
bool is_legacy_prefix(u8 byte);

/// Decodes one instruction of 16-, 32- or 64-bit code; bytes behind the fifteenth are not looked at. Returns Zydis'
/// status.
ZyanStatus decode_instruction(const u8* bytes, unsigned available, unsigned code_bits, Decoded& out);

/// Where the vendors differ, the guest sees the host's behaviour.
bool host_is_amd();

}  // namespace anykvm::engine
