// The VMM's one I/O thread: poll(2) over the descriptors of console, network and disks, timers, and work handed to it.
#pragma once

#include <poll.h>

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "x86/types.h"

namespace anykvm::vmm {

/// A library with a poll loop of its own making (libslirp), asked anew before each wait.
class PollSource {
 public:
  virtual ~PollSource() = default;

  /// Appends the descriptors to wait for; may lower `timeout_ms` (-1: no limit).
  virtual void before_poll(std::vector<pollfd>& fds, int& timeout_ms) = 0;
  /// After each wait: the same entries, with revents.
  virtual void after_poll(std::span<const pollfd> fds) = 0;
};

/// All callbacks run on the loop's thread, one at a time, and must not throw. Every method may be called from any
/// thread, callbacks included. After remove() or cancel() from another thread, a callback that has begun may still be
/// running; from the loop's own thread it will not run again.
class EventLoop {
 public:
  using Callback = std::function<void()>;
  using FdCallback = std::function<void(short revents)>;
  using TimerId = u64;

  EventLoop();
  /// Stops the thread when it runs.
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  /// Starts the thread.
  void start();
  /// Ends the loop and waits for the thread (not when called from it). Pending work is dropped.
  void stop();

  /// Watches `fd` for `events` (POLLIN, POLLOUT); add() on a watched one changes events and callback. With events 0
  /// only errors and hang-ups are reported.
  void add(int fd, short events, FdCallback callback);
  /// Changes what is waited for, keeping the callback; nothing when `fd` is not watched.
  void modify(int fd, short events);
  void remove(int fd);

  /// Adds a source whose descriptors change from wait to wait. It must outlive the loop, or be removed.
  void add_source(PollSource& source);
  void remove_source(PollSource& source);

  /// Calls once, at CLOCK_MONOTONIC `deadline_ns` or soon after.
  TimerId at(u64 deadline_ns, Callback callback);
  void cancel(TimerId id);

  /// Calls on the loop's thread as soon as possible, in the order of the posts.
  void post(Callback callback);

  bool on_loop_thread() const { return std::this_thread::get_id() == thread_id_.load(); }
  static u64 now_ns();

 private:
  struct Watch {
    short events;
    FdCallback callback;
  };
  void run();
  void wake();
  void run_posted();
  void run_timers();
  void run_watches(std::span<const pollfd> fds);

  int wake_fd_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::thread::id> thread_id_{};
  std::thread thread_;

  std::mutex mutex_;  ///< guards all below; never held while a callback runs
  std::map<int, Watch> watches_;
  std::map<std::pair<u64, TimerId>, Callback> timers_;  ///< by deadline
  TimerId next_timer_ = 1;
  std::vector<Callback> posted_;
  std::vector<PollSource*> sources_;
};

}  // namespace anykvm::vmm
