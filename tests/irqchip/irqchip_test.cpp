// The chips together, as the guest's accesses and the vCPUs meet them.
#include "irqchip/irqchip.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>

#include "irqchip/fake_apic_client.h"

namespace anykvm::irqchip {
namespace {

using namespace test;

struct FakeListener : IrqChipsListener {
  void interrupt_ended(u32 chip, unsigned pin) override { ended.emplace_back(chip, pin); }
  void pin_unmasked(u32 chip, unsigned pin) override { unmasked.emplace_back(chip, pin); }
  std::vector<std::pair<u32, unsigned>> ended, unmasked;
};
struct NoOutput : PitOutput {
  bool pulse_irq0() override { return true; }
};
using Pins = std::vector<std::pair<u32, unsigned>>;

class IrqChipsTest : public testing::Test {
 protected:
  IrqChipsTest() { chips.set_listener(&listener); }

  void out(u16 port, u8 value) { EXPECT_TRUE(chips.pio_write(port, &value, 1)); }
  u8 in(u16 port) {
    u8 value = 0xee;
    EXPECT_TRUE(chips.pio_read(port, &value, 1));
    return value;
  }
  void program(unsigned pin, u32 low) {
    const u32 index = 0x10 + 2 * pin;
    EXPECT_TRUE(chips.mmio_write(0xfec00000, &index, 4));
    EXPECT_TRUE(chips.mmio_write(0xfec00010, &low, 4));
  }
  void initialise_pic() {
    for (u16 port : {0x20, 0xa0}) {
      out(port, 0x11);
      out(port + 1, port == 0x20 ? 0x20 : 0x28);
      out(port + 1, port == 0x20 ? 4 : 2);
      out(port + 1, 1);
    }
    listener.unmasked.clear();
  }

