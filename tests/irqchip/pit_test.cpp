// The 8254 by its ports, against the real clock. Bounds are one-sided where a busy machine could be late.
#include "irqchip/pit.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <thread>

#include "os/clock.h"

namespace anykvm::irqchip {
namespace {

using namespace std::chrono_literals;
constexpr u64 ms = 1'000'000;
constexpr u16 control = 0x43, speaker = 0x61;

struct FakeOutput : PitOutput {
  bool pulse_irq0() override {
    ++pulses;
    return !masked;
  }
  std::atomic<int> pulses{0};
  std::atomic<bool> masked{false};
};

class PitTest : public testing::Test {
 protected:
  void program(unsigned channel, unsigned mode, u16 count, bool bcd = false) {
    pit.write(control, static_cast<u8>(channel << 6 | 0x30 | mode << 1 | bcd));
    pit.write(0x40 + channel, static_cast<u8>(count));
    pit.write(0x40 + channel, static_cast<u8>(count >> 8));
  }
  u16 count(unsigned channel) {
    pit.write(control, static_cast<u8>(channel << 6));
    const u8 low = pit.read(0x40 + channel);
    return static_cast<u16>(low | pit.read(0x40 + channel) << 8);
  }
  u8 status(unsigned channel) {
    pit.write(control, static_cast<u8>(0xe0 | 2 << channel));
    return pit.read(0x40 + channel);
  }
  bool out2() { return pit.read(speaker) & 0x20; }
  static bool eventually(const std::function<bool()>& what) {
    for (const u64 end = os::monotonic_ns() + 2000 * ms; os::monotonic_ns() < end; std::this_thread::sleep_for(200us))
      if (what()) return true;
    return what();
  }
  /// Ends each tick as a guest does, until there were so many.
  bool serve(int ticks) {
    int ended = 0;
    return eventually([&] {
      for (; ended < output.pulses && ended < ticks; ++ended) pit.tick_ended();
      return ended >= ticks;
    });
  }

