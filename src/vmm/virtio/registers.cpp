#include "vmm/virtio/registers.h"

#include <linux/virtio_config.h>
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <algorithm>
#include <cstring>

namespace anykvm::vmm {

namespace {

constexpr u32 cause_queue = 1, cause_configuration = 2;

constexpr u64 ring_features =
    (u64{1} << VIRTIO_F_VERSION_1) | (u64{1} << VIRTIO_RING_F_INDIRECT_DESC) | (u64{1} << VIRTIO_RING_F_EVENT_IDX);

}  // namespace

u32 VirtioRegisters::half(u64 value, u32 select) {
  if (select > 1) return 0;
  return static_cast<u32>(value >> (32 * select));
}

void VirtioRegisters::set_half(u64& value, u32 select, u32 half) {
  if (select > 1) return;
  const unsigned shift = 32 * select;
  value = (value & ~(u64{0xffff'ffff} << shift)) | (u64{half} << shift);
}

VirtioRegisters::VirtioRegisters(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory, IrqLine& irq)
    : device_(std::move(device)), memory_(memory), queues_(device_->queue_sizes().size()), irq_(irq) {
  device_->attach(*this);
}

u64 VirtioRegisters::offered_features() const { return device_->features() | ring_features; }

VirtQueue* VirtioRegisters::queue(unsigned index) {
  if (!(status_ & VIRTIO_CONFIG_S_DRIVER_OK) || (status_ & VIRTIO_CONFIG_S_NEEDS_RESET)) return nullptr;
  if (index >= queues_.size() || !queues_[index].ready) return nullptr;
  return &*queues_[index].ready;
}

void VirtioRegisters::announce(VirtQueue& queue) {
  if (queue.needs_interrupt()) raise(cause_queue);
}

void VirtioRegisters::fail(const std::string& reason) {
  failure_ = reason;
  status_ |= VIRTIO_CONFIG_S_NEEDS_RESET;
  if (status_ & VIRTIO_CONFIG_S_DRIVER_OK) raise(cause_configuration);
}

std::string VirtioRegisters::failure() {
  const auto held = lock();
  return failure_;
}

void VirtioRegisters::raise(u32 cause) {
  const std::lock_guard held(interrupt_mutex_);
  if (interrupt_status_.fetch_or(cause) == 0) irq_.raise();
}

u32 VirtioRegisters::acknowledge(u32 causes) {
  const std::lock_guard held(interrupt_mutex_);
  const u32 before = interrupt_status_.fetch_and(~causes);
  if (before != 0 && (before & ~causes) == 0) irq_.lower();
  return before & causes;
}

void VirtioRegisters::notify(u32 queue) {
  if (queue < queues_.size()) device_->notify(queue);
}

void VirtioRegisters::read_device_config(u64 offset, std::span<u8> data) {
  std::ranges::fill(data, u8{0});
  const auto config = device_->config();
  if (offset < config.size()) std::memcpy(data.data(), &config[offset], std::min(data.size(), config.size() - offset));
}

u16 VirtioRegisters::selected_queue_limit() const {
  return queue_select < queues_.size() ? device_->queue_sizes()[queue_select] : u16{0};
}

void VirtioRegisters::write_driver_feature(u32 value) {
  if (!(status_ & VIRTIO_CONFIG_S_FEATURES_OK)) set_half(driver_features_, driver_feature_select, value);
}

void VirtioRegisters::write_status(u32 value) {
  if (value == 0) return reset();
  u32 added = value & 0xff & ~(status_ | VIRTIO_CONFIG_S_NEEDS_RESET);  // bits are only ever added; one is ours
  if (added & VIRTIO_CONFIG_S_FEATURES_OK) {
    const bool acceptable =
        (driver_features_ & ~offered_features()) == 0 && ((driver_features_ >> VIRTIO_F_VERSION_1) & 1);
    if (!acceptable) added &= ~u32{VIRTIO_CONFIG_S_FEATURES_OK};
  }
  if (!((status_ | added) & VIRTIO_CONFIG_S_FEATURES_OK)) added &= ~u32{VIRTIO_CONFIG_S_DRIVER_OK};
  status_ |= added;
  if (!(added & VIRTIO_CONFIG_S_DRIVER_OK)) return;
  device_->activate(driver_features_);
  for (unsigned index = 0; index < queues_.size(); ++index) device_->notify(index);  // chains that were there before us
}

void VirtioRegisters::enable_queue(Queue& queue) {
  if (queue.ready || !(status_ & VIRTIO_CONFIG_S_FEATURES_OK)) return;
  if (queue.layout.size > selected_queue_limit()) return fail("queue size is larger than the device's");
  auto made = VirtQueue::make(memory_, queue.layout, driver_features_);
  if (!made) return fail(made.error());
  queue.ready.emplace(*made);
}

void VirtioRegisters::reset() {
  device_->reset();
  status_ = 0;
  device_feature_select = driver_feature_select = 0;
  driver_features_ = 0;
  queue_select = 0;
  for (Queue& queue : queues_) queue = {};
  acknowledge(~u32{0});
}

}  // namespace anykvm::vmm
