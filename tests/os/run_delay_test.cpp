// The scheduler's account of a thread's waiting.
#include "os/run_delay.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "os/wait_for_cpu.h"

namespace anykvm::os {
namespace {

bool eventually_known(RunDelay& delay, u64& ns) {
  for (int i = 0; i < 5000; ++i) {
    if (delay.read(ns)) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

TEST(RunDelay, GrowsWhileTheThreadWaits) {
  TimerQueue timers;
  RunDelay delay(timers);
  u64 before = 0, after = 0;
  EXPECT_FALSE(delay.read(before)) << "the file is opened first";
  ASSERT_TRUE(eventually_known(delay, before));
  test::wait_for_cpu(5'000'000);
  ASSERT_TRUE(delay.read(after));
  EXPECT_GE(after, before + 5'000'000);
}

TEST(RunDelay, IsThatOfTheThreadThatAsks) {
  TimerQueue timers;
  RunDelay delay(timers);
  u64 mine = 0, of_other = 0, others_own = 0;
  ASSERT_TRUE(eventually_known(delay, mine));
  test::wait_for_cpu(5'000'000);
  std::thread other([&] {
    EXPECT_TRUE(eventually_known(delay, of_other));
    others_own = test::own_run_delay_ns();
  });
  other.join();
  EXPECT_LE(of_other, others_own);
}

}  // namespace
}  // namespace anykvm::os
