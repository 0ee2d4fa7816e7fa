// The virtio-mmio transport: registers, handshake, interrupt, reset.
#include "vmm/virtio/mmio.h"

#include <linux/virtio_ids.h>

#include "virtio_driver.h"
#include "vmm/virtio/devices.h"

namespace anykvm::vmm {
namespace {

constexpr u64 version_1 = u64{1} << VIRTIO_F_VERSION_1;

/// Answers each chain with one byte, on the notifying thread's behalf when told to.
struct EchoDevice final : VirtioDevice {
  u32 id() const override { return 42; }
  u64 features() const override { return 5; }
  std::span<const u16> queue_sizes() const override { return sizes; }
  std::span<const u8> config() const override { return configuration; }
  void activate(u64 features) override { activated_with = features; }
  void reset() override { ++resets; }
  void notify(unsigned queue) override { notified.push_back(queue); }
  void answer(unsigned queue) {
    Chain chain;
    while (serve(queue, chain, 1, [](Chain& c) {
             return static_cast<u32>(c.writable.copy_in(0, std::vector<u8>{7}));
           }) == Served::more) {
    }
  }

  u16 sizes[2] = {16, 64};
  u8 configuration[6] = {1, 2, 3, 4, 5, 6};
  u64 activated_with = 0;
  int resets = 0;
  std::vector<unsigned> notified;
};

class VirtioMmioTest : public testing::Test {
 protected:
  EchoDevice* device_ = nullptr;
  FakeDriver driver_{[this](EventLoop&) {
    auto made = std::make_unique<EchoDevice>();
    device_ = made.get();
    return made;
  }};
};

TEST_F(VirtioMmioTest, SaysWhatItIs) {
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_MAGIC_VALUE), 0x74726976u);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_VERSION), 2u);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_DEVICE_ID), 42u);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_CONFIG_GENERATION), 0u);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_SHM_LEN_LOW), ~0u);
  EXPECT_EQ(driver_.offered(),
            5 | version_1 | u64{1} << VIRTIO_RING_F_EVENT_IDX | u64{1} << VIRTIO_RING_F_INDIRECT_DESC);
  driver_.set_reg(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_DEVICE_FEATURES), 0u);
  for (auto [queue, size] : {std::pair{0u, 16u}, {1u, 64u}, {2u, 0u}, {~0u, 0u}}) {
    driver_.set_reg(VIRTIO_MMIO_QUEUE_SEL, queue);
    EXPECT_EQ(driver_.reg(VIRTIO_MMIO_QUEUE_NUM_MAX), size);
  }
}

TEST_F(VirtioMmioTest, ConfigurationTakesAnyAccess) {
  const auto read = [&](u64 offset, size_t size) {
    u64 value = ~u64{0};
    driver_.mmio().read(VIRTIO_MMIO_CONFIG + offset, {reinterpret_cast<u8*>(&value), size});
    return size == 8 ? value : value & ((u64{1} << (8 * size)) - 1);
  };
  EXPECT_EQ(read(0, 1), 1u);
  EXPECT_EQ(read(1, 2), 0x0302u);
  EXPECT_EQ(read(2, 4), 0x06050403u);
  EXPECT_EQ(read(4, 4), 0x0605u) << "zeroes behind the end";
  EXPECT_EQ(read(0, 8), 0x060504030201u);
  EXPECT_EQ(read(0xeff, 8), 0u);
}

TEST_F(VirtioMmioTest, RegistersTakeAlignedWordsOnly) {
  u8 byte = 0xff;
  driver_.mmio().read(VIRTIO_MMIO_MAGIC_VALUE, {&byte, 1});
  EXPECT_EQ(byte, 0);
  u32 word = 0xffffffff;
  driver_.mmio().read(2, {reinterpret_cast<u8*>(&word), 4});
  EXPECT_EQ(word, 0u);
  byte = VIRTIO_CONFIG_S_ACKNOWLEDGE;
  driver_.mmio().write(VIRTIO_MMIO_STATUS, {&byte, 1});
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_STATUS), 0u);
}

TEST_F(VirtioMmioTest, NegotiatesWhatItOffersOnly) {
  EXPECT_FALSE(driver_.negotiate(5)) << "without VERSION_1";
  EXPECT_FALSE(driver_.negotiate(version_1 | 2)) << "not offered";
  EXPECT_FALSE(driver_.negotiate(version_1 | u64{1} << 63));
  EXPECT_TRUE(driver_.negotiate(version_1 | 4));
  driver_.set_reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
  driver_.set_reg(VIRTIO_MMIO_DRIVER_FEATURES, 1);  // too late
  driver_.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
  EXPECT_EQ(device_->activated_with, version_1 | 4);
}

TEST_F(VirtioMmioTest, DriverCannotRunWithoutFeatures) {
  driver_.set_reg(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_STATUS), u32{VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER});
  EXPECT_TRUE(device_->notified.empty());
}

TEST_F(VirtioMmioTest, RunningLooksAtAllQueues) {
  driver_.start(2);
  EXPECT_EQ(device_->notified, (std::vector{0u, 1u}));
  driver_.notify(1);
  driver_.notify(2);  // there is none
  EXPECT_EQ(device_->notified, (std::vector{0u, 1u, 1u}));
}

