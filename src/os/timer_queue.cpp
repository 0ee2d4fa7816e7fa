// See timer_queue.h.
#include "os/timer_queue.h"

#include <pthread.h>
#include <sys/prctl.h>

#include <chrono>
#include <utility>

#include "os/signals_blocked.h"

namespace anykvm::os {

namespace {
constexpr u64 forever = ~u64{0};

std::chrono::steady_clock::time_point time_point(u64 ns) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}
}  // namespace

TimerQueue::~TimerQueue() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void TimerQueue::start() {
  std::lock_guard lock(mutex_);
  start_locked();
}

void TimerQueue::start_locked() {
  if (thread_.joinable()) return;
  const SignalsBlocked blocked;
  thread_ = std::thread(&TimerQueue::run, this);
}

void TimerQueue::register_timer() {
  std::lock_guard lock(mutex_);
  heap_.reserve(++timers_);
}

void TimerQueue::unregister_timer() {
  std::lock_guard lock(mutex_);
  --timers_;
}

void TimerQueue::arm(Timer& timer, u64 deadline_ns) {
  bool wake = false;
  {
    std::lock_guard lock(mutex_);
    start_locked();
    timer.deadline_ns_ = deadline_ns;
    if (timer.heap_index_ == Timer::not_armed) {
      heap_.push_back(&timer);
      timer.heap_index_ = heap_.size() - 1;
    }
    sift_up(timer.heap_index_);
    sift_down(timer.heap_index_);
    if (deadline_ns < sleeping_until_) {
      sleeping_until_ = 0;  // it will look at the heap: one wake-up is enough
      wake = true;
    }
  }
  if (wake) work_.notify_one();
}

void TimerQueue::remove(Timer& timer) {
  const size_t index = std::exchange(timer.heap_index_, Timer::not_armed);
  Timer* last = heap_.back();
  heap_.pop_back();
  if (last == &timer) return;
  place(index, last);
  sift_up(index);
  sift_down(last->heap_index_);
}

void TimerQueue::cancel(Timer& timer, bool wait) {
  std::unique_lock lock(mutex_);
  if (timer.heap_index_ != Timer::not_armed) remove(timer);
  if (!wait || running_ != &timer || std::this_thread::get_id() == thread_.get_id()) return;
  done_.wait(lock, [&] { return running_ != &timer; });
  if (timer.heap_index_ != Timer::not_armed) remove(timer);  // the callback has armed it again
}

void TimerQueue::run() {
  pthread_setname_np(pthread_self(), "anykvm-timer");
  prctl(PR_SET_TIMERSLACK, 1ul);  // ns; the default of 50 us would be added to every deadline
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (heap_.empty()) {
      sleeping_until_ = forever;
      work_.wait(lock);
    } else if (Timer* timer = heap_.front(); timer->deadline_ns_ > monotonic_ns()) {
      sleeping_until_ = timer->deadline_ns_;
      work_.wait_until(lock, time_point(timer->deadline_ns_));
    } else {
      remove(*timer);
      running_ = timer;
      lock.unlock();
      timer->callback_(timer->argument_);
      lock.lock();
      running_ = nullptr;
      done_.notify_all();
    }
    sleeping_until_ = 0;
  }
}

void TimerQueue::place(size_t index, Timer* timer) {
  heap_[index] = timer;
  timer->heap_index_ = index;
}

void TimerQueue::sift_up(size_t index) {
  Timer* timer = heap_[index];
  while (index != 0) {
    const size_t parent = (index - 1) / 2;
    if (heap_[parent]->deadline_ns_ <= timer->deadline_ns_) break;
    place(index, heap_[parent]);
    index = parent;
  }
  place(index, timer);
}

void TimerQueue::sift_down(size_t index) {
  Timer* timer = heap_[index];
  for (;;) {
    size_t child = 2 * index + 1;
    if (child >= heap_.size()) break;
    if (child + 1 < heap_.size() && heap_[child + 1]->deadline_ns_ < heap_[child]->deadline_ns_) ++child;
    if (timer->deadline_ns_ <= heap_[child]->deadline_ns_) break;
    place(index, heap_[child]);
    index = child;
  }
  place(index, timer);
}

Timer::Timer(TimerQueue& queue, Callback callback, void* argument)
    : queue_(queue), callback_(callback), argument_(argument) {
  queue_.register_timer();
}

Timer::~Timer() {
  cancel();
  queue_.unregister_timer();
}

}  // namespace anykvm::os
