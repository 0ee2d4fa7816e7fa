// What the translator needs to know of one guest instruction.
#pragma once

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
  Kind kind = Kind::step_and_end;
  u32 flags_read = all_flags;
  u32 flags_killed = 0;     ///< written whatever the operands
  u8 vectors = no_vectors;  ///< the VectorLevel that it needs
  bool x87 = false;         ///< emitted for the x87 unit, MMX included, which has to be loaded
};

bool has_repeat_prefix(const Decoded& d);
/// Whether Translator::quick_step() may know the instruction.
bool is_quick(const Decoded& d);
/// Whether the host can load and save its x87 registers alone (XSAVE).
bool can_keep_x87();
/// Whether the reference engine may look at x87 registers when it executes the instruction.
bool sees_x87(const Decoded& d);

/// supervisor: of code at CPL 0, else at CPL 3.
Analysis analyse(const Decoded& d, bool supervisor);

}  // namespace anykvm::engine::translate
