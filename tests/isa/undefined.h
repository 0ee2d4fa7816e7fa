// The one table of what is not compared, and why.
#pragma once

#include <Zydis/Zydis.h>

#include "isa/state.h"

namespace anykvm::isa {

struct Leniency {
  u64 flags = 0;              ///< bits of RFLAGS
  bool x87_pointers = false;  ///< FOP, FIP, FDP
  bool in_use = false;        ///< XINUSE
};

/// What must not be compared of this case, given how it ended on the host.
Leniency leniency_of(const Case& c, const Outcome& host);

/// Instructions whose memory operand the host does not check for alignment under RFLAGS.AC: they run without it.
bool ignores_alignment(ZydisMnemonic mnemonic);

}  // namespace anykvm::isa
