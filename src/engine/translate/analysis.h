// What the translator needs to know of one guest instruction.
#pragma once

#include <span>

#include "engine/interpret/handlers.h"
#include "engine/translate/context.h"

namespace anykvm::engine::translate {

/// How an instruction is translated.
enum class Kind : u8 {
  step,          ///< the reference engine executes it, the block goes on
  step_and_end,  ///< ... and the block ends: it may change the mode or RIP
  want_vectors,  ///< the block ends here, to go on where the vector registers are loaded
  nothing,
  native,  ///< emitted again with registers renamed
  lea,
  push,
  pop,
  leave,
  push_memory,
  push_flags,
  move_from_segment,
  bit_string,     ///< BT, BTS, BTR, BTC of a bit that a register numbers, in memory
  string,         ///< MOVS, STOS, LODS, SCAS, CMPS of one element
  clear_flag,     ///< CLI, CLD
  set_interrupt,  ///< STI
  swap_gs,
  verify_write,      ///< VERW whose ZF nobody reads
  read_time,         ///< RDTSC, RDTSCP
  set_access_check,  ///< STAC, CLAC; ends the block, as everything from here on but jump_if
  jump,
  jump_if,
  call,
  jump_indirect,
  call_indirect,
  ret,
};

/// The six arithmetic flags as bits of RFLAGS.
inline constexpr u32 all_flags = 0x8d5;

struct Analysis {
  Kind kind;
  u8 vectors;  ///< the VectorLevel that it needs
  bool x87;    ///< emitted for the x87 unit, MMX included, which has to be loaded
  u16 flags_read;
  u16 flags_killed;  ///< written whatever the operands
  bool operator==(const Analysis&) const = default;
};
inline constexpr Analysis one_step{
    .kind = Kind::step_and_end, .vectors = no_vectors, .x87 = false, .flags_read = all_flags, .flags_killed = 0};

/// Where an instruction names a register.
enum class Field : u8 { implicit, reg, rm, opcode, vvvv };

struct GeneralOperand {
  u8 number : 4;
  u8 is_byte : 1;
  u8 is_high : 1;  ///< AH, CH, DH, BH; `number` is that of the whole register
  u8 is_written : 1;
  u8 is_overwritten : 1;  ///< all of it, and the instruction does not read it
  Field field;
  bool operator==(const GeneralOperand&) const = default;
};

/// What ModRM.rm names where it is not a register.
struct MemoryOperand {
  s8 base, index;    ///< -1: none; RIP is none, too
  u8 shift;          ///< of the index
  u8 segment;        ///< x86::SegmentName
  s32 displacement;  ///< as the operand says: from the next instruction's address if is_rip_relative
  u16 bytes;         ///< 0: only the address is computed
  bool is_rip_relative;
  bool is_written;
  bool operator==(const MemoryOperand&) const = default;
};

/// How what the opcode and its prefixes say is laid out.
enum class Encoding : u8 { legacy, vex, evex };

/// One instruction. Everything but `length` and `mnemonic` is only there if Zydis could decode it.
struct GuestInstruction {
  Analysis what;
  u8 length;
  /// 32-bit code has forms that 64-bit mode does not have: the same with ModRM, and with opcode_at, modrm_at and
  /// tail_at meant of these bytes.
  u8 substitute[4];
  bool is_substituted;
  Encoding encoding;
  u8 opcode, opcode_map;  ///< the opcode's last byte; ZydisOpcodeMap
  u8 opcode_at;           ///< which byte follows the prefixes (REX included); with VEX and EVEX, their first
  u8 modrm_at;            ///< 0: it has none
  u8 tail_at;             ///< what follows ModRM, SIB and displacement, or the opcode
  u8 rex;                 ///< 0: none
  u16 mnemonic;           ///< ZydisMnemonic
  u8 width;               ///< bytes of operand 0
  u8 register_count;
  static constexpr unsigned most_registers = 6;
  GeneralOperand registers[most_registers];  ///< those named come first, in the order written
  MemoryOperand memory;
  s32 immediate;       ///< the last, or its low bits, sign-extended
  bool has_memory;     ///< an operand that ModRM.rm names; LEA's, too
  bool has_immediate;  ///< as operand 0 or 1
  u8 count_mask;       ///< a shift or rotate by an immediate: which bits of it count; else 0
  s8 adds;             ///< 1 or -1: ADDs or SUBs its immediate to or from a whole register
  bool is_quick;       ///< Translator::quick_step() may know it
  bool is_repeated;    ///< it has a REP prefix
  bool is_locked;
  bool is_repeatable;
  bool sees_x87;  ///< the reference engine may look at x87 registers when it executes it
  bool moves_x87_pointers;

  std::span<const GeneralOperand> general() const { return {registers, register_count}; }
  bool operator==(const GuestInstruction&) const = default;
};

/// Whether the host can load and save its x87 registers alone (XSAVE).
bool can_keep_x87();

/// What the meaning of an instruction's bytes depends on.
struct CodeKind {
  bool supervisor;  ///< of code at CPL 0, else at CPL 3
  bool narrow;      ///< of 32-bit code on flat segments, else of 64-bit code

  unsigned bits() const { return narrow ? 32 : 64; }
};

/// Of what Zydis has decoded from `bytes`.
void analyse(const Decoded& d, const u8* bytes, CodeKind code, GuestInstruction& out);
/// What analyse() leaves open because it depends on which registers and which immediate there are.
void settle(GuestInstruction& out);
/// GuestInstruction::immediate of the last bytes of an instruction.
s32 last_immediate(const u8* tail, unsigned bytes);

}  // namespace anykvm::engine::translate
