#include "engine/translate/rewrite.h"

#include "engine/native/decoded.h"

namespace anykvm::engine::translate {

int general_register(const ZydisDecodedOperand& operand) {
  if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) return -1;
  switch (ZydisRegisterGetClass(operand.reg.value)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
      return ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, operand.reg.value));
    default: return -1;
  }
}

bool is_overwritten(const ZydisDecodedOperand& operand) {
  return operand.actions == ZYDIS_OPERAND_ACTION_WRITE && operand.size >= 32;
}

bool is_high_byte(const ZydisDecodedOperand& operand) {
  return operand.type == ZYDIS_OPERAND_TYPE_REGISTER && operand.reg.value >= ZYDIS_REGISTER_AH &&
         operand.reg.value <= ZYDIS_REGISTER_BH;
}

bool rewrite(Assembler& a, const ZydisDecodedInstruction& d, std::span<const ZydisDecodedOperand> operands,
             const u8* bytes, const Renaming& renaming) {
  // Which fields name general registers.
  int reg = -1, rm = -1, in_opcode = -1, vvvv = -1;
  bool high_byte = false, memory = false;
  for (const ZydisDecodedOperand& operand : operands) {
    if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY && operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) memory = true;
    const int number = general_register(operand);
    if (number < 0) continue;
    if (is_high_byte(operand)) {
      if (operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG && renaming.high_byte >= 0)
        reg = renaming.high_byte;
      else
        high_byte |= operand.encoding != ZYDIS_OPERAND_ENCODING_NONE;
      continue;
    }
    switch (operand.encoding) {
      case ZYDIS_OPERAND_ENCODING_MODRM_REG: reg = renaming.registers[number]; break;
      case ZYDIS_OPERAND_ENCODING_MODRM_RM: rm = renaming.registers[number]; break;
      case ZYDIS_OPERAND_ENCODING_OPCODE: in_opcode = renaming.registers[number]; break;
      case ZYDIS_OPERAND_ENCODING_NDSNDD: vvvv = renaming.registers[number]; break;
      case ZYDIS_OPERAND_ENCODING_NONE: break;  // implicit: keeps its own name
      default: return false;
    }
  }
  if (memory != (renaming.memory.base >= 0)) return false;
  const unsigned base = memory ? unsigned(renaming.memory.base) : 0;
  const unsigned index = memory && renaming.memory.index >= 0 ? unsigned(renaming.memory.index) : 0;

  unsigned at = 0;
  unsigned rex = 0;
  for (;; ++at) {
    const u8 b = bytes[at];
    if ((b & 0xf0) == 0x40) {
      rex = b;
    } else if (b == 0x66 || b == 0xf2 || b == 0xf3 || b == 0xf0) {
      a.byte(b);
      rex = 0;
    } else if (is_legacy_prefix(b)) {
      rex = 0;
    } else {
      break;
    }
  }
  const bool has_modrm = d.attributes & ZYDIS_ATTRIB_HAS_MODRM;
  const unsigned modrm_at = has_modrm ? d.raw.modrm.offset : d.length;
  const auto with_bit = [](unsigned value, unsigned bit, unsigned on) {
    return (value & ~(1u << bit)) | (on & 1) << bit;
  };

  switch (d.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY: {
      unsigned out = rex;
      if (reg >= 0) out = with_bit(out, 2, unsigned(reg) >> 3);
      if (memory) out = with_bit(with_bit(out, 1, index >> 3), 0, base >> 3);
      if (rm >= 0) out = with_bit(out, 0, unsigned(rm) >> 3);
      if (in_opcode >= 0) out = with_bit(out, 0, unsigned(in_opcode) >> 3);
      if (out || rex) {
        if (high_byte) return false;
        a.byte(out | 0x40);
      }
      break;
    }
    case ZYDIS_INSTRUCTION_ENCODING_VEX: {
      unsigned first, second;
      if (bytes[at] == 0xc5) {
        first = (bytes[at + 1] & 0x80u) | 0x61;
        second = bytes[at + 1] & 0x7fu;
        at += 2;
      } else {
        first = bytes[at + 1];
        second = bytes[at + 2];
        at += 3;
      }
      if (reg >= 0) first = with_bit(first, 7, ~unsigned(reg) >> 3);
      if (memory) first = with_bit(with_bit(first, 6, ~index >> 3), 5, ~base >> 3);
      if (rm >= 0) first = with_bit(first, 5, ~unsigned(rm) >> 3);
      if (vvvv >= 0) second = (second & ~0x78u) | (~unsigned(vvvv) & 15) << 3;
      a.bytes(0xc4, first, second);
      break;
    }
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: {
      // R', X and B with a general register or a base that is none of the upper vector registers.
      unsigned first = bytes[at + 1];
      if (reg >= 0) first = with_bit(with_bit(first, 4, 1), 7, ~unsigned(reg) >> 3);
      if (memory) first = with_bit(with_bit(first, 6, ~index >> 3), 5, ~base >> 3);
      if (rm >= 0) first = with_bit(with_bit(first, 6, 1), 5, ~unsigned(rm) >> 3);
      if (vvvv >= 0) return false;
      a.bytes(0x62, first, bytes[at + 2], bytes[at + 3]);
      at += 4;
      break;
    }
    default: return false;
  }
  if (!has_modrm) {
    const unsigned opcode_at = at + (bytes[at] == 0x0f ? 1 : 0);
    for (; at < d.length; ++at)
      a.byte(at == opcode_at && in_opcode >= 0 ? (bytes[at] & ~7u) | (unsigned(in_opcode) & 7) : bytes[at]);
    return true;
  }
  for (; at < modrm_at; ++at) a.byte(bytes[at]);

  unsigned modrm = bytes[modrm_at];
  if (reg >= 0) modrm = (modrm & ~0x38u) | (unsigned(reg) & 7) << 3;
  if (rm >= 0) modrm = (modrm & ~7u) | (unsigned(rm) & 7);
  if (memory)
    a.address(modrm >> 3 & 7, renaming.memory, d.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX);
  else
    a.byte(modrm);
  unsigned tail = modrm_at + 1;
  if (d.attributes & ZYDIS_ATTRIB_HAS_SIB) ++tail;
  tail += d.raw.disp.size / 8;
  for (; tail < d.length; ++tail) a.byte(bytes[tail]);
  return true;
}

}  // namespace anykvm::engine::translate
