#include "vm/irq_routing.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <thread>

#include "irqchip/fake_apic_client.h"

namespace anykvm::vm {
namespace {

using namespace irqchip::test;

kvm_irq_routing_entry pin_route(u32 gsi, u32 chip, u32 pin) {
  kvm_irq_routing_entry entry = {};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip = {.irqchip = chip, .pin = pin};
  return entry;
}
kvm_irq_routing_entry msi_route(u32 gsi, u32 address, u32 data, u32 address_high = 0) {
  kvm_irq_routing_entry entry = {};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_MSI;
  entry.u.msi.address_lo = address;
  entry.u.msi.address_hi = address_high;
  entry.u.msi.data = data;
  return entry;
}

class IrqRoutingTest : public testing::Test {
 protected:
  int set(std::vector<kvm_irq_routing_entry> entries, u32 flags = 0) { return routing.set_gsi_routing(flags, entries); }
  void out(u16 port, u8 value) { EXPECT_TRUE(chips.pio_write(port, &value, 1)); }
  void program(unsigned pin, u32 low) {
    const u32 index = 0x10 + 2 * pin;
    EXPECT_TRUE(chips.mmio_write(0xfec00000, &index, 4));
    EXPECT_TRUE(chips.mmio_write(0xfec00010, &low, 4));
  }

