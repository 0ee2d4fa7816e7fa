// The PCI bus: configuration mechanism, BARs, interrupt routing, reset control; the virtio-pci transport on it.
#include <gtest/gtest.h>
#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>

#include <cstring>

#include "vmm/pci/bridges.h"
#include "vmm/pci/bus.h"
#include "vmm/recording_irq_line.h"
#include "vmm/virtio/pci.h"

namespace anykvm::vmm {
namespace {

/// A bus as a guest's driver sees it.
struct Board {
  unsigned resets = 0;
  RecordingIrqLine irq10, irq11;
  PciBus bus{[this] { ++resets; }};
  I440fx host;
  Piix3 isa{lines()};

  Board() {
    bus.add(0, host, isa);
    bus.add(1, isa, isa);
  }
  std::array<IrqLine*, 16> lines() {
    std::array<IrqLine*, 16> result{};
    result[10] = &irq10;
    result[11] = &irq11;
    return result;
  }
  void select(unsigned slot, unsigned offset) {
    const u32 address = 0x8000'0000 | slot << 11 | (offset & 0xfc);
    bus.write(0, {reinterpret_cast<const u8*>(&address), 4});
  }
  u32 config(unsigned slot, unsigned offset, unsigned bytes = 4) {
    select(slot, offset);
    u32 value = ~u32{0};
    bus.read(4 + (offset & 3), {reinterpret_cast<u8*>(&value), bytes});
    return bytes == 4 ? value : value & ((1u << (8 * bytes)) - 1);
  }
  void set_config(unsigned slot, unsigned offset, u32 value, unsigned bytes = 4) {
    select(slot, offset);
    bus.write(4 + (offset & 3), {reinterpret_cast<const u8*>(&value), bytes});
  }
  u64 mem(Gpa gpa, unsigned bytes) {
    u64 value = ~u64{0};
    bus.memory().read(gpa - PciBus::window_begin, {reinterpret_cast<u8*>(&value), bytes});
    return bytes == 8 ? value : value & ((u64{1} << (8 * bytes)) - 1);
  }
  void set_mem(Gpa gpa, u64 value, unsigned bytes) {
    bus.memory().write(gpa - PciBus::window_begin, {reinterpret_cast<const u8*>(&value), bytes});
  }
};

TEST(PciBus, FindsFunctionsBySlot) {
  Board board;
  EXPECT_EQ(board.config(0, 0), 0x1237'8086u);
  EXPECT_EQ(board.config(1, PCI_CLASS_DEVICE, 2), 0x0601u);
  EXPECT_EQ(board.config(1, PCI_CLASS_DEVICE + 1, 1), 0x06u) << "a byte of a doubleword";
  EXPECT_EQ(board.config(2, 0), ~u32{0}) << "an empty slot";
  board.select(0, 0);
  const u32 disabled = 0;
  board.bus.write(0, {reinterpret_cast<const u8*>(&disabled), 4});
  u32 value = ~u32{0};
  board.bus.read(4, {reinterpret_cast<u8*>(&value), 4});
  EXPECT_EQ(value, ~u32{0}) << "not enabled";
}

TEST(PciBus, OnlySomeBitsAreWritable) {
  Board board;
  board.set_config(0, PCI_VENDOR_ID, 0);
  EXPECT_EQ(board.config(0, 0), 0x1237'8086u);
  board.set_config(0, 0x59, 0xff, 1);
  EXPECT_EQ(board.config(0, 0x59, 1), 0x33u) << "PAM remembers its four bits";
}

TEST(PciBus, ResetControlNeedsAnEdge) {
  Board board;
  const auto write = [&](u8 value) { board.bus.write(1, {&value, 1}); };
  write(0x02);
  EXPECT_EQ(board.resets, 0u);
  write(0x06);
  EXPECT_EQ(board.resets, 1u);
  write(0x06);
  EXPECT_EQ(board.resets, 1u);
}

TEST(Piix3, RoutesAndShares) {
  Board board;
  board.isa.set_pin(2, true);  // PIRQB
  EXPECT_FALSE(board.irq10.level) << "not routed";
  board.set_config(1, 0x61, 10, 1);
  EXPECT_TRUE(board.irq10.level);
  board.isa.set_pin(6, true);  // PIRQB as well
  board.isa.set_pin(2, false);
  EXPECT_TRUE(board.irq10.level) << "the other still holds it";
  board.set_config(1, 0x61, 11, 1);
  EXPECT_FALSE(board.irq10.level);
  EXPECT_TRUE(board.irq11.level);
  board.isa.set_pin(6, false);
  EXPECT_FALSE(board.irq11.level);
}

struct SmallDevice final : VirtioDevice {
  u32 id() const override { return VIRTIO_ID_BLOCK; }
  u64 features() const override { return 5; }
  std::span<const u16> queue_sizes() const override { return sizes; }
  std::span<const u8> config() const override { return configuration; }
  void activate(u64 features) override { activated_with = features; }
  void notify(unsigned queue) override { notified.push_back(queue); }
  void answer() {
    Chain chain;
    while (serve(1, chain, 1, [](Chain& c) { return u32(c.writable.copy_in(0, std::vector<u8>{7})); }) ==
           Served::more) {
    }
  }
  u16 sizes[2] = {16, 64};
  u8 configuration[4] = {1, 2, 3, 4};
  u64 activated_with = 0;
  std::vector<unsigned> notified;
};

struct VirtioPciTest : testing::Test {
  static constexpr unsigned slot = 4;  // PIRQD
  static constexpr Gpa bar = 0xfebf'c000;
  GuestMemory memory{4 << 20};
  Board board;
  SmallDevice* device = nullptr;
  VirtioPci function{make(), memory};

  std::unique_ptr<VirtioDevice> make() {
    auto made = std::make_unique<SmallDevice>();
    device = made.get();
    return made;
  }
  void SetUp() override {
    board.bus.add(slot, function, board.isa);
    board.set_config(1, 0x63, 11, 1);
    board.set_config(slot, PCI_BASE_ADDRESS_0, u32(bar));
    board.set_config(slot, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
  }
  /// The BAR offset of a structure, from its capability.
  Gpa structure(u8 type) {
    for (unsigned at = board.config(slot, PCI_CAPABILITY_LIST, 1); at != 0; at = board.config(slot, at + 1, 1))
      if (board.config(slot, at + 3, 1) == type) return bar + board.config(slot, at + 8);
    ADD_FAILURE() << "no capability of type " << int(type);
    return bar;
  }
};

TEST_F(VirtioPciTest, SaysWhatItIs) {
  EXPECT_EQ(board.config(slot, 0), 0x1042'1af4u);
  EXPECT_EQ(board.config(slot, PCI_INTERRUPT_PIN, 1), 1u);
  EXPECT_NE(board.config(slot, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST, 0u);
}

TEST_F(VirtioPciTest, BarIsSizedAndMoved) {
  board.set_config(slot, PCI_BASE_ADDRESS_0, ~u32{0});
  EXPECT_EQ(board.config(slot, PCI_BASE_ADDRESS_0), ~u32{0x3fff});
  const Gpa elsewhere = 0xe000'0000;
  board.set_config(slot, PCI_BASE_ADDRESS_0, u32(elsewhere));
  EXPECT_EQ(board.mem(elsewhere + VIRTIO_PCI_COMMON_NUMQ, 2), 2u);
  EXPECT_EQ(board.mem(bar + VIRTIO_PCI_COMMON_NUMQ, 2), 0xffffu) << "nothing is there any more";
  board.set_config(slot, PCI_COMMAND, 0, 2);
  EXPECT_EQ(board.mem(elsewhere + VIRTIO_PCI_COMMON_NUMQ, 2), 0xffffu) << "memory space is off";
}

TEST_F(VirtioPciTest, RunsAQueue) {
  const Gpa common = structure(VIRTIO_PCI_CAP_COMMON_CFG), isr = structure(VIRTIO_PCI_CAP_ISR_CFG);
  EXPECT_EQ(board.mem(structure(VIRTIO_PCI_CAP_DEVICE_CFG) + 1, 2), 0x0302u);
  board.set_mem(common + VIRTIO_PCI_COMMON_DFSELECT, 1, 4);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_DF, 4) & 1, 1u) << "version 1";
  board.set_mem(common + VIRTIO_PCI_COMMON_GFSELECT, 1, 4);
  board.set_mem(common + VIRTIO_PCI_COMMON_GF, 1, 4);
  u8 status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
  board.set_mem(common + VIRTIO_PCI_COMMON_STATUS, status, 1);
  ASSERT_EQ(board.mem(common + VIRTIO_PCI_COMMON_STATUS, 1), status);

  board.set_mem(common + VIRTIO_PCI_COMMON_Q_SELECT, 1, 2);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_Q_SIZE, 2), 64u);
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_SIZE, 8, 2);
  const Gpa descriptors = 0x10000, available = 0x11000, used = 0x12000, buffer = 0x13000;
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_DESCLO, descriptors, 4);
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_AVAILLO, available, 8);
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_USEDLO, used, 4);
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_Q_ENABLE, 2), 1u);
  board.set_mem(common + VIRTIO_PCI_COMMON_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK, 1);
  EXPECT_EQ(device->activated_with, u64{1} << VIRTIO_F_VERSION_1);

  const u64 descriptor[] = {buffer, u64{1} | u64{2} << 32};  // one byte, for the device to write
  memory.write(descriptors, {reinterpret_cast<const u8*>(descriptor), sizeof descriptor});
  const u16 ring[] = {0, 1, 0};
  memory.write(available, {reinterpret_cast<const u8*>(ring), sizeof ring});
  device->notified.clear();
  board.set_mem(structure(VIRTIO_PCI_CAP_NOTIFY_CFG) + 4, 1, 2);
  EXPECT_EQ(device->notified, std::vector<unsigned>{1});
  device->answer();
  EXPECT_EQ(memory.at(buffer, 1)[0], 7);
  EXPECT_TRUE(board.irq11.level);
  EXPECT_EQ(board.mem(isr, 1), 1u);
  EXPECT_FALSE(board.irq11.level) << "reading the cause takes it back";
  EXPECT_EQ(board.mem(isr, 1), 0u);

  board.set_mem(common + VIRTIO_PCI_COMMON_STATUS, 0, 1);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_STATUS, 1), 0u);
  board.set_mem(common + VIRTIO_PCI_COMMON_Q_SELECT, 1, 2);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0u);
  EXPECT_EQ(board.mem(common + VIRTIO_PCI_COMMON_Q_SIZE, 2), 64u);
}

TEST_F(VirtioPciTest, ConfigurationSpaceHasAWindow) {
  unsigned at = board.config(slot, PCI_CAPABILITY_LIST, 1);
  while (board.config(slot, at + 3, 1) != VIRTIO_PCI_CAP_PCI_CFG) at = board.config(slot, at + 1, 1);
  board.set_config(slot, at + 4, 0, 1);
  board.set_config(slot, at + 8, VIRTIO_PCI_COMMON_NUMQ);
  board.set_config(slot, at + 12, 2);
  EXPECT_EQ(board.config(slot, at + 16, 2), 2u);
  board.set_config(slot, at + 8, VIRTIO_PCI_COMMON_STATUS);
  board.set_config(slot, at + 12, 1);
  board.set_config(slot, at + 16, VIRTIO_CONFIG_S_ACKNOWLEDGE, 1);
  EXPECT_EQ(board.config(slot, at + 16, 1), u32{VIRTIO_CONFIG_S_ACKNOWLEDGE});
}

}  // namespace
}  // namespace anykvm::vmm