  FakeMachine machine{2};
  FakeListener listener;
  IrqChips chips{machine.bus};
};

TEST_F(IrqChipsTest, PicOutputWakesTheBootCpu) {
  initialise_pic();
  write(machine[0], reg::lvt_lint0, 0x700);
  machine.clients[0]->wakes = 0;
  EXPECT_FALSE(chips.pic_output());
  EXPECT_EQ(chips.pic_acknowledge(), -1);
  EXPECT_EQ(chips.set_pic_line(4, irq_source_client, true), 1);
  EXPECT_TRUE(chips.pic_output());
  EXPECT_EQ(machine.clients[0]->wakes, 1);
  EXPECT_TRUE(machine[0].takes_pic_output());
  EXPECT_EQ(chips.pic_acknowledge(), 0x24);
  EXPECT_FALSE(chips.pic_output());
  out(0x20, 0x20);
  EXPECT_EQ(listener.ended, (Pins{{KVM_IRQCHIP_PIC_MASTER, 4}}));
}

TEST_F(IrqChipsTest, SlaveLinesAreNamedByChip) {
  initialise_pic();
  out(0xa1, 0xff);
  out(0xa1, 0xfb);
  EXPECT_EQ(listener.unmasked, (Pins{{KVM_IRQCHIP_PIC_SLAVE, 2}}));
  chips.set_pic_line(10, irq_source_client, true);
  EXPECT_EQ(chips.pic_acknowledge(), 0x2a);
  out(0xa0, 0x20);
  EXPECT_EQ(listener.ended, (Pins{{KVM_IRQCHIP_PIC_SLAVE, 2}}));
}

TEST_F(IrqChipsTest, PortWidths) {
  u32 value = 0xffffffff;
  EXPECT_TRUE(chips.pio_read(0x20, &value, 2));
  EXPECT_EQ(value, 0xffff0000u);
  EXPECT_FALSE(chips.pio_read(0x80, &value, 1));
  EXPECT_FALSE(chips.pio_read(0x40, &value, 1)) << "no PIT yet";
  EXPECT_FALSE(chips.pio_write(0x61, &value, 1));
  EXPECT_FALSE(chips.mmio_read(0xfec00100, &value, 4));
  u64 wide = ~u64{0};
  EXPECT_TRUE(chips.mmio_read(0xfec00000, &wide, 8));
  EXPECT_EQ(wide, 0u);
}

TEST_F(IrqChipsTest, LevelInterruptThroughLocalApicAndBack) {
  program(9, 0x8051);
  EXPECT_EQ(chips.set_ioapic_pin(9, irq_source_client, true), 1);
  EXPECT_EQ(machine[0].acknowledge(), 0x51);
  write(machine[0], reg::eoi, 0);
  EXPECT_EQ(listener.ended, (Pins{{KVM_IRQCHIP_IOAPIC, 9}}));
  EXPECT_EQ(machine[0].acknowledge(), 0x51) << "still up";
  chips.set_ioapic_pin(9, irq_source_client, false);
  write(machine[0], reg::eoi, 0);
  EXPECT_EQ(machine[0].pending(), -1);
}

TEST_F(IrqChipsTest, EdgeEoiIsReportedForWatchedPinsOnly) {
  program(4, 0x41);
  program(5, 0x52);
  chips.set_watched_pins(1u << 5);
  EXPECT_FALSE(chips.wants_edge_eoi(0x41));
  EXPECT_TRUE(chips.wants_edge_eoi(0x52));
  for (unsigned pin : {4u, 5u}) chips.set_ioapic_pin(pin, irq_source_client, true);
  take_all(machine[0]);
  EXPECT_EQ(listener.ended, (Pins{{KVM_IRQCHIP_IOAPIC, 5}}));
  program(5, 0x63);
  EXPECT_TRUE(chips.wants_edge_eoi(0x63));
  EXPECT_FALSE(chips.wants_edge_eoi(0x52));
}

/// A device behind a resampling irqfd: the line falls at EOI, and is raised again only if the device still wants.
struct Resampler : IrqChipsListener {
  explicit Resampler(IrqChips& irq_chips) : chips(irq_chips) {}
  void interrupt_ended(u32, unsigned pin) override {
    ++resamples;
    chips.set_ioapic_pin(pin, irq_source_resample, false);
    if (asserted) chips.set_ioapic_pin(pin, irq_source_resample, true);
  }
  void pin_unmasked(u32, unsigned) override {}
  IrqChips& chips;
  bool asserted = false;
  int resamples = 0;
};

TEST_F(IrqChipsTest, ResampledLineDoesNotInterruptOnceTooOften) {
  Resampler resampler(chips);
  chips.set_listener(&resampler);
  chips.set_watched_pins(1u << 9);
  program(9, 0x8051);
  chips.set_ioapic_pin(9, irq_source_resample, true);
  EXPECT_EQ(take_all(machine[0]).size(), 1u);
  EXPECT_EQ(resampler.resamples, 1);
  resampler.asserted = true;
  chips.set_ioapic_pin(9, irq_source_resample, true);
  EXPECT_EQ(machine[0].acknowledge(), 0x51);
  write(machine[0], reg::eoi, 0);
  EXPECT_EQ(machine[0].acknowledge(), 0x51);
  resampler.asserted = false;
  program(9, 0x18051);
  write(machine[0], reg::eoi, 0);
  chips.set_ioapic_pin(9, irq_source_resample, true);
  EXPECT_EQ(machine[0].pending(), -1);
  program(9, 0x8051);  // unmasked with a stale request
  EXPECT_EQ(machine[0].pending(), -1);
}

TEST_F(IrqChipsTest, CreatePit) {
  NoOutput output;
  EXPECT_EQ(chips.pit(), nullptr);
  EXPECT_EQ(chips.create_pit(machine.timers, output, KVM_PIT_SPEAKER_DUMMY), 0);
  EXPECT_EQ(chips.create_pit(machine.timers, output, 0), -EEXIST);
  ASSERT_NE(chips.pit(), nullptr);
  out(0x43, 0xb0);
  out(0x42, 0x34);
  out(0x42, 0x12);
  EXPECT_EQ(in(0x42), 0x34);
  EXPECT_EQ(in(0x61) & 1, 0);
  u32 value = 0xffffffff;
  EXPECT_TRUE(chips.pio_read(0x43, &value, 1));
  EXPECT_FALSE(chips.pio_read(0x43, &value, 2));
}

TEST_F(IrqChipsTest, StateOfEachChip) {
  initialise_pic();
  out(0x21, 0xfb);
  program(3, 0x8033);
  kvm_irqchip chip = {};
  for (u32 id : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC}) {
    chip.chip_id = id;
    EXPECT_EQ(chips.get_state(chip), 0);
    EXPECT_EQ(chips.set_state(chip), 0);
  }
  chip.chip_id = KVM_IRQCHIP_PIC_MASTER;
  chips.get_state(chip);
  EXPECT_EQ(chip.chip.pic.imr, 0xfb);
  EXPECT_EQ(chip.chip.pic.elcr_mask, 0xf8);
  chip.chip_id = KVM_IRQCHIP_IOAPIC;
  chips.get_state(chip);
  EXPECT_EQ(chip.chip.ioapic.redirtbl[3].bits, 0x8033u);
  chip.chip_id = 3;
  EXPECT_EQ(chips.get_state(chip), -EINVAL);
  EXPECT_EQ(chips.set_state(chip), -EINVAL);
}

}  // namespace
}  // namespace anykvm::irqchip
