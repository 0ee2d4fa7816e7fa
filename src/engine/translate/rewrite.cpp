#include "engine/translate/rewrite.h"

namespace anykvm::engine::translate {

bool rewrite(Assembler& a, const GuestInstruction& g, const u8* bytes, const Renaming& renaming) {
  // Which fields name general registers.
  int reg = -1, rm = -1, in_opcode = -1, vvvv = -1;
  bool high_byte = false;
  const bool memory = g.has_memory;
  for (const GeneralOperand& operand : g.general()) {
    const int to = renaming.registers[operand.number];
    if (operand.is_high) {
      if (operand.field == Field::reg && renaming.high_byte >= 0)
        reg = renaming.high_byte;
      else
        high_byte |= operand.field != Field::implicit;
      continue;
    }
    switch (operand.field) {
      case Field::reg: reg = to; break;
      case Field::rm: rm = to; break;
      case Field::opcode: in_opcode = to; break;
      case Field::vvvv: vvvv = to; break;
      case Field::implicit: break;  // keeps its own name
    }
  }
  if (memory != (renaming.memory.base >= 0)) return false;
  const unsigned base = memory ? unsigned(renaming.memory.base) : 0;
  const unsigned index = memory && renaming.memory.index >= 0 ? unsigned(renaming.memory.index) : 0;
  const auto with_bit = [](unsigned value, unsigned bit, unsigned on) {
    return (value & ~(1u << bit)) | (on & 1) << bit;
  };
  constexpr unsigned most = 32;  // what is longer than the guest's: REX or VEX, SIB, displacement
  u8* const begin = a.reserve(most + sizeof(u64));
  if (!begin) return true;
  u8* to = begin;
  unsigned at = 0;
  for (; at < g.opcode_at; ++at)
    if (const u8 b = bytes[at]; b == 0x66 || b == 0xf2 || b == 0xf3 || b == 0xf0) *to++ = b;

  switch (g.encoding) {
    case Encoding::legacy: {
      unsigned out = g.rex;
      if (reg >= 0) out = with_bit(out, 2, unsigned(reg) >> 3);
      if (memory) out = with_bit(with_bit(out, 1, index >> 3), 0, base >> 3);
      if (rm >= 0) out = with_bit(out, 0, unsigned(rm) >> 3);
      if (in_opcode >= 0) out = with_bit(out, 0, unsigned(in_opcode) >> 3);
      if (out || g.rex) {
        if (high_byte) return false;
        *to++ = u8(out | 0x40);
      }
      break;
    }
    case Encoding::vex: {
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
      *to++ = 0xc4;
      *to++ = u8(first);
      *to++ = u8(second);
      break;
    }
    case Encoding::evex: {
      // R', X and B with a general register or a base that is none of the upper vector registers.
      unsigned first = bytes[at + 1];
      if (reg >= 0) first = with_bit(with_bit(first, 4, 1), 7, ~unsigned(reg) >> 3);
      if (memory) first = with_bit(with_bit(first, 6, ~index >> 3), 5, ~base >> 3);
      if (rm >= 0) first = with_bit(with_bit(first, 6, 1), 5, ~unsigned(rm) >> 3);
      if (vvvv >= 0) return false;
      *to++ = 0x62;
      *to++ = u8(first);
      *to++ = bytes[at + 2];
      *to++ = bytes[at + 3];
      at += 4;
      break;
    }
  }
  if (!g.modrm_at) {
    u8* const opcode = to + (bytes[at] == 0x0f ? 1 : 0);
    while (at < g.length) *to++ = bytes[at++];
    if (in_opcode >= 0) *opcode = u8((*opcode & ~7u) | (unsigned(in_opcode) & 7));
    a.advance(to);
    return true;
  }
  while (at < g.modrm_at) *to++ = bytes[at++];

  unsigned modrm = bytes[g.modrm_at];
  if (reg >= 0) modrm = (modrm & ~0x38u) | (unsigned(reg) & 7) << 3;
  if (rm >= 0) modrm = (modrm & ~7u) | (unsigned(rm) & 7);
  if (memory)
    to = Assembler::put_address(to, modrm >> 3 & 7, renaming.memory, g.encoding == Encoding::evex);
  else
    *to++ = u8(modrm);
  for (at = g.tail_at; at < g.length; ++at) *to++ = bytes[at];
  a.advance(to);
  return true;
}

}  // namespace anykvm::engine::translate
