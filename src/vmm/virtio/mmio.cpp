#include "vmm/virtio/mmio.h"

#include <linux/virtio_config.h>
#define VIRTIO_MMIO_NO_LEGACY
#include <linux/virtio_mmio.h>
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <algorithm>
#include <cstring>

namespace anykvm::vmm {

namespace {

constexpr u32 magic = 0x74726976;  // "virt"
constexpr u32 version = 2;
constexpr u32 vendor = 0x4b594e41;  // "ANYK"

constexpr u64 ring_features =
    (u64{1} << VIRTIO_F_VERSION_1) | (u64{1} << VIRTIO_RING_F_INDIRECT_DESC) | (u64{1} << VIRTIO_RING_F_EVENT_IDX);

u32 half(u64 value, u32 select) {
  if (select > 1) return 0;
  return static_cast<u32>(value >> (32 * select));
}

void set_half(u64& value, u32 select, u32 half) {
  if (select > 1) return;
  const unsigned shift = 32 * select;
  value = (value & ~(u64{0xffff'ffff} << shift)) | (u64{half} << shift);
}

}  // namespace

VirtioMmio::VirtioMmio(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory, IrqLine& irq)
    : device_(std::move(device)), memory_(memory), queues_(device_->queue_sizes().size()), irq_(irq) {
  device_->attach(*this);
}

VirtioMmio::~VirtioMmio() {
  // The device's own thread may still be at work with our members: it ends first.
  device_.reset();
}

u64 VirtioMmio::offered_features() const { return device_->features() | ring_features; }

VirtQueue* VirtioMmio::queue(unsigned index) {
  if (!(status_ & VIRTIO_CONFIG_S_DRIVER_OK) || (status_ & VIRTIO_CONFIG_S_NEEDS_RESET)) return nullptr;
  if (index >= queues_.size() || !queues_[index].ready) return nullptr;
  return &*queues_[index].ready;
}

void VirtioMmio::announce(VirtQueue& queue) {
  if (queue.needs_interrupt()) raise(VIRTIO_MMIO_INT_VRING);
}

void VirtioMmio::fail(const std::string& reason) {
  failure_ = reason;
  status_ |= VIRTIO_CONFIG_S_NEEDS_RESET;
  if (status_ & VIRTIO_CONFIG_S_DRIVER_OK) raise(VIRTIO_MMIO_INT_CONFIG);
}

std::string VirtioMmio::failure() {
  const auto held = lock();
  return failure_;
}

void VirtioMmio::raise(u32 cause) {
  const std::lock_guard held(interrupt_mutex_);
  if (interrupt_status_.fetch_or(cause) == 0) irq_.raise();
}

void VirtioMmio::acknowledge(u32 causes) {
  const std::lock_guard held(interrupt_mutex_);
  const u32 before = interrupt_status_.fetch_and(~causes);
  if (before != 0 && (before & ~causes) == 0) irq_.lower();
}

// Control registers are 32 bits wide, and only aligned 32-bit accesses reach them; the configuration space takes any.
void VirtioMmio::read(u64 offset, std::span<u8> data) {
  std::ranges::fill(data, u8{0});
  if (offset >= VIRTIO_MMIO_CONFIG) {
    const auto config = device_->config();
    const u64 begin = offset - VIRTIO_MMIO_CONFIG;
    if (begin < config.size()) std::memcpy(data.data(), &config[begin], std::min(data.size(), config.size() - begin));
    return;
  }
  if (data.size() != sizeof(u32) || offset % sizeof(u32) != 0) return;
  const u32 value = read_register(offset);
  std::memcpy(data.data(), &value, sizeof(value));
}

void VirtioMmio::write(u64 offset, std::span<const u8> data) {
  if (offset >= VIRTIO_MMIO_CONFIG) return;  // no device has a writable field
  if (data.size() != sizeof(u32) || offset % sizeof(u32) != 0) return;
  u32 value;
  std::memcpy(&value, data.data(), sizeof(value));
  write_register(offset, value);
}

u32 VirtioMmio::read_register(u64 offset) {
  switch (offset) {  // constant, or with its own lock
    case VIRTIO_MMIO_MAGIC_VALUE: return magic;
    case VIRTIO_MMIO_VERSION: return version;
    case VIRTIO_MMIO_DEVICE_ID: return device_->id();
    case VIRTIO_MMIO_VENDOR_ID: return vendor;
    case VIRTIO_MMIO_INTERRUPT_STATUS: return interrupt_status_;
    case VIRTIO_MMIO_CONFIG_GENERATION: return 0;
    case VIRTIO_MMIO_SHM_LEN_LOW:  // no shared memory regions: length and base -1
    case VIRTIO_MMIO_SHM_LEN_HIGH:
    case VIRTIO_MMIO_SHM_BASE_LOW:
    case VIRTIO_MMIO_SHM_BASE_HIGH: return ~u32{0};
    default: break;
  }
  const auto held = lock();
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES: return half(offered_features(), device_features_select_);
    case VIRTIO_MMIO_QUEUE_NUM_MAX: return queue_select_ < queues_.size() ? device_->queue_sizes()[queue_select_] : 0;
    case VIRTIO_MMIO_QUEUE_READY: return queue_select_ < queues_.size() && queues_[queue_select_].ready ? 1 : 0;
    case VIRTIO_MMIO_STATUS: return status_;
    default: return 0;
  }
}

void VirtioMmio::write_register(u64 offset, u32 value) {
  if (offset == VIRTIO_MMIO_INTERRUPT_ACK) return acknowledge(value);
  if (offset == VIRTIO_MMIO_QUEUE_NOTIFY) {
    if (value < queues_.size()) device_->notify(value);
    return;
  }

  const auto held = lock();
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL: device_features_select_ = value; return;
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL: driver_features_select_ = value; return;
    case VIRTIO_MMIO_DRIVER_FEATURES:
      if (!(status_ & VIRTIO_CONFIG_S_FEATURES_OK)) set_half(driver_features_, driver_features_select_, value);
      return;
    case VIRTIO_MMIO_QUEUE_SEL: queue_select_ = value; return;
    case VIRTIO_MMIO_STATUS: write_status(value); return;
    default: break;
  }
  if (queue_select_ >= queues_.size()) return;
  Queue& queue = queues_[queue_select_];
  if (offset == VIRTIO_MMIO_QUEUE_READY) return write_queue_ready(queue, value);
  if (queue.ready) return;  // a queue in use stays where it is
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM: queue.layout.size = value; break;
    case VIRTIO_MMIO_QUEUE_DESC_LOW: set_half(queue.layout.descriptors, 0, value); break;
    case VIRTIO_MMIO_QUEUE_DESC_HIGH: set_half(queue.layout.descriptors, 1, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW: set_half(queue.layout.available, 0, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH: set_half(queue.layout.available, 1, value); break;
    case VIRTIO_MMIO_QUEUE_USED_LOW: set_half(queue.layout.used, 0, value); break;
    case VIRTIO_MMIO_QUEUE_USED_HIGH: set_half(queue.layout.used, 1, value); break;
    default: break;
  }
}

void VirtioMmio::write_status(u32 value) {
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

void VirtioMmio::write_queue_ready(Queue& queue, u32 value) {
  if (value == 0) {
    queue.ready.reset();
    return;
  }
  if (queue.ready || !(status_ & VIRTIO_CONFIG_S_FEATURES_OK)) return;
  if (queue.layout.size > device_->queue_sizes()[queue_select_]) return fail("queue size is larger than the device's");
  auto made = VirtQueue::make(memory_, queue.layout, driver_features_);
  if (!made) return fail(made.error());
  queue.ready.emplace(std::move(*made));
}

void VirtioMmio::reset() {
  device_->reset();
  status_ = 0;
  device_features_select_ = driver_features_select_ = 0;
  driver_features_ = 0;
  queue_select_ = 0;
  for (Queue& queue : queues_) queue = {};
  acknowledge(~u32{0});
}

}  // namespace anykvm::vmm
