#include "irqchip/pic.h"

#include <gtest/gtest.h>

#include <cstring>

namespace anykvm::irqchip {
namespace {

constexpr u16 master_command = 0x20, master_data = 0x21, slave_command = 0xa0, slave_data = 0xa1, elcr = 0x4d0;
constexpr u8 eoi = 0x20, specific_eoi = 0x60, read_irr = 0x0a, read_isr = 0x0b;

class PicTest : public testing::Test {
 protected:
  PicTest() { initialise(0x01); }

  /// As a PC's firmware does: vectors 0x08 and 0x70, cascade on line 2.
  void initialise(u8 icw4) {
    for (u16 base : {master_command, slave_command}) {
      pic.write(base, 0x11);
      pic.write(base + 1, base == master_command ? 0x08 : 0x70);
      pic.write(base + 1, base == master_command ? 0x04 : 0x02);
      pic.write(base + 1, icw4);
    }
  }
  void pulse(unsigned line) {
    pic.set_line(line, 0, true);
    pic.set_line(line, 0, false);
  }
  u8 status(u16 command_port, u8 what) {
    pic.write(command_port, what);
    return pic.read(command_port);
  }

  Pic pic;
};

TEST_F(PicTest, EdgeIsDeliveredOnceAndEnded) {
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(pic.set_line(4, 0, true), 1);
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(status(master_command, read_irr), 0x10);
  EXPECT_EQ(pic.acknowledge(), 0x0c);
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(status(master_command, read_irr), 0);
  EXPECT_EQ(status(master_command, read_isr), 0x10);
  pic.write(master_command, eoi);
  EXPECT_EQ(status(master_command, read_isr), 0);
  EXPECT_FALSE(pic.output()) << "the line is still up, but it was an edge";
  EXPECT_EQ(pic.take_ended(), 1u << 4);
  pic.set_line(4, 0, false);
  EXPECT_EQ(pic.set_line(4, 0, true), 1);
  EXPECT_TRUE(pic.output());
}

TEST_F(PicTest, SecondEdgeBeforeServiceIsCoalesced) {
  EXPECT_EQ(pic.set_line(4, 0, true), 1);
  pic.set_line(4, 0, false);
  EXPECT_EQ(pic.set_line(4, 0, true), 0);
}

TEST_F(PicTest, MaskedLineIsIgnoredUntilUnmasked) {
  pic.write(master_data, 0x10);
  EXPECT_EQ(pic.read(master_data), 0x10);
  EXPECT_EQ(pic.set_line(4, 0, true), -1);
  EXPECT_FALSE(pic.output());
  pic.write(master_data, 0);
  EXPECT_EQ(pic.take_unmasked(), 1u << 4);
  EXPECT_TRUE(pic.output());
}

TEST_F(PicTest, LowerNumberWinsAndNests) {
  pulse(4);
  pulse(1);
  EXPECT_EQ(pic.acknowledge(), 0x09);
  EXPECT_FALSE(pic.output()) << "4 waits for 1";
  pulse(0);
  EXPECT_TRUE(pic.output()) << "0 interrupts 1";
  EXPECT_EQ(pic.acknowledge(), 0x08);
  pic.write(master_command, eoi);  // 0
  EXPECT_EQ(status(master_command, read_isr), 0x02);
  pic.write(master_command, eoi);  // 1
  EXPECT_EQ(pic.acknowledge(), 0x0c);
}

TEST_F(PicTest, SlaveGoesThroughTheCascade) {
  pulse(10);
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.acknowledge(), 0x72);
  EXPECT_EQ(status(master_command, read_isr), 0x04);
  EXPECT_EQ(status(slave_command, read_isr), 0x04);
  pulse(3);
  EXPECT_FALSE(pic.output()) << "line 3 is below the cascade";
  pic.write(slave_command, eoi);
  pic.write(master_command, eoi);
  EXPECT_EQ(pic.take_ended(), 1u << 10 | 1u << 2);
  EXPECT_EQ(pic.acknowledge(), 0x0b);
}

TEST_F(PicTest, SpecialFullyNestedLetsAHigherSlaveLineThrough) {
  for (bool nested : {false, true}) {
    initialise(nested ? 0x11 : 0x01);
    pulse(12);
    EXPECT_EQ(pic.acknowledge(), 0x74);
    pulse(8);
    EXPECT_EQ(pic.output(), nested);
    if (nested) {
      EXPECT_EQ(pic.acknowledge(), 0x70);
    }
    pic.write(slave_command, eoi);
    pic.write(master_command, eoi);
    if (!nested) {
      EXPECT_EQ(pic.acknowledge(), 0x70);
    }
  }
}

TEST_F(PicTest, SpuriousInterruptIsLine7) {
  pic.write(elcr, 0x20);
  pic.set_line(5, 0, true);
  EXPECT_TRUE(pic.output());
  pic.set_line(5, 0, false);
  EXPECT_EQ(pic.acknowledge(), 0x0f);
  EXPECT_EQ(status(master_command, read_isr), 0);
}

TEST_F(PicTest, LevelInterruptsAgainWhileTheLineIsUp) {
  pic.write(elcr, 0xff);
  EXPECT_EQ(pic.read(elcr), 0xf8) << "timer, keyboard and cascade stay edges";
  pic.write(elcr + 1, 0xff);
  EXPECT_EQ(pic.read(elcr + 1), 0xde);
  pic.set_line(5, 0, true);
  EXPECT_EQ(pic.set_line(5, 1, true), 0) << "two parties share the line";
  EXPECT_EQ(pic.acknowledge(), 0x0d);
  pic.write(master_command, eoi);
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.acknowledge(), 0x0d);
  pic.set_line(5, 0, false);
  pic.write(master_command, eoi);
  EXPECT_TRUE(pic.output()) << "the other party still holds it";
  pic.set_line(5, 1, false);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, AutomaticEoi) {
  initialise(0x03);
  pulse(4);
  EXPECT_EQ(pic.acknowledge(), 0x0c);
  EXPECT_EQ(status(master_command, read_isr), 0);
  EXPECT_EQ(pic.take_ended(), 1u << 4);
}

