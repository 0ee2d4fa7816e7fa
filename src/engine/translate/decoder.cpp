// Two instructions with the same prefixes, opcode, kind of ModRM operand, and, where the opcode is shared by several
// instructions, the same ModRM.reg or ModRM.rm, have the same shape: whatever Zydis says of one it says of the other,
// but for what stands in the fields of ModRM, SIB, REX, displacement and immediate.
#include "engine/translate/decoder.h"

#include <sys/mman.h>

#include <array>
#include <cstring>
#include <new>

namespace anykvm::engine::translate {

namespace {

constexpr unsigned longest_instruction = ZYDIS_MAX_INSTRUCTION_LENGTH;
constexpr unsigned most_behind_opcode = 10;  ///< ModRM, SIB, displacement, immediate; or an immediate of 8 bytes

/// What to make of a byte where an opcode or a prefix may be.
enum Class : u8 {
  for_zydis = 0,  ///< seldom, or its shape depends on more than the key has
  known = 1,
  has_modrm = 2,
  split_by_reg = 4,  ///< ModRM.reg is part of the opcode
  split_by_rm = 8,   ///< ModRM.rm is, where it does not name memory
  is_prefix = 0x40,  ///< the bits below number it
};

constexpr Class operator|(Class a, Class b) { return Class(u8(a) | u8(b)); }

struct Classes {
  std::array<Class, 256> of{};
  constexpr void set(unsigned first, unsigned last, Class what) {
    for (unsigned opcode = first; opcode <= last; ++opcode) of[opcode] = what;
  }
};

constexpr Class modrm = known | has_modrm, group = modrm | split_by_reg, group_of_all = group | split_by_rm;

constexpr Classes one_byte = [] {
  Classes c;
  for (unsigned operation = 0; operation < 0x40; operation += 8) {
    c.set(operation, operation + 3, modrm);      // ADD ... CMP
    c.set(operation + 4, operation + 5, known);  // with an immediate
  }
  c.set(0x50, 0x5f, known);  // PUSH, POP
  c.set(0x63, 0x63, modrm);
  c.set(0x68, 0x68, known);
  c.set(0x69, 0x69, modrm);
  c.set(0x6a, 0x6a, known);
  c.set(0x6b, 0x6b, modrm);
  c.set(0x70, 0x7f, known);  // Jcc
  c.set(0x80, 0x81, group);
  c.set(0x83, 0x83, group);
  c.set(0x84, 0x8b, modrm);
  c.set(0x8d, 0x8d, modrm);
  c.set(0x90, 0x99, known);
  c.set(0x9c, 0x9f, known);
  c.set(0xa4, 0xbf, known);
  c.set(0xc0, 0xc1, group);
  c.set(0xc2, 0xc3, known);
  c.set(0xc6, 0xc7, group_of_all);
  c.set(0xc9, 0xc9, known);
  c.set(0xcc, 0xcc, known);
  c.set(0xd0, 0xd3, group);
  c.set(0xd8, 0xdf, group_of_all);
  c.set(0xe3, 0xe3, known);
  c.set(0xe8, 0xe9, known);
  c.set(0xeb, 0xeb, known);
  c.set(0xf4, 0xf5, known);
  c.set(0xf6, 0xf7, group);
  c.set(0xf8, 0xfd, known);
  c.set(0xfe, 0xff, group);
  unsigned number = 0;
  for (const unsigned prefix : {0x66, 0xf2, 0xf3, 0xf0, 0x64, 0x65}) c.of[prefix] = Class(is_prefix | number++);
  return c;
}();

constexpr Classes two_bytes = [] {  // behind 0F
  Classes c;
  c.set(0x05, 0x07, known);         // SYSCALL, CLTS, SYSRET
  c.set(0x10, 0x17, modrm);         // moves of SSE
  c.set(0x18, 0x1f, group_of_all);  // hints
  c.set(0x28, 0x2f, modrm);
  c.set(0x40, 0x77, modrm);  // CMOVcc, SSE, MMX
  c.set(0x71, 0x73, group_of_all);
  c.set(0x77, 0x77, known);  // EMMS
  c.set(0x7c, 0x7f, modrm);
  c.set(0x80, 0x8f, known);  // Jcc
  c.set(0x90, 0x9f, modrm);  // SETcc
  c.set(0xa2, 0xa2, known);
  c.set(0xa3, 0xa5, modrm);
  c.set(0xab, 0xad, modrm);
  c.set(0xae, 0xae, group_of_all);
  c.set(0xaf, 0xb1, modrm);
  c.set(0xb3, 0xb3, modrm);
  c.set(0xb6, 0xb8, modrm);
  c.set(0xba, 0xba, group);
  c.set(0xbb, 0xc6, modrm);
  c.set(0xc8, 0xcf, known);  // BSWAP
  c.set(0xd0, 0xfe, modrm);
  return c;
}();

// A key: which prefixes there are ...
constexpr u32 repne = 1u << 1, rep = 1u << 2, fs_override = 1u << 4, gs_override = 1u << 5;
// ... and the rest.
constexpr u32 rex_w = 1u << 6, has_rex = 1u << 7, is_supervisor = 1u << 8, behind_0f = 1u << 9;
constexpr unsigned opcode_shift = 10, reg_shift = 18, rm_shift = 21;
constexpr u32 on_register = 1u << 24;  ///< ModRM.rm names a register
constexpr u32 rex_b = 1u << 25;        ///< without ModRM: NOP and PAUSE are instructions of their own
constexpr u32 is_narrow = 1u << 26;
constexpr u32 is_key = 1u << 31;

/// The memory operand of ModRM at `modrm`. Returns what is behind it.
const u8* read_memory(const u8* modrm, unsigned rex, u32 key, MemoryOperand& out) {
  const unsigned mod = *modrm >> 6, rm = *modrm & 7;
  const u8* at = modrm + 1;
  int base = int(rm | (rex & 1) << 3), index = -1;
  unsigned shift = 0;
  bool has_dword = mod == 2, on_rip = false;
  if (rm == 4) {
    const unsigned sib = *at++, low = sib & 7;
    base = int(low | (rex & 1) << 3);
    if (const unsigned number = (sib >> 3 & 7) | (rex & 2) << 2; number != 4) {
      index = int(number);
      shift = sib >> 6;
    }
    if (mod == 0 && low == 5) {
      base = -1;
      has_dword = true;
    }
  } else if (mod == 0 && rm == 5) {
    base = -1;
    has_dword = true;
    on_rip = !(key & is_narrow);
  }
  s32 displacement = 0;
  if (has_dword) {
    std::memcpy(&displacement, at, sizeof displacement);
    at += sizeof displacement;
  } else if (mod == 1) {
    displacement = s8(*at++);
  }
  out.base = s8(base);
  out.index = s8(index);
  out.shift = u8(shift);
  out.displacement = displacement;
  out.is_rip_relative = on_rip;
  if (out.bytes)
    out.segment = key & fs_override                      ? x86::fs
                  : key & gs_override                    ? x86::gs
                  : base == x86::rsp || base == x86::rbp ? x86::ss
                                                         : x86::ds;
  return at;
}

void read_registers(unsigned rex, unsigned opcode, unsigned modrm, GuestInstruction& out) {
  for (unsigned n = 0; n < out.register_count; ++n) {
    GeneralOperand& reg = out.registers[n];
    unsigned number;
    switch (reg.field) {
      case Field::reg: number = (modrm >> 3 & 7) | (rex & 4) << 1; break;
      case Field::rm: number = (modrm & 7) | (rex & 1) << 3; break;
      case Field::opcode: number = (opcode & 7) | (rex & 1) << 3; break;
      default: continue;
    }
    reg.is_high = reg.is_byte && !rex && number >= 4;
    reg.number = (reg.is_high ? number - 4 : number) & 15;
  }
}

}  // namespace

Decoder::Decoder() {
  void* const at = mmap(nullptr, shape_count * sizeof(Shape), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  shapes_ = static_cast<Shape*>(at);
}

Decoder::~Decoder() { munmap(shapes_, shape_count * sizeof(Shape)); }

bool Decoder::decode_with_zydis(const u8* bytes, unsigned available, CodeKind code, Shape* shape, u32 key,
                                GuestInstruction& out) {
  Decoded d;
  if (!ZYAN_SUCCESS(decode_instruction(bytes, available, code.bits(), d))) return false;
  analyse(d, bytes, code, out);
  if (shape) {
    shape->key = key;
    shape->instruction = out;
  }
  settle(out);
  return true;
}

bool Decoder::decode(const u8* bytes, unsigned available, CodeKind code, GuestInstruction& out) {
  if (!code.narrow) return decode_known(bytes, available, code, out);
  // INC and DEC of a register in one byte, which is a REX prefix in 64-bit mode, and the moves between the accumulator
  // and an absolute address: the forms with ModRM in their place.
  constexpr unsigned most_prefixes = 2;  // of which one may be 66, the only one that is emitted
  constexpr u8 operand_size = 0x66, address_size = 0x67;
  u8 other[longest_instruction] = {};
  unsigned at = 0;
  bool has_66 = false, has_67 = false;
  for (; at < available && at < most_prefixes && is_legacy_prefix(bytes[at]); ++at) {
    other[at] = bytes[at];
    has_66 |= bytes[at] == operand_size;
    has_67 |= bytes[at] == address_size;
  }
  const unsigned opcode = at < available ? bytes[at] : 0;
  const bool steps = (opcode & 0xf0) == 0x40, moves = (opcode & 0xfc) == 0xa0;
  const unsigned length = at + (moves ? 5 : 1);
  if ((!steps && !moves) || length > available || has_67) return decode_known(bytes, available, code, out);
  const u8 with_modrm[] = {u8(steps ? 0xff : 0x88 | (opcode & 1) | (~opcode & 2)),
                           u8(steps ? 0xc0 | (opcode & 15) : 5)};
  std::memcpy(other + at, with_modrm, sizeof with_modrm);
  if (moves) std::memcpy(other + at + 2, bytes + at + 1, 4);
  if (!decode_known(other, sizeof other, code, out)) return false;
  out.length = out.tail_at = u8(length);
  out.opcode_at = has_66;
  out.modrm_at = u8(has_66 + 1);
  out.is_substituted = true;
  if (has_66) out.substitute[0] = operand_size;
  std::memcpy(out.substitute + has_66, with_modrm, sizeof with_modrm);
  return true;
}

bool Decoder::decode_known(const u8* bytes, unsigned available, CodeKind code, GuestInstruction& out) {
  const auto ask_zydis = [&](Shape* shape, u32 key) {
    return decode_with_zydis(bytes, available, code, shape, key, out);
  };
  if (available < longest_instruction) return ask_zydis(nullptr, 0);
  u32 key = is_key | (code.supervisor ? is_supervisor : 0) | (code.narrow ? is_narrow : 0);
  unsigned at = 0, rex = 0;
  while (one_byte.of[bytes[at]] & is_prefix) {
    const u32 prefix = 1u << (one_byte.of[bytes[at++]] & 7);
    if (key & prefix) return ask_zydis(nullptr, 0);
    key |= prefix;
  }
  if (!code.narrow && (bytes[at] & 0xf0) == 0x40) {
    rex = bytes[at++];
    key |= has_rex | (rex & 8 ? rex_w : 0);
  }
  const unsigned opcode_at = at;
  unsigned opcode = bytes[at++];
  Class what = one_byte.of[opcode];
  if (opcode == 0x0f) {
    opcode = bytes[at++];
    what = two_bytes.of[opcode];
    key |= behind_0f;
  }
  constexpr u32 repeats = repne | rep, overrides = fs_override | gs_override;
  if (!(what & known) || what & is_prefix || at > longest_instruction - most_behind_opcode ||
      (key & repeats) == repeats || (key & overrides) == overrides)
    return ask_zydis(nullptr, 0);
  key |= opcode << opcode_shift;
  const u8* const modrm = what & has_modrm ? bytes + at : nullptr;
  const bool memory = modrm && *modrm < 0xc0;
  if (modrm) {
    if (what & split_by_reg) key |= u32(*modrm >> 3 & 7) << reg_shift;
    if (!memory) key |= on_register | (what & split_by_rm ? u32(*modrm & 7) << rm_shift : 0);
  } else if (rex & 1) {
    key |= rex_b;
  }

  Shape& shape = shapes_[key * 0x9e3779b1u >> (32 - shape_bits)];
  if (shape.key != key) return ask_zydis(&shape, key);
  const GuestInstruction& known = shape.instruction;
  out = known;
  const unsigned immediate_bytes = unsigned(known.length - known.tail_at);
  const u8* tail = bytes + at;
  if (modrm) tail = memory ? read_memory(modrm, rex, key, out.memory) : modrm + 1;
  if (!known.has_memory) out.memory = known.memory;
  out.opcode_at = u8(opcode_at);
  out.modrm_at = u8(modrm ? at : 0);
  out.tail_at = u8(tail - bytes);
  out.length = u8(out.tail_at + immediate_bytes);
  out.rex = u8(rex);
  out.immediate = last_immediate(tail, immediate_bytes);
  read_registers(rex, opcode, modrm ? *modrm : 0, out);
  settle(out);
  return true;
}

}  // namespace anykvm::engine::translate
