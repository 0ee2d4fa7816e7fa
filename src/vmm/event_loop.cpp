// poll(2) with an eventfd to break the wait when another thread changed what is waited for.
#include "vmm/event_loop.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "os/signals_blocked.h"

namespace anykvm::vmm {

u64 EventLoop::now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return u64(now.tv_sec) * 1'000'000'000 + u64(now.tv_nsec);
}

EventLoop::EventLoop() : wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

EventLoop::~EventLoop() {
  stop();
  close(wake_fd_);
}

void EventLoop::start() {
  const os::SignalsBlocked blocked;
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "anykvm-io");
}

void EventLoop::stop() {
  stopping_ = true;
  wake();
  if (thread_.joinable() && !on_loop_thread()) thread_.join();
}

void EventLoop::wake() {
  const u64 one = 1;
  [[maybe_unused]] const auto written = ::write(wake_fd_, &one, sizeof one);
}

void EventLoop::add(int fd, short events, FdCallback callback) {
  {
    const std::scoped_lock lock(mutex_);
    watches_[fd] = {events, std::move(callback)};
  }
  wake();
}

void EventLoop::modify(int fd, short events) {
  {
    const std::scoped_lock lock(mutex_);
    const auto watch = watches_.find(fd);
    if (watch == watches_.end()) return;
    watch->second.events = events;
  }
  wake();
}

void EventLoop::remove(int fd) {
  {
    const std::scoped_lock lock(mutex_);
    watches_.erase(fd);
  }
  wake();
}

void EventLoop::add_source(PollSource& source) {
  {
    const std::scoped_lock lock(mutex_);
    sources_.push_back(&source);
  }
  wake();
}

void EventLoop::remove_source(PollSource& source) {
  {
    const std::scoped_lock lock(mutex_);
    std::erase(sources_, &source);
  }
  wake();
}

EventLoop::TimerId EventLoop::at(u64 deadline_ns, Callback callback) {
  TimerId id;
  {
    const std::scoped_lock lock(mutex_);
    id = next_timer_++;
    timers_.emplace(std::pair{deadline_ns, id}, std::move(callback));
  }
  if (!on_loop_thread()) wake();
  return id;
}

void EventLoop::cancel(TimerId id) {
  const std::scoped_lock lock(mutex_);
  std::erase_if(timers_, [&](const auto& timer) { return timer.first.second == id; });
}

void EventLoop::post(Callback callback) {
  {
    const std::scoped_lock lock(mutex_);
    posted_.push_back(std::move(callback));
  }
  wake();
}

void EventLoop::run_posted() {
  std::vector<Callback> work;
  {
    const std::scoped_lock lock(mutex_);
    work.swap(posted_);
  }
  for (const Callback& callback : work) callback();
}

void EventLoop::run_timers() {
  for (const u64 now = now_ns();;) {
    Callback callback;
    {
      const std::scoped_lock lock(mutex_);
      if (timers_.empty() || timers_.begin()->first.first > now) return;
      callback = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
    }
    callback();
  }
}

void EventLoop::run_watches(std::span<const pollfd> fds) {
  for (const pollfd& ready : fds) {
    if (ready.revents == 0) continue;
    FdCallback callback;
    {
      const std::scoped_lock lock(mutex_);
      const auto watch = watches_.find(ready.fd);  // an earlier callback may have removed it
      if (watch == watches_.end()) continue;
      callback = watch->second.callback;
    }
    callback(ready.revents);
  }
}

void EventLoop::run() {
  thread_id_ = std::this_thread::get_id();
  std::vector<pollfd> fds;
  std::vector<PollSource*> sources;
  std::vector<size_t> source_begin;
  while (!stopping_) {
    int timeout_ms = -1;
    fds.clear();
    fds.push_back({wake_fd_, POLLIN, 0});
    {
      const std::scoped_lock lock(mutex_);
      for (const auto& [fd, watch] : watches_) fds.push_back({fd, watch.events, 0});
      sources = sources_;
      if (!timers_.empty()) {
        const u64 now = now_ns(), deadline = timers_.begin()->first.first;
        const u64 wait_ms = deadline > now ? (deadline - now + 999'999) / 1'000'000 : 0;
        timeout_ms = int(std::min<u64>(wait_ms, 1'000'000));
      }
    }
    const size_t own = fds.size();
    source_begin.clear();
    for (PollSource* source : sources) {
      source_begin.push_back(fds.size());
      source->before_poll(fds, timeout_ms);
    }
    source_begin.push_back(fds.size());

    if (poll(fds.data(), fds.size(), timeout_ms) < 0) {
      if (errno != EINTR && errno != EAGAIN) break;
      for (pollfd& entry : fds) entry.revents = 0;
    }
    if (fds[0].revents) {
      u64 count;
      [[maybe_unused]] const auto drained = ::read(wake_fd_, &count, sizeof count);
    }
    run_posted();
    run_timers();
    const std::span<const pollfd> all(fds);
    run_watches(all.subspan(1, own - 1));
    for (size_t i = 0; i < sources.size(); ++i)
      sources[i]->after_poll(all.subspan(source_begin[i], source_begin[i + 1] - source_begin[i]));
  }
  thread_id_ = std::thread::id{};
}

}  // namespace anykvm::vmm
