// Deadlines on the host's monotonic clock: one thread per virtual machine sleeps until the earliest of them and calls
// back. What counts is the time from the deadline to the callback (a halted vCPU must wake within a millisecond) and
// that arming a timer, which guests do thousands of times a second, costs no system call as a rule.
//
// The thread sleeps until the deadline it saw last; a timer armed for later, or cancelled, does not wake it, it looks
// again when that time has come. Only an earlier deadline wakes it.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "os/clock.h"
#include "x86/types.h"

namespace anykvm::os {

class Timer;

class TimerQueue {
 public:
  TimerQueue() = default;
  /// Joins the thread. Every Timer of the queue must be gone.
  ~TimerQueue();
  TimerQueue(const TimerQueue&) = delete;
  TimerQueue& operator=(const TimerQueue&) = delete;

  /// Starts the thread now rather than at the first arm(): a client may forbid clone(2) to its vCPU threads (seccomp)
  /// before the first KVM_RUN. No effect when it runs. Any thread.
  void start();

 private:
  friend class Timer;

  void register_timer();
  void unregister_timer();
  void start_locked();
  void arm(Timer& timer, u64 deadline_ns);
  void remove(Timer& timer);
  void cancel(Timer& timer, bool wait);
  void run();

  // A binary min-heap of armed timers. Its capacity is reserved when a Timer is made, so that arming never allocates.
  void sift_up(size_t index);
  void sift_down(size_t index);
  void place(size_t index, Timer* timer);

  std::mutex mutex_;
  std::condition_variable work_;  ///< an earlier deadline, or stop
  std::condition_variable done_;  ///< a callback has returned
  std::vector<Timer*> heap_;
  size_t timers_ = 0;
  u64 sleeping_until_ = 0;  ///< 0: the thread is awake and will look at the heap
  Timer* running_ = nullptr;
  bool stop_ = false;
  std::thread thread_;
};

/// One deadline and what happens then. Methods may be called from any thread, the callback included.
class Timer {
 public:
  /// Runs on the queue's thread with all signals blocked and no lock of the queue held. It must be short, and it may
  /// arm or cancel timers.
  using Callback = void (*)(void* argument);

  Timer(TimerQueue& queue, Callback callback, void* argument);
  ~Timer();  ///< cancel(); not from the callback
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  /// Calls back once, as soon as monotonic_ns() >= deadline_ns; replaces an earlier deadline. A callback that is just
  /// running is not held back.
  void arm(u64 deadline_ns) { queue_.arm(*this, deadline_ns); }

  /// The timer is not armed any more, and its callback has returned (unless this is called from it): the caller must
  /// hold no lock that the callback takes.
  void cancel() { queue_.cancel(*this, true); }

  /// As cancel(), but does not wait: the callback may be running, and must find out for itself that it is stale.
  void cancel_without_waiting() { queue_.cancel(*this, false); }

 private:
  friend class TimerQueue;
  static constexpr size_t not_armed = ~size_t{0};

  TimerQueue& queue_;
  Callback callback_;
  void* argument_;
  u64 deadline_ns_ = 0;
  size_t heap_index_ = not_armed;
};

}  // namespace anykvm::os
