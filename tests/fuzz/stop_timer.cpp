#include "fuzz/stop_timer.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <ctime>

namespace anykvm::fuzz {
namespace {

thread_local std::atomic<kvm_run*> running{nullptr};

void stop(int) {
  if (kvm_run* run = running.load(std::memory_order_relaxed)) const_cast<volatile u8&>(run->immediate_exit) = 1;
}

/// One timer per thread that runs a vCPU.
class ThreadTimer {
 public:
  ThreadTimer() {
    struct sigaction action {};
    action.sa_handler = stop;
    action.sa_flags = SA_ONSTACK;
    if (sigaction(StopTimer::signal_number(), &action, nullptr) != 0) abort();
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = StopTimer::signal_number();
    event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
    if (timer_create(CLOCK_MONOTONIC, &event, &timer_) != 0) abort();
  }
  ~ThreadTimer() { timer_delete(timer_); }
  ThreadTimer(const ThreadTimer&) = delete;
  ThreadTimer& operator=(const ThreadTimer&) = delete;

  void set(u64 ns) {
    // Again and again: the first may come before the vCPU looks.
    const timespec time{0, static_cast<long>(ns)};
    const itimerspec setting{time, time};
    timer_settime(timer_, 0, &setting, nullptr);
  }

 private:
  timer_t timer_;
};

void set_timer(u64 ns) {
  thread_local ThreadTimer timer;
  timer.set(ns);
}

}  // namespace

int StopTimer::signal_number() { return SIGUSR2; }

StopTimer::StopTimer(kvm_run* run, u64 microseconds) {
  running.store(run, std::memory_order_relaxed);
  set_timer(microseconds * 1000);
}

StopTimer::~StopTimer() {
  set_timer(0);
  running.store(nullptr, std::memory_order_relaxed);
}

}  // namespace anykvm::fuzz
