// What the translator needs to know of one guest instruction.
#pragma once

#include "engine/interpret/handlers.h"

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
  u32 flags_killed = 0;  ///< written whatever the operands
  bool vector = false;   ///< needs the guest's vector registers
};

Analysis analyse(const Decoded& d);

}  // namespace anykvm::engine::translate
