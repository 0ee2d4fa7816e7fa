// Which code must not run on the host CPU as it is: instructions that raise no exception in user mode and show the host
// instead of the guest's machine.
#pragma once

#include "x86/types.h"

namespace anykvm::engine::direct {

/// Where a page has bytes that could be one: the 0F byte's offset. At the ends of a page, what may be part of one.
struct Suspect {
  u16 offset;
  bool at_end;  ///< its first bytes, or (offset 0) those behind the first, are on another page
};

/// Looks for CPUID, XGETBV and RDPID (and SYSENTER where that does not fault) at any alignment. hides_xsave: also for
/// XSAVE and its kin, because the guest has other components than the host. The number that there are; up to `most` of
/// them are in `found`.
unsigned find_suspects(const u8* page, bool hides_xsave, Suspect* found, unsigned most);

}  // namespace anykvm::engine::direct
