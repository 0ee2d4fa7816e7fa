// The local APIC's timer against the real clock. Bounds are one-sided where a busy machine could be late.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "irqchip/fake_apic_client.h"
#include "irqchip/lapic.h"

namespace anykvm::irqchip {
namespace {

using namespace test;
using namespace std::chrono_literals;
using MsrResult = LocalApic::MsrResult;

constexpr u32 ms = 1'000'000;
constexpr u32 divide_by_1 = 0xb, divide_by_2 = 0, divide_by_16 = 3, divide_by_128 = 0xa;
constexpr u32 masked = 1 << 16, periodic = 1 << 17, tsc_deadline = 2 << 17;
constexpr u32 msr_tsc_deadline = 0x6e0;
constexpr u8 vector = 0xec;

class LapicTimerTest : public testing::Test {
 protected:
  LapicTimerTest() { write(apic, reg::divide, divide_by_1); }

  /// The next interrupt, -1 after two seconds without.
  int wait_for_interrupt() {
    for (;;) {
      if (const int taken = apic.acknowledge(); taken >= 0) return taken;
      if (!client.wait_for_wake()) return -1;
    }
  }
  void end() { write(apic, reg::eoi, 0); }
  u64 deadline_msr() {
    u64 value = ~u64{0};
    EXPECT_EQ(apic.read_msr(msr_tsc_deadline, value), MsrResult::ok);
    return value;
  }

  FakeMachine machine{1};
  LocalApic& apic = machine[0];
  FakeApicClient& client = *machine.clients[0];
};

TEST_F(LapicTimerTest, OneShotFiresOnceAndNotEarly) {
  write(apic, reg::lvt_timer, vector);
  const u64 start = os::monotonic_ns();
  write(apic, reg::initial_count, 5 * ms);
  const u32 count = read(apic, reg::current_count);
  EXPECT_LE(count, 5 * ms);
  if (os::monotonic_ns() - start < 4 * ms) {
    EXPECT_GT(count, 0u);
  }
  EXPECT_EQ(wait_for_interrupt(), vector);
  EXPECT_GE(os::monotonic_ns() - start, 5 * ms);
  EXPECT_EQ(read(apic, reg::current_count), 0u);
  end();
  std::this_thread::sleep_for(15ms);
  EXPECT_EQ(apic.pending(), -1);
}

TEST_F(LapicTimerTest, DivideConfiguration) {
  for (auto [code, divisor] : {std::pair{divide_by_1, 1},
                               {divide_by_2, 2},
                               {1u, 4},
                               {2u, 8},
                               {divide_by_16, 16},
                               {8u, 32},
                               {9u, 64},
                               {divide_by_128, 128}}) {
    write(apic, reg::lvt_timer, vector);
    write(apic, reg::divide, code);
    const u64 before = os::monotonic_ns();
    write(apic, reg::initial_count, 1'000'000'000);
    std::this_thread::sleep_for(2ms);
    const u64 counted = 1'000'000'000 - read(apic, reg::current_count);
    const u64 after = os::monotonic_ns();
    EXPECT_GE(counted, 2u * ms / divisor) << divisor;
    EXPECT_LE(counted, (after - before) / divisor + 1) << divisor;
  }
}

TEST_F(LapicTimerTest, CountGoesOnWhenTheDivisorChanges) {
  write(apic, reg::lvt_timer, vector);
  write(apic, reg::initial_count, 1'000'000'000);
  write(apic, reg::divide, divide_by_128);
  const u32 first = read(apic, reg::current_count);
  EXPECT_LE(first, 1'000'000'000u);
  std::this_thread::sleep_for(2ms);
  const u32 second = read(apic, reg::current_count);
  EXPECT_GE(first - second, 2u * ms / 128);
  EXPECT_LT(first - second, 500'000'000u / 128);
}

TEST_F(LapicTimerTest, MaskedTimerCountsButDoesNotInterrupt) {
  write(apic, reg::lvt_timer, masked | vector);
  write(apic, reg::initial_count, 40 * ms);
  EXPECT_GT(read(apic, reg::current_count), 0u);
  std::this_thread::sleep_for(60ms);
  EXPECT_EQ(apic.pending(), -1);
  EXPECT_EQ(read(apic, reg::current_count), 0u);
}

TEST_F(LapicTimerTest, WritingZeroStops) {
  write(apic, reg::lvt_timer, vector);
  write(apic, reg::initial_count, 40 * ms);
  write(apic, reg::initial_count, 0);
  std::this_thread::sleep_for(60ms);
  EXPECT_EQ(apic.pending(), -1);
}

TEST_F(LapicTimerTest, Periodic) {
  write(apic, reg::lvt_timer, periodic | vector);
  const u64 start = os::monotonic_ns();
  write(apic, reg::initial_count, 2 * ms);
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(wait_for_interrupt(), vector);
    EXPECT_GT(read(apic, reg::current_count), 0u);
    end();
  }
  EXPECT_GE(os::monotonic_ns() - start, 10u * ms);
  write(apic, reg::initial_count, 0);
}

TEST_F(LapicTimerTest, PeriodicTicksLostWhileNobodyLooksAreOne) {
  write(apic, reg::lvt_timer, periodic | vector);
  write(apic, reg::initial_count, 100 * ms);
  std::this_thread::sleep_for(250ms);
  EXPECT_EQ(apic.acknowledge(), vector);
  end();
  EXPECT_EQ(apic.pending(), -1);
}

TEST_F(LapicTimerTest, SlowHandlerIsNotStarved) {
  constexpr u64 period = 20 * ms;
  write(apic, reg::lvt_timer, periodic | vector);
  write(apic, reg::initial_count, period);
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(wait_for_interrupt(), vector);
    std::this_thread::sleep_for(30ms);  // longer than the period
    const u64 ended = os::monotonic_ns();
    end();
    ASSERT_EQ(apic.pending(), -1) << "time for something other than ticks";
    ASSERT_EQ(wait_for_interrupt(), vector);
    EXPECT_GE(os::monotonic_ns() - ended, period / 4);
    end();
  }
}

TEST_F(LapicTimerTest, VeryShortPeriodIsLimited) {
  write(apic, reg::lvt_timer, periodic | vector);
  const u64 start = os::monotonic_ns();
  write(apic, reg::initial_count, 1);
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(wait_for_interrupt(), vector);
    end();
  }
  EXPECT_GE(os::monotonic_ns() - start, 700'000u);
}

TEST_F(LapicTimerTest, TscDeadline) {
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, os::monotonic_ns() + ms), MsrResult::ok);
  EXPECT_EQ(deadline_msr(), 0u) << "ignored in the other modes";
  write(apic, reg::lvt_timer, tsc_deadline | vector);
  const u64 deadline = os::monotonic_ns() + 40 * ms;
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, deadline), MsrResult::ok);
  EXPECT_EQ(deadline_msr(), deadline);
  EXPECT_EQ(read(apic, reg::current_count), 0u);
  write(apic, reg::initial_count, 1000);
  EXPECT_EQ(read(apic, reg::initial_count), 0u) << "ignored in this mode";
  EXPECT_EQ(wait_for_interrupt(), vector);
  EXPECT_GE(os::monotonic_ns(), deadline);
  EXPECT_EQ(deadline_msr(), 0u);
  end();
}

