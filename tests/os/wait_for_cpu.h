// A thread that wants to run and may not.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "os/clock.h"

namespace anykvm::test {

/// The calling thread's run_delay, by its own reading.
inline u64 own_run_delay_ns() {
  u64 ran = 0, waited = 0;
  std::ifstream("/proc/thread-self/schedstat") >> ran >> waited;
  return waited;
}

/// Shares one CPU with a busy thread until the calling thread has waited this long for it; ten seconds at most.
inline void wait_for_cpu(u64 ns) {
  cpu_set_t before, one;
  pthread_getaffinity_np(pthread_self(), sizeof before, &before);
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
  std::atomic<bool> stop{false};
  const u64 begin = own_run_delay_ns(), give_up = os::monotonic_ns() + 10'000'000'000;
  std::thread rival([&] {
    while (!stop) {
    }
  });
  while (own_run_delay_ns() - begin < ns && os::monotonic_ns() < give_up) sched_yield();
  stop = true;
  rival.join();
  pthread_setaffinity_np(pthread_self(), sizeof before, &before);
}

}  // namespace anykvm::test
