// CONFIG_ADDRESS at offset 0, CONFIG_DATA at 4. The bridge's registers are read only.
#include "vmm/pci_host.h"

namespace anykvm::vmm {

namespace {

constexpr u32 enable = 0x8000'0000;
constexpr u32 address_bits = 0x80ff'fffc;
constexpr u64 data_offset = 4;

/// Device 0 of bus 0: Red Hat's generic host bridge, as QEMU has it.
u32 bridge_register(u32 index) {
  switch (index) {
    case 0x00: return 0x0008'1b36;  // device, vendor
    case 0x08: return 0x0600'0000;  // class: host bridge
    default: return 0;
  }
}

}  // namespace

void PciHost::read(u64 offset, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset < data_offset) {
    // Only a whole access reaches CONFIG_ADDRESS.
    for (size_t i = 0; offset == 0 && data.size() == 4 && i < 4; ++i) data[i] = u8(address_ >> (8 * i));
    return;
  }
  const bool is_bridge = (address_ & enable) && (address_ & 0x00ff'ff00) == 0;
  if (!is_bridge) return;
  const u32 value = bridge_register(address_ & 0xfc);
  for (size_t i = 0; i < data.size() && offset - data_offset + i < 4; ++i)
    data[i] = u8(value >> (8 * (offset - data_offset + i)));
}

void PciHost::write(u64 offset, std::span<const u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset != 0 || data.size() != 4) return;
  address_ = 0;
  for (size_t i = 0; i < 4; ++i) address_ |= u32(data[i]) << (8 * i);
  address_ &= address_bits;
}

}  // namespace anykvm::vmm
