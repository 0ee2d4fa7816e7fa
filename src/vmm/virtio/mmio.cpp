#include "vmm/virtio/mmio.h"

#define VIRTIO_MMIO_NO_LEGACY
#include <linux/virtio_mmio.h>

#include <algorithm>
#include <cstring>

namespace anykvm::vmm {

namespace {

constexpr u32 magic = 0x74726976;  // "virt"
constexpr u32 version = 2;
constexpr u32 vendor = 0x4b594e41;  // "ANYK"

}  // namespace

// Control registers are 32 bits wide, and only aligned 32-bit accesses reach them; the configuration space takes any.
void VirtioMmio::read(u64 offset, std::span<u8> data) {
  if (offset >= VIRTIO_MMIO_CONFIG) return read_device_config(offset - VIRTIO_MMIO_CONFIG, data);
  std::ranges::fill(data, u8{0});
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
    case VIRTIO_MMIO_DEVICE_ID: return device().id();
    case VIRTIO_MMIO_VENDOR_ID: return vendor;
    case VIRTIO_MMIO_INTERRUPT_STATUS: return interrupt_status();
    case VIRTIO_MMIO_CONFIG_GENERATION: return 0;
    case VIRTIO_MMIO_SHM_LEN_LOW:  // no shared memory regions: length and base -1
    case VIRTIO_MMIO_SHM_LEN_HIGH:
    case VIRTIO_MMIO_SHM_BASE_LOW:
    case VIRTIO_MMIO_SHM_BASE_HIGH: return ~u32{0};
    default: break;
  }
  const auto held = lock();
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES: return device_feature();
    case VIRTIO_MMIO_QUEUE_NUM_MAX: return selected_queue_limit();
    case VIRTIO_MMIO_QUEUE_READY: {
      const Queue* queue = selected_queue();
      return queue && queue->ready ? 1 : 0;
    }
    case VIRTIO_MMIO_STATUS: return status();
    default: return 0;
  }
}

void VirtioMmio::write_register(u64 offset, u32 value) {
  if (offset == VIRTIO_MMIO_INTERRUPT_ACK) {
    acknowledge(value);
    return;
  }
  if (offset == VIRTIO_MMIO_QUEUE_NOTIFY) return notify(value);

  const auto held = lock();
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL: device_feature_select = value; return;
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL: driver_feature_select = value; return;
    case VIRTIO_MMIO_DRIVER_FEATURES: write_driver_feature(value); return;
    case VIRTIO_MMIO_QUEUE_SEL: queue_select = value; return;
    case VIRTIO_MMIO_STATUS: write_status(value); return;
    default: break;
  }
  Queue* const queue = selected_queue();
  if (!queue) return;
  if (offset == VIRTIO_MMIO_QUEUE_READY) {
    if (value == 0)
      queue->ready.reset();
    else
      enable_queue(*queue);
    return;
  }
  if (queue->ready) return;  // a queue in use stays where it is
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM: queue->layout.size = value; break;
    case VIRTIO_MMIO_QUEUE_DESC_LOW: set_half(queue->layout.descriptors, 0, value); break;
    case VIRTIO_MMIO_QUEUE_DESC_HIGH: set_half(queue->layout.descriptors, 1, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW: set_half(queue->layout.available, 0, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH: set_half(queue->layout.available, 1, value); break;
    case VIRTIO_MMIO_QUEUE_USED_LOW: set_half(queue->layout.used, 0, value); break;
    case VIRTIO_MMIO_QUEUE_USED_HIGH: set_half(queue->layout.used, 1, value); break;
    default: break;
  }
}

}  // namespace anykvm::vmm