TEST_F(LapicTimerTest, TscDeadlineInThePastFiresAtOnceAndZeroDisarms) {
  write(apic, reg::lvt_timer, tsc_deadline | vector);
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, 1), MsrResult::ok);
  EXPECT_EQ(apic.acknowledge(), vector);
  end();
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, os::monotonic_ns() + 40 * ms), MsrResult::ok);
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, 0), MsrResult::ok);
  std::this_thread::sleep_for(60ms);
  EXPECT_EQ(apic.pending(), -1);
}

TEST_F(LapicTimerTest, LeavingDeadlineModeDisarms) {
  write(apic, reg::lvt_timer, tsc_deadline | vector);
  EXPECT_EQ(apic.write_msr(msr_tsc_deadline, os::monotonic_ns() + 40 * ms), MsrResult::ok);
  write(apic, reg::lvt_timer, vector);
  EXPECT_EQ(deadline_msr(), 0u);
  std::this_thread::sleep_for(60ms);
  EXPECT_EQ(apic.pending(), -1);
}

TEST_F(LapicTimerTest, ExpiryBeforeARegisterWriteIsNotLost) {
  write(apic, reg::lvt_timer, vector);
  write(apic, reg::initial_count, 1);
  ASSERT_TRUE(client.wait_for_wake());
  write(apic, reg::lvt_timer, masked | vector);
  EXPECT_EQ(apic.acknowledge(), vector) << "it had expired before the mask";
}

TEST_F(LapicTimerTest, WakesWithinAMillisecond) {
  write(apic, reg::lvt_timer, tsc_deadline | vector);
  u64 best = ~u64{0};
  for (int i = 0; i < 20; ++i) {
    const u64 deadline = os::monotonic_ns() + 2 * ms;
    apic.write_msr(msr_tsc_deadline, deadline);
    ASSERT_EQ(wait_for_interrupt(), vector);
    best = std::min(best, os::monotonic_ns() - deadline);
    end();
  }
  EXPECT_LT(best, ms) << "the best of 20";
}

TEST_F(LapicTimerTest, StateCarriesTheRunningCount) {
  write(apic, reg::lvt_timer, vector);
  write(apic, reg::initial_count, 100 * ms);
  std::this_thread::sleep_for(5ms);
  kvm_lapic_state state;
  apic.get_state(state);
  u32 count;
  std::memcpy(&count, state.regs + reg::current_count, 4);
  EXPECT_GT(count, 0u);
  EXPECT_LE(count, 95 * ms);
  apic.reset();
  const u64 start = os::monotonic_ns();
  EXPECT_EQ(apic.set_state(state), 0);
  EXPECT_EQ(wait_for_interrupt(), vector);
  EXPECT_GE(os::monotonic_ns() - start, count);
}

TEST_F(LapicTimerTest, ResetStops) {
  write(apic, reg::lvt_timer, vector);
  write(apic, reg::initial_count, 40 * ms);
  apic.init();
  write(apic, reg::svr, 0x1ff);
  write(apic, reg::lvt_timer, vector);
  std::this_thread::sleep_for(60ms);
  EXPECT_EQ(apic.pending(), -1);
}

}  // namespace
}  // namespace anykvm::irqchip
