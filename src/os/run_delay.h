// How long a thread has waited for a CPU: the scheduler's run_delay, from /proc/PID/task/TID/schedstat
// (Documentation/scheduler/sched-stats.rst). A client's seccomp filter may forbid its vCPU threads to open files, or to
// ask who they are: the timer thread opens the file, and the vCPU's thread reads it by pread64(2).
#pragma once

#include <pthread.h>

#include <atomic>

#include "os/timer_queue.h"

namespace anykvm::os {

class RunDelay {
 public:
  explicit RunDelay(TimerQueue& opener) : open_(opener, open, this) {}
  RunDelay(const RunDelay&) = delete;
  RunDelay& operator=(const RunDelay&) = delete;
  ~RunDelay();

  /// Nanoseconds that the calling thread has waited since it was made. false: not known, or not yet; a thread's first
  /// call has the file opened. One thread at a time. No allocation; one system call when the file is open.
  bool read(u64& ns);

 private:
  static void open(void* self);

  std::atomic<int> file_{-1};
  std::atomic<int> thread_id_{0};
  pthread_t thread_{};
  Timer open_;  ///< last: it ends before what its callback uses
};

}  // namespace anykvm::os
