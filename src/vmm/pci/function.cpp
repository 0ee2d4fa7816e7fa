// The header of type 0. A BAR's size shows in which of its bits can be written.
#include "vmm/pci/function.h"

#include <linux/pci_regs.h>

#include <algorithm>

namespace anykvm::vmm {

PciFunction::PciFunction(const PciIdentity& identity) {
  set_config(PCI_VENDOR_ID, identity.vendor, 2);
  set_config(PCI_DEVICE_ID, identity.device, 2);
  set_config(PCI_CLASS_REVISION, u64{identity.class_code} << 8 | identity.revision, 4);
  set_config(PCI_SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor, 2);
  set_config(PCI_SUBSYSTEM_ID, identity.subsystem, 2);
  allow_writes(PCI_COMMAND,
               PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY | PCI_COMMAND_SERR, 2);
  allow_writes(PCI_CACHE_LINE_SIZE, 0xff, 1);
  allow_writes(PCI_LATENCY_TIMER, 0xff, 1);
  allow_writes(PCI_INTERRUPT_LINE, 0xff, 1);
}

u32 PciFunction::config32(unsigned offset) const {
  u32 value = 0;
  for (unsigned i = 0; i < 4; ++i) value |= u32(config_[offset + i]) << (8 * i);
  return value;
}

void PciFunction::set_config(unsigned offset, u64 value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) config_[offset + i] = u8(value >> (8 * i));
}

void PciFunction::allow_writes(unsigned offset, u32 mask, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) writable_[offset + i] = u8(mask >> (8 * i));
}

void PciFunction::add_memory_bar(unsigned bar, u32 size) {
  bar_size_[bar] = size;
  allow_writes(PCI_BASE_ADDRESS_0 + 4 * bar, ~(size - 1), 4);
}

void PciFunction::use_interrupt_pin() { set_config(PCI_INTERRUPT_PIN, 1, 1); }

unsigned PciFunction::add_capability(u8 id, std::span<const u8> body) {
  const unsigned at = next_capability_;
  set_config(at, id, 1);
  std::ranges::copy(body, config_.begin() + at + 2);
  set_config(last_capability_ ? last_capability_ + 1 : unsigned{PCI_CAPABILITY_LIST}, at, 1);
  set_config(PCI_STATUS, PCI_STATUS_CAP_LIST, 2);
  last_capability_ = at;
  next_capability_ = unsigned(at + 2 + body.size() + 3) & ~3u;
  return at;
}

void PciFunction::read_config(unsigned offset, std::span<u8> data) {
  std::copy_n(config_.begin() + offset, data.size(), data.begin());
}

void PciFunction::write_config(unsigned offset, std::span<const u8> data) {
  for (size_t i = 0; i < data.size(); ++i) {
    u8& byte = config_[offset + i];
    const u8 mask = writable_[offset + i];
    byte = u8((byte & ~mask) | (data[i] & mask));
  }
}

int PciFunction::find_bar(Gpa gpa, u64& offset) const {
  if (!(config_[PCI_COMMAND] & PCI_COMMAND_MEMORY)) return -1;
  for (unsigned bar = 0; bar < bar_count; ++bar) {
    if (bar_size_[bar] == 0) continue;
    const Gpa base = config32(PCI_BASE_ADDRESS_0 + 4 * bar) & PCI_BASE_ADDRESS_MEM_MASK;
    if (gpa - base >= bar_size_[bar]) continue;
    offset = gpa - base;
    return int(bar);
  }
  return -1;
}

}  // namespace anykvm::vmm
