// Guest RAM as the client has it, so that other processes can map it (engine/direct): private memory is moved to a
// file, at the addresses that it has. What the client can see of that memory is to stay what it was:
//
// - Only memory is moved that no child of the client inherits (MADV_DONTFORK): nobody can tell then whether it is
//   private. Whatever is unusual about it (huge pages, a lock, a NUMA policy, userfaultfd) leaves it as it is.
// - MADV_DONTNEED has to bring zeros, which it does not with a file. So somebody has to stand before the client's calls
//   on memory and make them by the functions below: the interposer. Nothing is moved without.
// - Memory that the client has unmapped, mapped anew or protected, and memory with userfaultfd, is not for others.
//
// All of it may be called on any thread. No allocation.
#pragma once

#include <sys/types.h>

#include <cstddef>

#include "x86/types.h"

namespace anykvm::os {

/// The client's calls on memory come here from now on.
void watch_client_ram();

/// [begin, begin + size) is guest RAM, page-aligned; it is moved to a file if it can be, its contents with it, and if
/// it is large enough for that to matter. fresh: only if it has no pages yet, because there may be who has pinned them.
void share_client_ram(u8* begin, std::size_t size, bool fresh);

/// Changes whenever memory that was guest RAM has become something else, or may_be_mirrored() a different answer.
u64 client_ram_changes();
/// Whether nothing has become known that keeps this from being mapped by another process, provided it is in a file.
bool may_be_mirrored(const u8* begin, const u8* end);

/// What share_client_ram() has done.
struct ClientRamReport {
  u64 moved;           ///< bytes that are in files now
  const char* reason;  ///< why some memory was left as it is, the last one; nullptr: none was
};
ClientRamReport client_ram_report();

// --- the client's calls, by their names: -errno on failure
long client_madvise(void* begin, std::size_t size, int advice);
long client_munmap(void* begin, std::size_t size);
long client_mmap(void* begin, std::size_t size, int protection, int flags, int fd, off_t offset);
long client_mremap(void* old, std::size_t old_size, std::size_t size, int flags, void* wanted);
long client_mprotect(void* begin, std::size_t size, int protection);
/// Before the memory is registered with a userfaultfd.
void client_watches_faults(u64 begin, u64 size);

/// For the handler of SIGSEGV: the fault is one of a store to memory that is being moved, or was when it was raised; it
/// has been waited for the end of that, and the store may be tried again. Async-signal-safe.
bool was_being_moved(const void* address);

}  // namespace anykvm::os
