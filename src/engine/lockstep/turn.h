// Lockstep executes everything twice, so memory must stand still: CPUs take turns, in the order in which they ask.
#pragma once

#include <atomic>

#include "x86/types.h"

namespace anykvm::engine::lockstep {

class Turns {
 public:
  void take() {
    const u32 mine = next_.fetch_add(1, std::memory_order_relaxed);
    for (u32 now; (now = serving_.load(std::memory_order_acquire)) != mine;)
      serving_.wait(now, std::memory_order_acquire);
  }
  void give() {
    serving_.fetch_add(1, std::memory_order_release);
    serving_.notify_all();
  }

 private:
  std::atomic<u32> next_{0}, serving_{0};
};

}  // namespace anykvm::engine::lockstep
