// The memfd behind a KVM descriptor. It carries a mark, by which a process that got the descriptor past this library
// (through execve, over a socket) can tell what it is.
#pragma once

#include "abi/fd_table.h"

namespace anykvm::abi {

/// A memfd whose first `size` bytes (whole pages) are the descriptor's own, close-on-exec and sealed. The descriptor,
/// or -errno.
int create_descriptor_file(const char* name, FdKind kind, u64 size = 0);

/// Whether fd is such a file, of this process or another; then what it says.
bool read_mark(int fd, FdKind& kind);

/// What tells two descriptors of one file from those of two; 0 when fd is not open.
u64 file_number(int fd);

}  // namespace anykvm::abi
