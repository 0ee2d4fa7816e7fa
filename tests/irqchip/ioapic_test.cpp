#include "irqchip/ioapic.h"

#include <gtest/gtest.h>

#include <cstring>

#include "irqchip/fake_apic_client.h"

namespace anykvm::irqchip {
namespace {

using namespace test;

constexpr Gpa base = IoApic::default_base;
constexpr u32 logical = 1 << 11, remote_irr = 1 << 14, level = 1 << 15, masked = 1 << 16;

class IoApicTest : public testing::Test {
 protected:
  u32 read_index(u32 index) {
    ioapic.write(base, index);
    return ioapic.read(base + 0x10);
  }
  void write_index(u32 index, u32 value) {
    ioapic.write(base, index);
    ioapic.write(base + 0x10, value);
  }
  void program(unsigned pin, u32 low, u8 destination = 0) {
    write_index(0x11 + 2 * pin, u32{destination} << 24);
    write_index(0x10 + 2 * pin, low);
  }
  u32 entry(unsigned pin) { return read_index(0x10 + 2 * pin); }

  FakeMachine machine{4};
  IoApic ioapic{machine.bus};
};

TEST_F(IoApicTest, Registers) {
  EXPECT_EQ(read_index(1), 0x170011u) << "24 pins, version 0x11";
  write_index(1, 0xffffffff);
  EXPECT_EQ(read_index(1), 0x170011u);
  write_index(0, 0xffffffff);
  EXPECT_EQ(read_index(0), 0x0f000000u);
  EXPECT_EQ(read_index(2), 0x0f000000u);
  EXPECT_EQ(ioapic.read(base), 2u);
  for (unsigned pin = 0; pin < 24; ++pin) EXPECT_EQ(entry(pin), masked);
  EXPECT_EQ(read_index(0x10 + 48), 0xffffffffu);
  EXPECT_EQ(ioapic.read(base + 0x20), 0u);
  write_index(0x12, 0xffffffff);
  EXPECT_EQ(read_index(0x12), 0xffffffffu & ~(remote_irr | 1 << 12)) << "status bits are read-only";
  write_index(0x13, 0x12345678);
  EXPECT_EQ(read_index(0x13), 0x12345678u);
  EXPECT_TRUE(ioapic.covers(base));
  EXPECT_TRUE(ioapic.covers(base + 0xff));
  EXPECT_FALSE(ioapic.covers(base + 0x100));
}

TEST_F(IoApicTest, MaskedPinIsIgnored) {
  EXPECT_EQ(ioapic.set_pin(4, 0, true), -1);
  program(4, 0x40);
  EXPECT_EQ(machine[0].pending(), -1) << "an edge that came while masked is lost";
}

TEST_F(IoApicTest, EdgeIsDeliveredOncePerEdge) {
  program(4, 0x40, 2);
  EXPECT_EQ(ioapic.set_pin(4, 0, true), 1);
  EXPECT_EQ(machine.takers(0x40), 1u << 2);
  EXPECT_EQ(ioapic.set_pin(4, 0, true), 0);
  EXPECT_EQ(ioapic.set_pin(4, 0, false), 1);
  EXPECT_EQ(ioapic.set_pin(4, 0, true), 1);
  EXPECT_EQ(machine.takers(0x40), 1u << 2);
}

TEST_F(IoApicTest, LogicalDestinationReachesSeveral) {
  program(5, logical | 0x41, 0x0a);
  EXPECT_EQ(ioapic.set_pin(5, 0, true), 2);
  EXPECT_EQ(machine.takers(0x41), 0x0au);
}

TEST_F(IoApicTest, LowestPriorityAndNmi) {
  program(5, logical | 0x100 | 0x41, 0x0f);
  EXPECT_EQ(ioapic.set_pin(5, 0, true), 1);
  program(6, 0x400, 3);
  EXPECT_EQ(ioapic.set_pin(6, 0, true), 1);
  EXPECT_EQ(machine.clients[3]->nmis, 1);
}

TEST_F(IoApicTest, LevelWaitsForEoiAndComesAgainWhileUp) {
  program(9, level | 0x51);
  EXPECT_EQ(ioapic.set_pin(9, 0, true), 1);
  EXPECT_TRUE(entry(9) & remote_irr);
  EXPECT_EQ(machine[0].acknowledge(), 0x51);
  EXPECT_EQ(ioapic.set_pin(9, 0, true), -1) << "waits for EOI";
  EXPECT_EQ(machine[0].pending(), -1);
  EXPECT_EQ(ioapic.eoi(0x51, true, 0), 1u << 9);
  write(machine[0], reg::eoi, 0);
  EXPECT_EQ(machine[0].acknowledge(), 0x51) << "the line is still up";
  write(machine[0], reg::eoi, 0);
  ioapic.set_pin(9, 0, false);
  ioapic.eoi(0x51, true, 0);
  EXPECT_FALSE(entry(9) & remote_irr);
  EXPECT_EQ(machine[0].pending(), -1);
}

TEST_F(IoApicTest, HeldPinComesAgainOnlyWhenResumed) {
  program(9, level | 0x51);
  ioapic.set_pin(9, 0, true);
  machine.takers(0x51);
  EXPECT_EQ(ioapic.eoi(0x51, true, 1u << 9), 1u << 9);
  EXPECT_EQ(machine[0].pending(), -1);
  ioapic.resume(1u << 9);
  EXPECT_EQ(machine[0].pending(), 0x51);
}

TEST_F(IoApicTest, SourcesAreOred) {
  program(9, level | 0x51);
  ioapic.set_pin(9, 0, true);
  ioapic.set_pin(9, 1, true);
  machine.takers(0x51);
  ioapic.set_pin(9, 0, false);
  ioapic.eoi(0x51, true, 0);
  EXPECT_EQ(machine.takers(0x51), 1u) << "the other source holds it up";
  ioapic.set_pin(9, 1, false);
  ioapic.eoi(0x51, true, 0);
  EXPECT_EQ(machine.takers(0x51), 0u);
}

TEST_F(IoApicTest, LevelPendingWhileMaskedIsDeliveredOnUnmask) {
  program(9, masked | level | 0x51);
  EXPECT_EQ(ioapic.set_pin(9, 0, true), -1);
  program(9, level | 0x51);
  EXPECT_EQ(machine[0].pending(), 0x51);
  EXPECT_EQ(ioapic.take_unmasked(), 1u << 9);
}

TEST_F(IoApicTest, WatchedPinIsSampledAgainOnUnmask) {
  ioapic.set_held_pins(1u << 9);
  program(9, masked | level | 0x51);
  ioapic.set_pin(9, 0, true);
  program(9, level | 0x51);
  EXPECT_EQ(machine[0].pending(), -1);
  EXPECT_EQ(ioapic.take_held(), 1u << 9);
  ioapic.resume(1u << 9);
  EXPECT_EQ(machine[0].pending(), 0x51);
}

TEST_F(IoApicTest, SwitchToEdgeAndBackIsAnEoi) {
  program(9, level | 0x51);
  ioapic.set_pin(9, 0, true);
  EXPECT_TRUE(entry(9) & remote_irr);
  program(9, masked | 0x51);
  EXPECT_FALSE(entry(9) & remote_irr);
}

TEST_F(IoApicTest, UndeliveredLevelDoesNotWaitForEoi) {
  program(9, level | 0x51, 9);
  EXPECT_EQ(ioapic.set_pin(9, 0, true), 0);
  EXPECT_FALSE(entry(9) & remote_irr);
}

TEST_F(IoApicTest, StateRoundTrip) {
  write_index(0, 0x0a000000);
  program(4, 0x40, 2);
  program(9, level | 0x51, 1);
  program(10, masked | 0x52, 1);
  ioapic.set_pin(4, 0, true);   // delivered
  ioapic.set_pin(9, 0, true);   // waiting for EOI
  ioapic.set_pin(10, 0, true);  // masked
  kvm_ioapic_state state, copy;
  ioapic.get_state(state);
  EXPECT_EQ(state.base_address, base);
  EXPECT_EQ(state.id, 0xau);
  EXPECT_EQ(state.irr, 1u << 9 | 1u << 10) << "a delivered edge would be delivered twice";
  EXPECT_TRUE(state.redirtbl[9].fields.remote_irr);
  EXPECT_EQ(state.redirtbl[4].fields.dest_id, 2);
  IoApic other(machine.bus);
  other.set_state(state);
  other.get_state(copy);
  EXPECT_EQ(std::memcmp(&state, &copy, sizeof state), 0);
}

}  // namespace
}  // namespace anykvm::irqchip
