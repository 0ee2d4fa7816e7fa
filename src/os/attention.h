// The word by which any thread makes a vCPU's look up: not 0 when somebody wants it to. While that thread sleeps in the
// middle of running the guest, the word says so, and whoever raises it wakes the thread.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "x86/types.h"

namespace anykvm::os {

inline constexpr u32 attention_raised = 1, attention_sleeps = 2;

/// Any thread. Async-signal-safe. A system call only where the vCPU's thread sleeps.
inline void raise_attention(std::atomic<u32>& attention) {
  if (attention.exchange(attention_raised, std::memory_order_seq_cst) == attention_sleeps)
    syscall(SYS_futex, &attention, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, nullptr, nullptr, 0);
}

}  // namespace anykvm::os
