#include "os/timer_queue.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <mutex>
#include <semaphore>
#include <vector>

namespace anykvm::os {
namespace {

using namespace std::chrono_literals;
constexpr u64 ms = 1'000'000;

struct Signal {
  std::counting_semaphore<> fired{0};
  std::atomic<u64> at_ns{0};
  static void callback(void* argument) {
    auto& self = *static_cast<Signal*>(argument);
    self.at_ns = monotonic_ns();
    self.fired.release();
  }
  bool wait() { return fired.try_acquire_for(2s); }
};

TEST(TimerQueue, CallsBackOnceAndNotEarly) {
  TimerQueue queue;
  Signal signal;
  Timer timer(queue, &Signal::callback, &signal);
  const u64 deadline = monotonic_ns() + 5 * ms;
  timer.arm(deadline);
  ASSERT_TRUE(signal.wait());
  EXPECT_GE(signal.at_ns, deadline);
  EXPECT_FALSE(signal.fired.try_acquire_for(20ms));
}

TEST(TimerQueue, IsPrompt) {
  TimerQueue queue;
  queue.start();
  Signal signal;
  Timer timer(queue, &Signal::callback, &signal);
  u64 best = ~u64{0};
  for (int i = 0; i < 20; ++i) {
    const u64 deadline = monotonic_ns() + 2 * ms;
    timer.arm(deadline);
    ASSERT_TRUE(signal.wait());
    best = std::min(best, signal.at_ns - deadline);
  }
  EXPECT_LT(best, ms / 2) << "the best of 20: the machine may be busy, the queue may not be slow";
}

TEST(TimerQueue, PastDeadlineFiresAtOnce) {
  TimerQueue queue;
  Signal signal;
  Timer timer(queue, &Signal::callback, &signal);
  timer.arm(1);
  EXPECT_TRUE(signal.wait());
}

TEST(TimerQueue, EarlierDeadlineOvertakesASleepingThread) {
  TimerQueue queue;
  Signal late, early;
  Timer late_timer(queue, &Signal::callback, &late), early_timer(queue, &Signal::callback, &early);
  late_timer.arm(monotonic_ns() + 60'000 * ms);
  std::this_thread::sleep_for(5ms);
  early_timer.arm(monotonic_ns() + 5 * ms);
  EXPECT_TRUE(early.wait());
  EXPECT_FALSE(late.fired.try_acquire());
}

TEST(TimerQueue, ArmingAgainReplacesTheDeadline) {
  TimerQueue queue;
  Signal signal;
  Timer timer(queue, &Signal::callback, &signal);
  timer.arm(monotonic_ns() + 100 * ms);
  const u64 later = monotonic_ns() + 140 * ms;
  timer.arm(later);
  ASSERT_TRUE(signal.wait());
  EXPECT_GE(signal.at_ns, later);
  timer.arm(monotonic_ns() + 60'000 * ms);
  timer.arm(monotonic_ns() + 5 * ms);
  EXPECT_TRUE(signal.wait());
}

TEST(TimerQueue, CancelledTimerDoesNotFire) {
  TimerQueue queue;
  Signal signal;
  Timer timer(queue, &Signal::callback, &signal);
  timer.arm(monotonic_ns() + 100 * ms);
  timer.cancel();
  EXPECT_FALSE(signal.fired.try_acquire_for(140ms));
}

TEST(TimerQueue, CancelWaitsForARunningCallback) {
  struct Slow {
    std::binary_semaphore entered{0};
    std::atomic<bool> left{false};
  } slow;
  TimerQueue queue;
  Timer timer(
      queue,
      [](void* argument) {
        auto& self = *static_cast<Slow*>(argument);
        self.entered.release();
        std::this_thread::sleep_for(20ms);
        self.left = true;
      },
      &slow);
  timer.arm(1);
  ASSERT_TRUE(slow.entered.try_acquire_for(2s));
  timer.cancel();
  EXPECT_TRUE(slow.left);
}

TEST(TimerQueue, CallbackMayArmAndCancelItself) {
  struct Periodic {
    Timer* timer = nullptr;
    std::atomic<int> count{0};
    std::binary_semaphore done{0};
  } periodic;
  TimerQueue queue;
  Timer timer(
      queue,
      [](void* argument) {
        auto& self = *static_cast<Periodic*>(argument);
        if (++self.count < 5) return self.timer->arm(monotonic_ns() + ms);
        self.timer->arm(monotonic_ns() + ms);
        self.timer->cancel();
        self.done.release();
      },
      &periodic);
  periodic.timer = &timer;
  timer.arm(1);
  ASSERT_TRUE(periodic.done.try_acquire_for(2s));
  std::this_thread::sleep_for(10ms);
  EXPECT_EQ(periodic.count, 5);
}

TEST(TimerQueue, ManyTimersFireInOrder) {
  struct Log {
    std::mutex mutex;
    std::vector<int> order;
    std::counting_semaphore<> fired{0};
  } log;
  struct Entry {
    Log* log;
    int index;
    static void callback(void* argument) {
      auto& self = *static_cast<Entry*>(argument);
      std::lock_guard lock(self.log->mutex);
      self.log->order.push_back(self.index);
      self.log->fired.release();
    }
  };
  constexpr int count = 50;
  TimerQueue queue;
  std::vector<Entry> entries;
  for (int i = 0; i < count; ++i) entries.push_back({&log, i});
  std::vector<std::unique_ptr<Timer>> timers;
  for (Entry& entry : entries) timers.push_back(std::make_unique<Timer>(queue, &Entry::callback, &entry));
  const u64 start = monotonic_ns() + 300 * ms;  // all are armed by then
  for (int i = 0; i < count; ++i) {
    const int shuffled = i * 17 % count;
    timers[shuffled]->arm(start + static_cast<u64>(shuffled) * ms / 10);
  }
  for (int i = 0; i < count; i += 2) timers[i]->cancel();
  for (int i = 1; i < count; i += 2) ASSERT_TRUE(log.fired.try_acquire_for(2s));
  std::lock_guard lock(log.mutex);
  EXPECT_EQ(log.order.size(), count / 2u);
  EXPECT_TRUE(std::is_sorted(log.order.begin(), log.order.end()));
}

TEST(TimerQueue, ThreadBlocksSignalsAndHasAName) {
  struct Seen {
    sigset_t mask;
    char name[16] = {};
    long slack = 0;
    std::binary_semaphore done{0};
  } seen;
  TimerQueue queue;
  Timer timer(
      queue,
      [](void* argument) {
        auto& self = *static_cast<Seen*>(argument);
        pthread_sigmask(SIG_BLOCK, nullptr, &self.mask);
        pthread_getname_np(pthread_self(), self.name, sizeof self.name);
        self.slack = prctl(PR_GET_TIMERSLACK);
        self.done.release();
      },
      &seen);
  timer.arm(1);
  ASSERT_TRUE(seen.done.try_acquire_for(2s));
  EXPECT_TRUE(sigismember(&seen.mask, SIGUSR1));
  EXPECT_TRUE(sigismember(&seen.mask, SIGALRM));
  EXPECT_STREQ(seen.name, "anykvm-timer");
  EXPECT_EQ(seen.slack, 1);
  sigset_t mine;
  pthread_sigmask(SIG_BLOCK, nullptr, &mine);
  EXPECT_FALSE(sigismember(&mine, SIGUSR1));
}

TEST(TimerQueue, ManyQueuesAreCheap) {
  const u64 start = monotonic_ns();
  for (int i = 0; i < 200; ++i) {
    TimerQueue queue;
    queue.start();
  }
  EXPECT_LT(monotonic_ns() - start, 2000 * ms);
}

}  // namespace
}  // namespace anykvm::os
