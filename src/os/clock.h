// The host's monotonic clock, in which every timer of a machine is kept, and that of a thread's CPU time.
#pragma once

#include <ctime>

#include "x86/types.h"

namespace anykvm::os {

/// CLOCK_MONOTONIC in nanoseconds. Answered by the vDSO: no system call. Async-signal-safe.
inline u64 monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

/// CPU time that this thread has had, in nanoseconds. A system call.
inline u64 thread_cpu_ns() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

}  // namespace anykvm::os