TEST_F(PicTest, RotationOnAutomaticEoi) {
  initialise(0x03);
  pic.write(master_command, 0x80);
  pulse(4);
  pic.acknowledge();
  pulse(3);
  pulse(5);
  EXPECT_EQ(pic.acknowledge(), 0x0d) << "4 is lowest now, so 5 is highest";
  pic.write(master_command, 0x00);
  pulse(5);
  EXPECT_EQ(pic.acknowledge(), 0x0b) << "6 and 7 are idle, 0 to 2 too; rotation is off, 5 stays lowest";
}

TEST_F(PicTest, RotateOnEoiAndSetPriority) {
  pulse(4);
  pic.acknowledge();
  pic.write(master_command, 0xa0);  // rotate on non-specific EOI
  pulse(4);
  pulse(7);
  EXPECT_EQ(pic.acknowledge(), 0x0f);
  pic.write(master_command, 0xe0 | 7);  // rotate on specific EOI: 7 lowest, the order of old
  pulse(0);
  EXPECT_EQ(pic.acknowledge(), 0x08);
  pic.write(master_command, specific_eoi | 0);
  pic.write(master_command, 0xc0 | 3);  // set priority: 3 is lowest, 4 highest
  pulse(0);
  EXPECT_EQ(pic.acknowledge(), 0x0c);
}

TEST_F(PicTest, SpecificEoi) {
  pulse(4);
  pic.acknowledge();
  pulse(1);
  pic.acknowledge();
  pic.write(master_command, specific_eoi | 4);
  EXPECT_EQ(status(master_command, read_isr), 0x02);
}

TEST_F(PicTest, SpecialMaskModeLetsLowerLinesThrough) {
  pulse(1);
  pic.acknowledge();
  pulse(4);
  EXPECT_FALSE(pic.output());
  pic.write(master_data, 0x02);
  EXPECT_FALSE(pic.output());
  pic.write(master_command, 0x68);  // set special mask
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.acknowledge(), 0x0c);
  pic.write(master_command, eoi);
  EXPECT_EQ(status(master_command, read_isr), 0x02) << "a masked line is not ended by a non-specific EOI";
  pic.write(master_command, 0x48);
  pic.write(master_command, eoi);
  EXPECT_EQ(status(master_command, read_isr), 0);
}

TEST_F(PicTest, PollAcknowledges) {
  pic.write(master_command, 0x0c);
  EXPECT_EQ(pic.read(master_command) & 0x80, 0);
  pulse(3);
  pic.write(master_command, 0x0c);
  EXPECT_EQ(pic.read(master_command), 0x83);
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(status(master_command, read_isr), 0x08);
  pic.write(master_command, eoi);
  pulse(9);
  pic.write(slave_command, 0x0c);
  EXPECT_EQ(pic.read(slave_command), 0x81);
  EXPECT_FALSE(pic.output());
  pic.write(slave_command, eoi);
  EXPECT_EQ(status(slave_command, read_isr), 0);
}

TEST_F(PicTest, InitialisationForgets) {
  pulse(4);
  pulse(1);
  pic.acknowledge();
  pic.write(master_data, 0xff);
  pic.take_ended();
  pic.write(master_command, 0x10);  // no ICW4
  EXPECT_EQ(pic.take_ended(), 1u << 4) << "who waits for the edge to be served is told";
  pic.write(master_data, 0x27);
  pic.write(master_data, 0x04);
  EXPECT_EQ(pic.read(master_data), 0);
  EXPECT_EQ(status(master_command, read_irr), 0);
  EXPECT_EQ(status(master_command, read_isr), 0);
  pulse(0);
  EXPECT_EQ(pic.acknowledge(), 0x20) << "the low three bits of ICW2 are the line";
}

TEST_F(PicTest, StateRoundTrip) {
  pulse(4);
  pic.acknowledge();
  pulse(1);
  pic.write(slave_data, 0xef);
  Pic copy;
  for (unsigned chip : {0u, 1u}) copy.set_state(chip, pic.get_state(chip));
  for (unsigned chip : {0u, 1u}) {
    const kvm_pic_state a = pic.get_state(chip), b = copy.get_state(chip);
    EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0);
  }
  EXPECT_EQ(copy.get_state(0).isr, 0x10);
  EXPECT_EQ(copy.get_state(0).irq_base, 0x08);
  EXPECT_EQ(copy.get_state(1).imr, 0xef);
  EXPECT_TRUE(copy.output());
  EXPECT_EQ(copy.acknowledge(), 0x09);
}

TEST(Pic, Ports) {
  for (u16 port : {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1}) EXPECT_TRUE(Pic::covers(port, 1)) << port;
  for (u16 port : {0x1f, 0x22, 0x9f, 0xa2, 0x4cf, 0x4d2}) EXPECT_FALSE(Pic::covers(port, 1)) << port;
  EXPECT_TRUE(Pic::covers(0x20, 2));
  EXPECT_FALSE(Pic::covers(0x21, 2));
  EXPECT_FALSE(Pic::covers(0x20, 4));
}

}  // namespace
}  // namespace anykvm::irqchip
