// Which memory of this process another could map, too: shared mappings of files that it has open.
#pragma once

#include <cstddef>

#include "x86/types.h"

namespace anykvm::os {

struct SharedMapping {
  u8* begin;
  u8* end;
  int fd;      ///< open for reading and writing
  u64 offset;  ///< of begin in the file
};

/// The parts of [begin, end) that are shared mappings, to read and to write, of files with a descriptor, in ascending
/// order; at most `most` of them. Reads /proc/self/maps. No allocation, some system calls.
unsigned find_shared_mappings(const u8* begin, const u8* end, SharedMapping* found, unsigned most);

}  // namespace anykvm::os
