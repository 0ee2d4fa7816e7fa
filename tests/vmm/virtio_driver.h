// A virtio driver for tests: sets a device up through its registers and writes rings into guest memory.
#pragma once

#include <gtest/gtest.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "vmm/event_loop.h"
#include "vmm/virtio/mmio.h"

namespace anykvm::vmm {

struct FakeIrq final : IrqLine {
  std::atomic<bool> level{false};
  std::atomic<int> edges{0};
  void set(bool high) override {
    if (!level.exchange(high) && high) ++edges;
  }
};

/// One queue's rings, from `base` on, written as a driver would (or as no driver would).
class FakeQueue {
 public:
  FakeQueue(const GuestMemory& memory, Gpa base, u32 size)
      : memory_(memory), layout_{size, base, base + size * 16u, base + 0x8000} {}

  const QueueLayout& layout() const { return layout_; }

  void descriptor(u32 index, u64 addr, u32 len, u16 flags = 0, u16 next = 0) {
    put(layout_.descriptors + index * 16u, vring_desc{addr, len, flags, next});
  }
  /// Adds a chain to the ring and announces it.
  void offer(u16 head) {
    put<u16>(layout_.available + 4 + (index_ % layout_.size) * 2u, head);
    announce(++index_);
  }
  void announce(u16 index) {
    index_ = index;
    std::atomic_ref(*reinterpret_cast<u16*>(memory_.at(layout_.available + 2, 2).data())).store(index);
  }
  void available_flags(u16 flags) { put<u16>(layout_.available, flags); }
  void used_event(u16 index) { put<u16>(layout_.available + 4 + layout_.size * 2u, index); }

  u16 used_flags() const { return get<u16>(layout_.used); }
  u16 used_index() const {
    return std::atomic_ref(*reinterpret_cast<u16*>(memory_.at(layout_.used + 2, 2).data())).load();
  }
  u16 available_event() const { return get<u16>(layout_.used + 4 + layout_.size * 8u); }
  vring_used_elem used(u16 index) const { return get<vring_used_elem>(layout_.used + 4 + (index % layout_.size) * 8u); }

  template <typename T>
  void put(Gpa at, const T& value) {
    ASSERT_TRUE(memory_.write(at, {reinterpret_cast<const u8*>(&value), sizeof(value)}));
  }
  template <typename T>
  T get(Gpa at) const {
    T value{};
    EXPECT_TRUE(memory_.read(at, {reinterpret_cast<u8*>(&value), sizeof(value)}));
    return value;
  }

 private:
  const GuestMemory& memory_;
  QueueLayout layout_;
  u16 index_ = 0;
};

/// A device behind its transport, with 4 MiB of guest memory. Queue n lies at 64 KiB * (n + 1); buffers from 1 MiB on.
class FakeDriver {
 public:
  static constexpr Gpa buffers = 1 << 20;
  static constexpr u32 queue_size = 16;

  /// `make(EventLoop&)` makes the device. The loop runs.
  template <typename Make>
  explicit FakeDriver(Make&& make) : mmio_(std::make_unique<VirtioMmio>(make(loop_), memory_, irq_)) {
    loop_.start();
  }
  ~FakeDriver() { loop_.stop(); }

  u32 reg(u64 offset) {
    u32 value = 0;
    mmio_->read(offset, {reinterpret_cast<u8*>(&value), sizeof(value)});
    return value;
  }
  void set_reg(u64 offset, u32 value) { mmio_->write(offset, {reinterpret_cast<const u8*>(&value), sizeof(value)}); }
  void set_address(u64 offset, u64 value) {
    set_reg(offset, static_cast<u32>(value));
    set_reg(offset + 4, static_cast<u32>(value >> 32));
  }

  u64 offered() {
    set_reg(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    const u64 high = reg(VIRTIO_MMIO_DEVICE_FEATURES);
    set_reg(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    return high << 32 | reg(VIRTIO_MMIO_DEVICE_FEATURES);
  }
  bool negotiate(u64 features) {
    set_reg(VIRTIO_MMIO_STATUS, 0);
    set_reg(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    for (u32 half : {0u, 1u}) {
      set_reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
      set_reg(VIRTIO_MMIO_DRIVER_FEATURES, static_cast<u32>(features >> (32 * half)));
    }
    add_status(VIRTIO_CONFIG_S_FEATURES_OK);
    return reg(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK;
  }
  void add_status(u32 bit) { set_reg(VIRTIO_MMIO_STATUS, reg(VIRTIO_MMIO_STATUS) | bit); }
  FakeQueue& set_up_queue(u32 index) {
    queues_.resize(std::max<size_t>(queues_.size(), index + 1));
    queues_[index] = std::make_unique<FakeQueue>(memory_, (index + 1) * 0x10000, queue_size);
    const QueueLayout& layout = queues_[index]->layout();
    std::ranges::fill(memory_.at(layout.descriptors, 0x10000), u8{0});
    set_reg(VIRTIO_MMIO_QUEUE_SEL, index);
    set_reg(VIRTIO_MMIO_QUEUE_NUM, layout.size);
    set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, layout.descriptors);
    set_address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, layout.available);
    set_address(VIRTIO_MMIO_QUEUE_USED_LOW, layout.used);
    set_reg(VIRTIO_MMIO_QUEUE_READY, 1);
    return *queues_[index];
  }
  /// The whole handshake, with all features but those in `without`.
  void start(u32 queues = 1, u64 without = 0) {
    ASSERT_TRUE(negotiate(offered() & ~without));
    for (u32 index = 0; index < queues; ++index) set_up_queue(index);
    add_status(VIRTIO_CONFIG_S_DRIVER_OK);
  }
  void notify(u32 queue) { set_reg(VIRTIO_MMIO_QUEUE_NOTIFY, queue); }
  FakeQueue& queue(u32 index = 0) { return *queues_[index]; }
  bool needs_reset() { return reg(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET; }

  template <typename Condition>
  static bool eventually(Condition&& condition) {
    for (int i = 0; i < 5000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }
  bool completed(u32 queue_index, u16 count) {
    return eventually([&] { return queue(queue_index).used_index() == count; });
  }

  std::span<u8> bytes(Gpa at, u64 size) { return memory_.at(at, size); }
  GuestMemory& memory() { return memory_; }
  FakeIrq& irq() { return irq_; }
  VirtioMmio& mmio() { return *mmio_; }

 private:
  GuestMemory memory_{4 << 20};
  FakeIrq irq_;
  EventLoop loop_;
  std::unique_ptr<VirtioMmio> mmio_;
  std::vector<std::unique_ptr<FakeQueue>> queues_;
};

}  // namespace anykvm::vmm
