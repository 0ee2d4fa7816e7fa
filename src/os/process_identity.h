// Which address space this is. The kernel ties a VM to the address space that created it, and fails every call on it
// from another, as a forked child's is; so do we, without asking for the process id: a page that fork(2) wipes holds
// the identity. A child that shares the memory (vfork, CLONE_VM) keeps it, as it should.
#pragma once

#include <atomic>

#include "x86/types.h"

namespace anykvm::os {

namespace detail {
/// Lives in the page that reads as zeros after fork.
struct WipedOnFork {
  std::atomic<u64> identity;
  std::atomic<u32> lock;
  void* value;
  std::atomic<s32> pid;
};
extern constinit std::atomic<WipedOnFork*> wiped_on_fork;
u64 new_process_identity();
}  // namespace detail

/// Never 0; different in a forked child. One load when it is known. No system call then; the first call in a process
/// may make some.
inline u64 process_identity() {
  if (const auto* page = detail::wiped_on_fork.load(std::memory_order_acquire)) [[likely]]
    if (const u64 identity = page->identity.load(std::memory_order_acquire)) [[likely]]
      return identity;
  return detail::new_process_identity();
}

/// Whether this is a child that shares its parent's memory, but neither its descriptors nor its signal handlers, as
/// between vfork(2) and execve(2): what it changes of those must not change what the parent's memory says about them.
/// One system call. False in a process that has not asked for its process_identity().
bool in_vfork_child();

/// A lock that a forked child finds open, whatever another thread was doing in the parent, around one pointer that it
/// finds null. For short sections without system calls.
class ForkSafeSection {
 public:
  ForkSafeSection();
  ~ForkSafeSection();
  ForkSafeSection(const ForkSafeSection&) = delete;
  ForkSafeSection& operator=(const ForkSafeSection&) = delete;

  void*& value();
};

}  // namespace anykvm::os