  FakeMachine machine{2};
  irqchip::IrqChips chips{machine.bus};
  IrqRouting routing{machine.bus};
};

TEST_F(IrqRoutingTest, NothingIsRoutedWithoutChips) {
  EXPECT_EQ(routing.set_irq(4, true), -1);
  EXPECT_EQ(set({pin_route(4, KVM_IRQCHIP_IOAPIC, 4)}), -EINVAL);
  EXPECT_EQ(set({msi_route(4, 0xfee00000, 0x40)}), 0);
  EXPECT_EQ(routing.set_irq(4, true), 1);
}

TEST_F(IrqRoutingTest, DefaultTable) {
  routing.attach(chips);
  out(0x21, 0xff);
  out(0xa1, 0xff);
  for (u32 gsi = 0; gsi < 24; ++gsi) EXPECT_EQ(routing.set_irq(gsi, true), -1) << "masked everywhere";
  for (u32 gsi = 0; gsi < 24; ++gsi) routing.set_irq(gsi, false);
  program(20, 0x44);
  EXPECT_EQ(routing.pulse_irq(20), 1);
  EXPECT_EQ(machine[0].acknowledge(), 0x44);
  program(4, 0x54);
  EXPECT_EQ(routing.pulse_irq(4), 1) << "the PIC's line is masked";
  out(0x21, 0);
  EXPECT_EQ(routing.pulse_irq(4), 1) << "the edge from before still waits in the PIC";
  for (u8 word : {0x11, 0x20, 0x04, 0x01}) out(word == 0x11 ? 0x20 : 0x21, word);
  EXPECT_EQ(routing.pulse_irq(4), 2) << "PIC and I/O APIC";
  EXPECT_EQ(routing.set_irq(24, true), -1);
  EXPECT_EQ(routing.set_irq(~0u, true), -1);
}

TEST_F(IrqRoutingTest, BadTablesChangeNothing) {
  routing.attach(chips);
  program(20, 0x44);
  EXPECT_EQ(set({}, 1), -EINVAL);
  EXPECT_EQ(set(std::vector(4097, msi_route(0, 0xfee00000, 0x40))), -EINVAL);
  EXPECT_EQ(set({msi_route(4096, 0xfee00000, 0x40)}), -EINVAL);
  EXPECT_EQ(set({pin_route(0, KVM_IRQCHIP_IOAPIC, 24)}), -EINVAL);
  EXPECT_EQ(set({pin_route(0, KVM_IRQCHIP_PIC_MASTER, 8)}), -EINVAL);
  EXPECT_EQ(set({pin_route(0, 3, 0)}), -EINVAL);
  EXPECT_EQ(set({pin_route(0, KVM_IRQCHIP_IOAPIC, 0), pin_route(0, KVM_IRQCHIP_IOAPIC, 1)}), -EINVAL);
  EXPECT_EQ(set({pin_route(0, KVM_IRQCHIP_IOAPIC, 0), msi_route(0, 0xfee00000, 0x40)}), -EINVAL);
  EXPECT_EQ(set({msi_route(0, 0xfee00000, 0x40), msi_route(0, 0xfee00000, 0x41)}), -EINVAL);
  kvm_irq_routing_entry entry = pin_route(0, KVM_IRQCHIP_IOAPIC, 0);
  entry.flags = 1;
  EXPECT_EQ(set({entry}), -EINVAL);
  entry = msi_route(0, 0xfee00000, 0x40);
  entry.flags = 2;
  EXPECT_EQ(set({entry}), -EINVAL);
  entry.type = KVM_IRQ_ROUTING_HV_SINT, entry.flags = 0;
  EXPECT_EQ(set({entry}), -EINVAL);
  EXPECT_EQ(routing.pulse_irq(20), 1) << "the default table is still there";
}

TEST_F(IrqRoutingTest, GoodTablesReplace) {
  routing.attach(chips);
  program(2, 0x42);
  EXPECT_EQ(set({msi_route(4095, 0xfee01000, 0x77), pin_route(0, KVM_IRQCHIP_PIC_MASTER, 0),
                 pin_route(0, KVM_IRQCHIP_IOAPIC, 2), pin_route(0, KVM_IRQCHIP_PIC_SLAVE, 0)}),
            0);
  EXPECT_EQ(routing.pulse_irq(0), 3);
  EXPECT_EQ(machine[0].acknowledge(), 0x42);
  EXPECT_EQ(routing.pulse_irq(4095), 1);
  EXPECT_EQ(machine[1].acknowledge(), 0x77);
  EXPECT_EQ(routing.set_irq(20, true), -1);
  EXPECT_EQ(set({}), 0);
  EXPECT_EQ(routing.set_irq(0, true), -1);
}

TEST_F(IrqRoutingTest, Msi) {
  const auto signal = [&](u32 address, u32 data, u32 high = 0, u32 flags = 0) {
    kvm_msi msi = {};
    msi.address_lo = address, msi.address_hi = high, msi.data = data, msi.flags = flags;
    return routing.signal_msi(msi);
  };
  EXPECT_EQ(signal(0xfee01000, 0x40), 1);
  EXPECT_EQ(machine.takers(0x40), 2u);
  EXPECT_EQ(signal(0xfee03004, 0x41), 2) << "logical";
  EXPECT_EQ(machine.takers(0x41), 3u);
  EXPECT_EQ(signal(0xfee0300c, 0x41), 1) << "with the redirection hint";
  EXPECT_EQ(signal(0xfee09000, 0x41), 0) << "nobody has this ID";
  EXPECT_EQ(signal(0xfee01000, 0x0400), 1);
  EXPECT_EQ(machine.clients[1]->nmis, 1);
  EXPECT_EQ(signal(0xfee01000, 0x8042), 1);
  EXPECT_EQ(read(machine[1], reg::tmr + 0x20), 4u) << "level-triggered";
  EXPECT_EQ(signal(0xfee01000, 0x40, 0, 2), -EINVAL);
  EXPECT_EQ(signal(0xfee01000, 0x40, 0x100), 1) << "the upper half means nothing yet";
  machine.bus.set_x2apic_format(true);
  EXPECT_EQ(signal(0xfee01000, 0x40, 0x100), 0) << "APIC 0x101";
  EXPECT_EQ(signal(0xfee01000, 0x40, 0x101), -EINVAL);
  EXPECT_EQ(set({msi_route(5, 0xfee01000, 0x40, 1)}), -EINVAL);
}

struct Resampler : IrqEndListener {
  explicit Resampler(IrqRouting& r) : routing(r) {}
  void interrupt_ended(u32 gsi) override {
    ++ends;
    routing.set_irq(gsi, false, irqchip::irq_source_resample);
  }
  IrqRouting& routing;
  int ends = 0;
};

TEST_F(IrqRoutingTest, EndListenersHearTheirGsi) {
  routing.attach(chips);
  program(10, 0x805a);
  program(11, 0x005b);
  Resampler level(routing), edge(routing), other(routing);
  routing.add_end_listener(10, level);
  routing.add_end_listener(11, edge);
  routing.add_end_listener(12, other);
  routing.set_irq(10, true, irqchip::irq_source_resample);
  routing.set_irq(11, true, irqchip::irq_source_resample);
  EXPECT_EQ(take_all(machine[0]), (std::vector<int>{0x5b, 0x5a}));
  EXPECT_EQ(level.ends, 1);
  EXPECT_EQ(edge.ends, 1);
  EXPECT_EQ(other.ends, 0);
  routing.remove_end_listener(10, level);
  EXPECT_EQ(routing.pulse_irq(10), 1);
  take_all(machine[0]);
  EXPECT_EQ(level.ends, 1);
}

TEST_F(IrqRoutingTest, PitTicksArriveAndAreAnswered) {
  routing.attach(chips);
  EXPECT_EQ(chips.create_pit(machine.timers, routing, 0), 0);
  EXPECT_EQ(set({pin_route(0, KVM_IRQCHIP_PIC_MASTER, 0), pin_route(0, KVM_IRQCHIP_IOAPIC, 2)}), 0);
  out(0x21, 0xff);
  program(2, 0x30);
  out(0x43, 0x34);
  out(0x40, 0x52);  // 2386: 2 ms
  out(0x40, 0x09);
  for (int tick = 0; tick < 5; ++tick) {
    int vector;
    while ((vector = machine[0].acknowledge()) < 0) ASSERT_TRUE(machine.clients[0]->wait_for_wake());
    EXPECT_EQ(vector, 0x30);
    write(machine[0], reg::eoi, 0);
  }
  out(0x43, 0x30);
}

TEST_F(IrqRoutingTest, TablesChangeWhileInterruptsAreRaised) {
  routing.attach(chips);
  std::atomic<bool> stop{false};
  std::thread raiser([&] {
    while (!stop) routing.pulse_irq(5);
  });
  for (int i = 0; i < 300; ++i) EXPECT_EQ(set({msi_route(5, 0xfee00000, 0x40 + i % 16)}), 0);
  stop = true;
  raiser.join();
}

}  // namespace
}  // namespace anykvm::vm
