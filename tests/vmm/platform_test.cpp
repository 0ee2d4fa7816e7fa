// Keyboard controller, clock and power management.
#include <gtest/gtest.h>
#include <time.h>

#include "vmm/i8042.h"
#include "vmm/power_management.h"
#include "vmm/recording_irq_line.h"
#include "vmm/rtc.h"

namespace anykvm::vmm {
namespace {

u8 in(IoDevice& device, u64 offset = 0) {
  u8 value[1] = {0xff};
  device.read(offset, value);
  return value[0];
}
void out(IoDevice& device, u64 offset, u8 value) { device.write(offset, {&value, 1}); }

struct I8042Test : ::testing::Test {
  RecordingIrqLine irq;
  unsigned resets = 0;
  I8042 controller{irq, [this] { ++resets; }};
  u8 ask(u8 command) {
    out(controller.command(), 0, command);
    EXPECT_EQ(in(controller.command()) & 1, 1) << "an answer to " << int(command);
    return in(controller.data());
  }
};

TEST_F(I8042Test, ResetLine) {
  out(controller.command(), 0, 0xff);
  EXPECT_EQ(resets, 0u) << "pulses nothing";
  out(controller.command(), 0, 0xfe);
  EXPECT_EQ(resets, 1u);
  out(controller.command(), 0, 0xd1);
  out(controller.data(), 0, 0x02);
  EXPECT_EQ(resets, 2u) << "the output port's bit 0";
}

TEST_F(I8042Test, ProbeIsAnswered) {
  EXPECT_EQ(in(controller.command()) & 1, 0) << "empty at the start";
  EXPECT_EQ(ask(0xaa), 0x55);
  EXPECT_EQ(ask(0xab), 0x00);
  out(controller.command(), 0, 0x60);
  out(controller.data(), 0, 0x65);
  EXPECT_EQ(ask(0x20), 0x65);
  EXPECT_FALSE(irq.level);
}

TEST_F(I8042Test, KeyboardAnswersWithAnInterruptEach) {
  out(controller.command(), 0, 0x60);
  out(controller.data(), 0, 0x01);
  out(controller.data(), 0, 0xff);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(controller.data()), 0xfa);
  EXPECT_EQ(in(controller.data()), 0xaa);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(irq.edges, 2u);
}

TEST(Rtc, TellsTheTimeInUtc) {
  Rtc rtc(512 << 20, 0);
  const auto reg = [&](u8 index) {
    out(rtc, 0, index);
    return in(rtc, 1);
  };
  const auto decimal = [](u8 bcd) { return (bcd >> 4) * 10 + (bcd & 15); };
  EXPECT_EQ(reg(0x0d), 0x80) << "the battery is good";
  EXPECT_EQ(reg(0x0b), 0x02);
  const time_t before = time(nullptr);
  tm now{};
  now.tm_sec = decimal(reg(0));
  now.tm_min = decimal(reg(2));
  now.tm_hour = decimal(reg(4));
  now.tm_mday = decimal(reg(7));
  now.tm_mon = decimal(reg(8)) - 1;
  now.tm_year = decimal(reg(9)) + (decimal(reg(Rtc::century_register)) - 19) * 100;
  EXPECT_NEAR(double(timegm(&now)), double(before), 61) << "fields may be read across a minute's end";
}

TEST(Rtc, KeepsWhatIsSet) {
  Rtc rtc(512 << 20, 0);
  const auto set = [&](u8 index, u8 value) {
    out(rtc, 0, index);
    out(rtc, 1, value);
  };
  set(0x0b, 0x82);
  set(9, 0x30);
  set(8, 0x02);
  set(7, 0x03);
  set(4, 0x10);
  set(2, 0x20);
  set(0, 0x30);
  out(rtc, 0, 0);
  EXPECT_EQ(in(rtc, 1), 0x30) << "stopped while it is set";
  set(0x0b, 0x02);
  out(rtc, 0, 4);
  EXPECT_EQ(in(rtc, 1), 0x10);
  out(rtc, 0, 9);
  EXPECT_EQ(in(rtc, 1), 0x30);
}

TEST(Rtc, HoldsTheSizeOfMemory) {
  Rtc rtc(u64{3} << 30, u64{1} << 30);
  const auto word = [&](u8 index) {
    out(rtc, 0, index);
    const u8 low = in(rtc, 1);
    out(rtc, 0, u8(index + 1));
    return low | in(rtc, 1) << 8;
  };
  EXPECT_EQ(word(0x34), ((3 << 10) - 16) * 16);
  EXPECT_EQ(word(0x5b), 1024 * 16);
  EXPECT_EQ(word(0x15), 640);
}

TEST(PowerManagement, SleepTypeFiveIsPowerOff) {
  unsigned offs = 0;
  PowerManagement power([&] { ++offs; });
  const auto write16 = [&](u64 offset, u16 value) {
    const u8 bytes[] = {u8(value), u8(value >> 8)};
    power.write(offset, bytes);
  };
  const auto read16 = [&](u64 offset) {
    u8 bytes[2];
    power.read(offset, bytes);
    return bytes[0] | bytes[1] << 8;
  };
  EXPECT_EQ(read16(4) & 1, 1) << "ACPI mode is on";
  write16(4, 5 << 10);
  EXPECT_EQ(offs, 0u) << "the type alone does nothing";
  write16(4, 3 << 10 | 1 << 13);
  EXPECT_EQ(offs, 0u) << "another state";
  write16(4, 5 << 10 | 1 << 13);
  EXPECT_EQ(offs, 1u);
  EXPECT_EQ(read16(4) & (1 << 13), 0) << "write only";
  write16(2, 0x0120);
  EXPECT_EQ(read16(2), 0x0120);
  EXPECT_EQ(read16(0), 0);
}

TEST(PowerManagement, TimerRuns) {
  PowerManagement power([] {});
  const auto timer = [&] {
    u8 b[4];
    power.read(8, b);
    return u32(b[0] | b[1] << 8 | b[2] << 16) | u32(b[3]) << 24;
  };
  const u32 before = timer();
  const timespec wait{0, 10'000'000};
  nanosleep(&wait, nullptr);
  const u32 ticks = timer() - before;
  EXPECT_GE(ticks, 35'700u);
  EXPECT_LT(ticks, 3'579'545u);
}

}  // namespace
}  // namespace anykvm::vmm