  os::TimerQueue timers;
  FakeOutput output;
  Pit pit{timers, output, true};
};

TEST_F(PitTest, Ports) {
  for (u16 port : {0x40, 0x41, 0x42, 0x43, 0x61}) EXPECT_TRUE(pit.covers(port, 1)) << port;
  for (u16 port : {0x3f, 0x44, 0x60, 0x62}) EXPECT_FALSE(pit.covers(port, 1)) << port;
  Pit silent(timers, output, false);
  EXPECT_FALSE(silent.covers(speaker, 1));
}

TEST_F(PitTest, CountsDownAtItsFrequency) {
  pit.write(speaker, 1);
  program(2, 0, 0xffff);
  u64 elapsed;
  u16 first, second;
  do {  // a machine so busy that the counter has wrapped says nothing
    program(2, 0, 0xffff);
    const u64 start = os::monotonic_ns();
    first = count(2);
    std::this_thread::sleep_for(10ms);
    second = count(2);
    elapsed = os::monotonic_ns() - start;
  } while (elapsed > 50 * ms);
  EXPECT_GE(first - second, 11900);
  EXPECT_LE(static_cast<u64>(first - second), elapsed * Pit::frequency_hz / 1'000'000'000 + 2);
}

TEST_F(PitTest, Mode0RaisesOutAtTerminalCount) {
  pit.write(speaker, 1);
  program(2, 0, 47727);  // 40 ms
  EXPECT_FALSE(out2());
  const u64 start = os::monotonic_ns();
  EXPECT_TRUE(eventually([&] { return out2(); }));
  EXPECT_GE(os::monotonic_ns() - start, 39 * ms);
  EXPECT_GT(count(2), 0x8000) << "it counts on below 0";
}

TEST_F(PitTest, GateStopsMode0) {
  program(2, 0, 2400);  // 2 ms, but the gate is down
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(out2());
  EXPECT_EQ(count(2), 2400);
  pit.write(speaker, 1);
  EXPECT_EQ(pit.read(speaker) & 3, 1);
  EXPECT_TRUE(eventually([&] { return out2(); }));
  pit.write(speaker, 0);
  EXPECT_TRUE(out2());
  const u16 stopped = count(2);
  std::this_thread::sleep_for(2ms);
  EXPECT_EQ(count(2), stopped);
}

TEST_F(PitTest, Mode1IsTriggeredByTheGate) {
  program(2, 1, 47727);  // 40 ms
  EXPECT_TRUE(out2());
  pit.write(speaker, 1);
  EXPECT_FALSE(out2());
  EXPECT_TRUE(eventually([&] { return out2(); }));
  pit.write(speaker, 0);
  pit.write(speaker, 1);
  EXPECT_FALSE(out2()) << "and again";
}

TEST_F(PitTest, Mode4CountsFromTheLoadAndWhileTheGateIsUp) {
  pit.write(speaker, 1);
  program(2, 4, 47727);  // 40 ms
  EXPECT_EQ(status(2) >> 1 & 7, 4);
  EXPECT_TRUE(out2()) << "high but for the strobe";
  EXPECT_TRUE(eventually([&] { return count(2) < 47727; }));
  pit.write(speaker, 0);
  const u16 stopped = count(2);
  std::this_thread::sleep_for(2ms);
  EXPECT_EQ(count(2), stopped);
  pit.write(speaker, 1);
  EXPECT_TRUE(eventually([&] { return count(2) > 0xf000; })) << "it counts on below 0";
  EXPECT_TRUE(out2());
}

TEST_F(PitTest, Mode5CountsFromEachRiseOfTheGate) {
  pit.write(speaker, 1);
  program(2, 5, 60000);
  std::this_thread::sleep_for(2ms);
  EXPECT_EQ(count(2), 60000) << "the gate was up already";
  pit.write(speaker, 0);
  pit.write(speaker, 1);
  EXPECT_TRUE(eventually([&] { return count(2) < 58000; }));
  pit.write(speaker, 0);
  EXPECT_LT(count(2), 58000) << "a fall does not stop it";
  const u64 start = os::monotonic_ns();
  pit.write(speaker, 1);
  const u16 restarted = count(2);
  const u64 elapsed = os::monotonic_ns() - start;
  EXPECT_GE(restarted + elapsed * Pit::frequency_hz / 1'000'000'000 + 2, 60000u);
  EXPECT_TRUE(out2());
}

TEST_F(PitTest, Modes2And3Reload) {
  pit.write(speaker, 1);
  for (unsigned mode : {2u, 3u, 6u, 7u}) {
    program(2, mode, 1000);
    for (int i = 0; i < 200; ++i) {
      const u16 value = count(2);
      EXPECT_GE(value, 1);
      EXPECT_LE(value, 1000);
      std::this_thread::sleep_for(20us);
    }
    EXPECT_EQ(status(2) >> 1 & 7, mode & 3);
  }
  bool high = false, low = false;
  EXPECT_TRUE(eventually([&] {
    out2() ? high = true : low = true;
    return high && low;
  })) << "mode 3 is a square wave";
}

TEST_F(PitTest, LowerBytesOnlyAndUpperBytesOnly) {
  pit.write(control, 0x90);  // channel 2, low byte, mode 0; the gate is down
  pit.write(0x42, 0x55);
  EXPECT_EQ(pit.read(0x42), 0x55);
  EXPECT_EQ(pit.read(0x42), 0x55);
  pit.write(control, 0xa0);  // high byte
  pit.write(0x42, 0x12);
  EXPECT_EQ(pit.read(0x42), 0x12);
}

TEST_F(PitTest, ReadsAlternateBytes) {
  program(2, 0, 0x1234);
  EXPECT_EQ(pit.read(0x42), 0x34);
  EXPECT_EQ(pit.read(0x42), 0x12);
  EXPECT_EQ(pit.read(0x42), 0x34);
}

TEST_F(PitTest, LatchHoldsWhileTheCounterRuns) {
  pit.write(speaker, 1);
  program(2, 2, 0xffff);
  pit.write(control, 0x80);
  std::this_thread::sleep_for(2ms);
  pit.write(control, 0x80);  // ignored: the first latch is unread
  const u8 low = pit.read(0x42);
  const u16 latched = static_cast<u16>(low | pit.read(0x42) << 8);
  EXPECT_GE(static_cast<u16>(latched - count(2)), 2000);
}

TEST_F(PitTest, ReadBack) {
  program(2, 0, 0x1234);
  pit.write(control, 0xc8);  // status and count of channel 2
  EXPECT_EQ(pit.read(0x42), 0x30) << "OUT low, loaded, low then high, mode 0, binary";
  EXPECT_EQ(pit.read(0x42), 0x34);
  EXPECT_EQ(pit.read(0x42), 0x12);
  pit.write(control, 0xb6);  // mode 3, count still to come
  EXPECT_EQ(status(2), 0xf6) << "OUT high, null count";
  pit.write(0x42, 0);
  EXPECT_EQ(status(2) & 0x40, 0x40) << "half a count is none";
  pit.write(0x42, 1);
  EXPECT_EQ(status(2) & 0x40, 0);
}

TEST_F(PitTest, Bcd) {
  program(2, 0, 0x1234, true);
  EXPECT_EQ(count(2), 0x1234);
  EXPECT_EQ(status(2) & 1, 1);
  kvm_pit_state2 state;
  pit.get_state(state);
  EXPECT_EQ(state.channels[2].count, 1234u);
  program(2, 0, 0, true);
  pit.get_state(state);
  EXPECT_EQ(state.channels[2].count, 10000u);
}

TEST_F(PitTest, SpeakerPort) {
  EXPECT_EQ(pit.read(speaker) & 3, 0);
  pit.write(speaker, 3);
  EXPECT_EQ(pit.read(speaker) & 3, 3);
  kvm_pit_state2 state;
  pit.get_state(state);
  EXPECT_EQ(state.flags, u32{KVM_PIT_FLAGS_SPEAKER_DATA_ON});
  bool high = false, low = false;
  EXPECT_TRUE(eventually([&] {
    pit.read(speaker)& 0x10 ? high = true : low = true;
    return high && low;
  })) << "the refresh bit toggles";
}

TEST_F(PitTest, PeriodicInterrupts) {
  const u64 start = os::monotonic_ns();
  program(0, 2, 2386);  // 2 ms
  EXPECT_TRUE(serve(5));
  EXPECT_GE(os::monotonic_ns() - start, 9 * ms);
  pit.write(control, 0x30);  // stops until a count comes
  std::this_thread::sleep_for(5ms);
  const int pulses = output.pulses;
  std::this_thread::sleep_for(10ms);
  EXPECT_EQ(output.pulses, pulses);
}

TEST_F(PitTest, OneShotInterrupt) {
  program(0, 0, 2386);
  EXPECT_TRUE(serve(1));
  std::this_thread::sleep_for(10ms);
  EXPECT_EQ(output.pulses, 1);
}

TEST_F(PitTest, OwedTicksAreGivenAfterTheEndOfTheLast) {
  program(0, 2, 59659);  // 50 ms
  EXPECT_TRUE(eventually([&] { return output.pulses == 1; }));
  std::this_thread::sleep_for(220ms);
  EXPECT_EQ(output.pulses, 1) << "the guest has not ended the first";
  const u64 start = os::monotonic_ns();
  pit.tick_ended();
  EXPECT_EQ(output.pulses, 1) << "not at once: the guest gets time of its own";
  EXPECT_TRUE(serve(5));
  EXPECT_GE(os::monotonic_ns() - start, 4 * 12 * ms);
}

TEST_F(PitTest, WithoutReinjectionEveryTickIsPulsed) {
  pit.set_reinject(false);
  program(0, 2, 2386);
  EXPECT_TRUE(eventually([&] { return output.pulses >= 4; }));
}

TEST_F(PitTest, MaskedTicksAreNotOwed) {
  output.masked = true;
  program(0, 2, 11932);
  EXPECT_TRUE(eventually([&] { return output.pulses >= 3; })) << "each is tried";
  output.masked = false;
  const int before = output.pulses;
  EXPECT_TRUE(eventually([&] { return output.pulses >= before + 1; }));
  pit.tick_ended();
}

TEST_F(PitTest, TickThatIsNeverEndedDoesNotStopTheClock) {
  program(0, 2, 1193);  // 1 ms
  EXPECT_TRUE(eventually([&] { return output.pulses >= 3; }));
}

TEST_F(PitTest, UnmaskingForgetsTheUnanswered) {
  program(0, 2, 23864);  // 20 ms
  EXPECT_TRUE(eventually([&] { return output.pulses == 1; }));
  pit.irq0_unmasked();
  EXPECT_TRUE(eventually([&] { return output.pulses >= 2; }));
}

TEST_F(PitTest, HpetLegacyModeSilencesChannel0) {
  kvm_pit_state2 state;
  pit.get_state(state);
  state.flags = KVM_PIT_FLAGS_HPET_LEGACY;
  pit.set_state(state);
  program(0, 2, 1193);
  std::this_thread::sleep_for(10ms);
  EXPECT_EQ(output.pulses, 0);
}

TEST_F(PitTest, StateAtPowerOn) {
  kvm_pit_state2 state;
  pit.get_state(state);
  for (const kvm_pit_channel_state& channel : state.channels) {
    EXPECT_EQ(channel.count, 0x10000u);
    EXPECT_EQ(channel.mode, 0xff);
  }
  EXPECT_EQ(state.channels[0].gate, 1);
  EXPECT_EQ(state.channels[2].gate, 0);
}

TEST_F(PitTest, StateRoundTripStartsCounting) {
  program(0, 2, 2386);
  program(2, 3, 0x1234);
  pit.write(speaker, 1);
  kvm_pit_state2 state, copy;
  pit.get_state(state);
  FakeOutput other_output;
  Pit other(timers, other_output, true);
  other.set_state(state);
  other.get_state(copy);
  for (unsigned i = 0; i < 3; ++i) {
    EXPECT_EQ(copy.channels[i].count, state.channels[i].count);
    EXPECT_EQ(copy.channels[i].mode, state.channels[i].mode);
    EXPECT_EQ(copy.channels[i].rw_mode, state.channels[i].rw_mode);
    EXPECT_EQ(copy.channels[i].gate, state.channels[i].gate);
  }
  EXPECT_TRUE(eventually([&] { return other_output.pulses > 0; }));
}

TEST_F(PitTest, AbsurdStateIsSurvived) {
  kvm_pit_state2 state;
  std::memset(&state, 0xff, sizeof state);
  state.flags = 0;
  pit.set_state(state);
  for (u16 port = 0x40; port < 0x43; ++port)
    for (int i = 0; i < 4; ++i) pit.read(port);
  program(0, 2, 1193);
  EXPECT_TRUE(serve(1));
}

}  // namespace
}  // namespace anykvm::irqchip
