// BAR 0, a page each: common configuration, interrupt status, device configuration, notifications.
#include "vmm/virtio/pci.h"

#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>

#include <algorithm>
#include <cstring>

namespace anykvm::vmm {

namespace {

constexpr u32 region_size = 0x1000, bar_size = 0x4000;
enum : u64 { common_region = 0, status_region = 0x1000, device_region = 0x2000, notify_region = 0x3000 };
constexpr u32 notify_multiplier = 4;
constexpr u16 no_vector = 0xffff;

PciIdentity identity_of(const VirtioDevice& device) {
  constexpr u16 vendor = 0x1af4, first_device = 0x1040;
  u32 class_code = 0xff'0000;
  if (device.id() == VIRTIO_ID_BLOCK) class_code = 0x01'8000;  // mass storage
  if (device.id() == VIRTIO_ID_NET) class_code = 0x02'0000;    // Ethernet
  return {vendor, u16(first_device + device.id()), class_code, 1, vendor, u16(device.id())};
}

/// struct virtio_pci_cap from its third byte on, with what follows it for some types.
struct Capability {
  u8 length;
  u8 type;
  u8 bar = 0;
  u8 padding[3] = {};
  u32 offset;
  u32 size;
  u32 extra = 0;
} __attribute__((packed));

}  // namespace

VirtioPci::VirtioPci(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory)
    : PciFunction(identity_of(*device)), VirtioRegisters(std::move(device), memory, pin_), pin_(*this) {
  add_memory_bar(0, bar_size);
  use_interrupt_pin();
  const auto add = [this](u8 type, u64 offset, u32 size, u32 extra, bool has_extra) {
    const Capability capability{
        .length = u8(has_extra ? 20 : 16), .type = type, .offset = u32(offset), .size = size, .extra = extra};
    constexpr size_t header = 2;
    return add_capability(0x09, {reinterpret_cast<const u8*>(&capability), capability.length - header});
  };
  add(VIRTIO_PCI_CAP_COMMON_CFG, common_region, region_size, 0, false);
  add(VIRTIO_PCI_CAP_ISR_CFG, status_region, region_size, 0, false);
  add(VIRTIO_PCI_CAP_DEVICE_CFG, device_region, region_size, 0, false);
  add(VIRTIO_PCI_CAP_NOTIFY_CFG, notify_region, region_size, notify_multiplier, true);
  window_capability_ = add(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, true);
  allow_writes(window_capability_ + offsetof(virtio_pci_cap, bar), 0xff, 1);
  allow_writes(window_capability_ + offsetof(virtio_pci_cap, offset), ~u32{0}, 4);
  allow_writes(window_capability_ + offsetof(virtio_pci_cap, length), ~u32{0}, 4);
}

bool VirtioPci::window(u64& offset, u64& length) const {
  offset = config32(window_capability_ + offsetof(virtio_pci_cap, offset));
  length = config32(window_capability_ + offsetof(virtio_pci_cap, length));
  const bool valid = length == 1 || length == 2 || length == 4;
  return valid && config8(window_capability_ + offsetof(virtio_pci_cap, bar)) == 0 && offset % length == 0 &&
         offset < bar_size;
}

void VirtioPci::read_config(unsigned offset, std::span<u8> data) {
  u64 at, length;
  if (offset == window_capability_ + sizeof(virtio_pci_cap) && window(at, length) && data.size() >= length)
    return read_bar(0, at, data.first(length));
  PciFunction::read_config(offset, data);
}

void VirtioPci::write_config(unsigned offset, std::span<const u8> data) {
  u64 at, length;
  if (offset == window_capability_ + sizeof(virtio_pci_cap) && window(at, length) && data.size() >= length)
    return write_bar(0, at, data.first(length));
  PciFunction::write_config(offset, data);
}

void VirtioPci::read_bar(unsigned, u64 offset, std::span<u8> data) {
  const u64 region = offset & ~u64{region_size - 1};
  if (region == device_region) return read_device_config(offset - region, data);
  std::ranges::fill(data, u8{0});
  u64 value = 0;
  if (region == common_region) value = read_common(offset);
  if (offset == status_region) value = acknowledge(~u32{0});  // a read takes the causes back
  std::memcpy(data.data(), &value, std::min(data.size(), sizeof(value)));
}

void VirtioPci::write_bar(unsigned, u64 offset, std::span<const u8> data) {
  const u64 region = offset & ~u64{region_size - 1};
  u64 value = 0;
  std::memcpy(&value, data.data(), std::min(data.size(), sizeof(value)));
  if (region == common_region) write_common(offset, value, data.size());
  if (region == notify_region) notify(u32(value & 0xffff));
}

u64 VirtioPci::read_common(u64 offset) {
  const auto held = lock();
  switch (offset) {
    case VIRTIO_PCI_COMMON_DFSELECT: return device_feature_select;
    case VIRTIO_PCI_COMMON_DF: return device_feature();
    case VIRTIO_PCI_COMMON_GFSELECT: return driver_feature_select;
    case VIRTIO_PCI_COMMON_GF: return driver_feature();
    case VIRTIO_PCI_COMMON_MSIX: return no_vector;
    case VIRTIO_PCI_COMMON_NUMQ: return queue_count();
    case VIRTIO_PCI_COMMON_STATUS: return status();
    case VIRTIO_PCI_COMMON_CFGGENERATION: return 0;
    case VIRTIO_PCI_COMMON_Q_SELECT: return queue_select;
    default: break;
  }
  const Queue* queue = selected_queue();
  if (!queue) return 0;
  switch (offset) {
    case VIRTIO_PCI_COMMON_Q_SIZE: return queue->layout.size ? queue->layout.size : selected_queue_limit();
    case VIRTIO_PCI_COMMON_Q_MSIX: return no_vector;
    case VIRTIO_PCI_COMMON_Q_ENABLE: return queue->ready ? 1 : 0;
    case VIRTIO_PCI_COMMON_Q_NOFF: return queue_select;
    case VIRTIO_PCI_COMMON_Q_DESCLO: return queue->layout.descriptors;
    case VIRTIO_PCI_COMMON_Q_DESCHI: return queue->layout.descriptors >> 32;
    case VIRTIO_PCI_COMMON_Q_AVAILLO: return queue->layout.available;
    case VIRTIO_PCI_COMMON_Q_AVAILHI: return queue->layout.available >> 32;
    case VIRTIO_PCI_COMMON_Q_USEDLO: return queue->layout.used;
    case VIRTIO_PCI_COMMON_Q_USEDHI: return queue->layout.used >> 32;
    default: return 0;
  }
}

void VirtioPci::write_common(u64 offset, u64 value, size_t bytes) {
  const auto held = lock();
  switch (offset) {
    case VIRTIO_PCI_COMMON_DFSELECT: device_feature_select = u32(value); return;
    case VIRTIO_PCI_COMMON_GFSELECT: driver_feature_select = u32(value); return;
    case VIRTIO_PCI_COMMON_GF: write_driver_feature(u32(value)); return;
    case VIRTIO_PCI_COMMON_STATUS: write_status(u32(value & 0xff)); return;
    case VIRTIO_PCI_COMMON_Q_SELECT: queue_select = u32(value & 0xffff); return;
    default: break;
  }
  Queue* const queue = selected_queue();
  if (!queue || queue->ready) return;  // a queue in use stays where it is, until the reset
  QueueLayout& layout = queue->layout;
  const auto set_address = [&](u64& address, u32 half) {
    if (bytes == sizeof(u64) && half == 0)
      address = value;
    else
      set_half(address, half, u32(value));
  };
  switch (offset) {
    case VIRTIO_PCI_COMMON_Q_SIZE: layout.size = u32(value & 0xffff); break;
    case VIRTIO_PCI_COMMON_Q_ENABLE:
      if (value != 1) break;
      if (layout.size == 0) layout.size = selected_queue_limit();
      enable_queue(*queue);
      break;
    case VIRTIO_PCI_COMMON_Q_DESCLO: set_address(layout.descriptors, 0); break;
    case VIRTIO_PCI_COMMON_Q_DESCHI: set_address(layout.descriptors, 1); break;
    case VIRTIO_PCI_COMMON_Q_AVAILLO: set_address(layout.available, 0); break;
    case VIRTIO_PCI_COMMON_Q_AVAILHI: set_address(layout.available, 1); break;
    case VIRTIO_PCI_COMMON_Q_USEDLO: set_address(layout.used, 0); break;
    case VIRTIO_PCI_COMMON_Q_USEDHI: set_address(layout.used, 1); break;
    default: break;
  }
}

}  // namespace anykvm::vmm
