// The one table of what is not compared, and why.
#pragma once

#include "isa/forms.h"

namespace anykvm::isa {

struct Leniency {
  u64 flags = 0;               ///< bits of RFLAGS
  bool x87_pointers = false;   ///< FOP, FIP, FDP, which the host's XSAVE drops without a pending exception
  bool too_long = false;       ///< #GP for more than 15 bytes instead of #UD
  bool several_parts = false;  ///< which of #PF, #GP, #SS and #AC, and a page fault's address and direction
};

/// Whether an access to memory raises this exception.
bool is_of_access(u32 trap);

/// The flags that an instruction leaves undefined and that the engine does not take from the host.
u64 undefined_flags_of(ZydisMnemonic mnemonic);

/// What must not be compared of this case, given how it ended on the host. drops_dead_flags: the engine does not keep
/// arithmetic flags over which the code behind an exception writes before it reads any (docs/quirks.md).
Leniency leniency_of(const Case& c, const Outcome& host, bool drops_dead_flags);

/// Where the code and data selectors of the last x87 instruction lie in what such an instruction stores: the state that
/// KVM's API carries has no room for them. Offsets; 0: none.
struct Selectors {
  unsigned code = 0, data = 0;
};
Selectors x87_selectors(const ZydisDecodedInstruction& d, unsigned operand_bits);

/// Behind an instruction that moves RSP. Zen 4 lets EVEX instructions that read a general register (VPBROADCASTW zmm,
/// esp) see RSP as it was before a PUSH or POP: what the host does is not what the guest should see.
bool has_erratum(const ZydisDecodedInstruction& d, const Operands& operands);

/// Instructions that treat RFLAGS.AC in ways of their own: they run without it.
bool ignores_alignment(ZydisMnemonic mnemonic);

}  // namespace anykvm::isa