TEST_F(VirtioMmioTest, InterruptLineFollowsTheStatus) {
  driver_.start(2);
  FakeQueue& queue = driver_.queue();
  queue.descriptor(0, FakeDriver::buffers, 1, VRING_DESC_F_WRITE);
  queue.offer(0);
  device_->answer(0);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_INTERRUPT_STATUS), u32{VIRTIO_MMIO_INT_VRING});
  EXPECT_TRUE(driver_.irq().level);
  driver_.set_reg(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
  EXPECT_TRUE(driver_.irq().level) << "another cause was acknowledged";
  driver_.set_reg(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
  EXPECT_FALSE(driver_.irq().level);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_INTERRUPT_STATUS), 0u);
  EXPECT_EQ(driver_.irq().edges, 1);
}

TEST_F(VirtioMmioTest, BrokenRingNeedsAReset) {
  driver_.start(2);
  driver_.queue().announce(1000);
  device_->answer(0);
  EXPECT_TRUE(driver_.needs_reset());
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_INTERRUPT_STATUS), u32{VIRTIO_MMIO_INT_CONFIG});
  EXPECT_NE(driver_.mmio().failure(), "");
  FakeQueue& other = driver_.queue(1);
  other.descriptor(0, FakeDriver::buffers, 1, VRING_DESC_F_WRITE);
  other.offer(0);
  device_->answer(1);
  EXPECT_EQ(other.used_index(), 0) << "no queue is served any more";

  driver_.start(2);
  EXPECT_FALSE(driver_.needs_reset());
  EXPECT_FALSE(driver_.irq().level);
  driver_.queue().descriptor(0, FakeDriver::buffers, 1, VRING_DESC_F_WRITE);
  driver_.queue().offer(0);
  device_->answer(0);
  EXPECT_EQ(driver_.queue().used_index(), 1);
}

TEST_F(VirtioMmioTest, ImpossibleQueueNeedsAReset) {
  ASSERT_TRUE(driver_.negotiate(version_1));
  driver_.set_reg(VIRTIO_MMIO_QUEUE_SEL, 0);
  driver_.set_reg(VIRTIO_MMIO_QUEUE_NUM, 32);  // the device has 16
  driver_.set_reg(VIRTIO_MMIO_QUEUE_READY, 1);
  EXPECT_TRUE(driver_.needs_reset());
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_QUEUE_READY), 0u);

  ASSERT_TRUE(driver_.negotiate(version_1));
  driver_.set_reg(VIRTIO_MMIO_QUEUE_NUM, 16);
  driver_.set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, ~u64{15});
  driver_.set_reg(VIRTIO_MMIO_QUEUE_READY, 1);
  EXPECT_TRUE(driver_.needs_reset());
}

TEST_F(VirtioMmioTest, ReadyQueueStaysWhereItIs) {
  driver_.start(2);
  driver_.set_reg(VIRTIO_MMIO_QUEUE_SEL, 0);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_QUEUE_READY), 1u);
  driver_.set_address(VIRTIO_MMIO_QUEUE_USED_LOW, 0);
  driver_.queue().descriptor(0, FakeDriver::buffers, 1, VRING_DESC_F_WRITE);
  driver_.queue().offer(0);
  device_->answer(0);
  EXPECT_EQ(driver_.queue().used_index(), 1);
  driver_.set_reg(VIRTIO_MMIO_QUEUE_READY, 0);
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_QUEUE_READY), 0u);
  driver_.queue().offer(0);
  device_->answer(0);
  EXPECT_EQ(driver_.queue().used_index(), 1);
}

TEST_F(VirtioMmioTest, ResetForgetsEverything) {
  driver_.start(2);
  driver_.set_reg(VIRTIO_MMIO_STATUS, 0);
  EXPECT_EQ(device_->resets, 2);  // the handshake begins with one
  EXPECT_EQ(driver_.reg(VIRTIO_MMIO_STATUS), 0u);
  for (u32 queue : {0u, 1u}) {
    driver_.set_reg(VIRTIO_MMIO_QUEUE_SEL, queue);
    EXPECT_EQ(driver_.reg(VIRTIO_MMIO_QUEUE_READY), 0u);
  }
  driver_.queue().offer(0);
  device_->answer(0);
  EXPECT_EQ(driver_.queue().used_index(), 0);
}

TEST(VirtioEntropyTest, FillsBuffers) {
  FakeDriver driver([](EventLoop& loop) { return make_entropy(loop); });
  EXPECT_EQ(driver.reg(VIRTIO_MMIO_DEVICE_ID), u32{VIRTIO_ID_RNG});
  driver.start();
  FakeQueue& queue = driver.queue();
  queue.descriptor(0, FakeDriver::buffers, 64, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
  queue.descriptor(1, FakeDriver::buffers + 4096, 64, VRING_DESC_F_WRITE);
  queue.descriptor(2, FakeDriver::buffers, 64);  // nothing to write into
  queue.descriptor(3, FakeDriver::buffers, 1 << 20, VRING_DESC_F_WRITE);
  for (u16 head : {0, 2, 3}) queue.offer(head);
  driver.notify(0);
  ASSERT_TRUE(driver.completed(0, 3));
  EXPECT_EQ(queue.used(0).len, 128u);
  EXPECT_EQ(queue.used(1).len, 0u);
  EXPECT_EQ(queue.used(2).len, 4096u);
  const auto half = driver.bytes(FakeDriver::buffers + 4096 - 64, 64);
  EXPECT_FALSE(std::ranges::all_of(half, [](u8 byte) { return byte == 0; }));
  EXPECT_TRUE(FakeDriver::eventually([&] { return driver.irq().level.load(); }));
}

}  // namespace
}  // namespace anykvm::vmm
