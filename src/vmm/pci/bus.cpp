// CONFIG_ADDRESS at offset 0, CONFIG_DATA at 4. Port 0xcf9 in between is the south bridge's reset control.
#include "vmm/pci/bus.h"

namespace anykvm::vmm {

namespace {

constexpr u32 enable = 0x8000'0000;
constexpr u32 address_bits = 0x80ff'fffc;
constexpr u64 data_offset = 4, reset_control_offset = 1;
constexpr u8 reset_cpu = 4;  ///< the rising edge of this bit resets

}  // namespace

void PciBus::add(unsigned slot, PciFunction& function, PciInterrupts& interrupts) {
  functions_[slot] = &function;
  function.connect(interrupts, slot);
}

/// Bus 0, function 0 of a slot; everything else is empty.
PciFunction* PciBus::selected() const {
  if (!(address_ & enable) || (address_ & 0x00ff'0700)) return nullptr;
  return functions_[address_ >> 11 & 31];
}

void PciBus::read(u64 offset, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  if (offset == reset_control_offset && data.size() == 1) {
    data[0] = reset_control_;
    return;
  }
  if (offset < data_offset) {
    // Only a whole access reaches CONFIG_ADDRESS.
    for (size_t i = 0; offset == 0 && data.size() == 4 && i < 4; ++i) data[i] = u8(address_ >> (8 * i));
    return;
  }
  const u64 byte = offset - data_offset;
  if (PciFunction* function = selected(); function && byte + data.size() <= 4)
    function->read_config(unsigned((address_ & 0xfc) + byte), data);
}

void PciBus::write(u64 offset, std::span<const u8> data) {
  if (offset == reset_control_offset && data.size() == 1) return write_reset_control(data[0]);
  const std::scoped_lock lock(mutex_);
  if (offset == 0 && data.size() == 4) {
    address_ = 0;
    for (size_t i = 0; i < 4; ++i) address_ |= u32(data[i]) << (8 * i);
    address_ &= address_bits;
    return;
  }
  if (offset < data_offset) return;
  const u64 byte = offset - data_offset;
  if (PciFunction* function = selected(); function && byte + data.size() <= 4)
    function->write_config(unsigned((address_ & 0xfc) + byte), data);
}

void PciBus::write_reset_control(u8 value) {
  bool resets;
  {
    const std::scoped_lock lock(mutex_);
    resets = (value & reset_cpu) && !(reset_control_ & reset_cpu);
    reset_control_ = value & 0x06;
  }
  if (resets) reset_();
}

PciBus::Target PciBus::find(Gpa gpa) {
  const std::scoped_lock lock(mutex_);
  for (PciFunction* function : functions_) {
    u64 offset;
    if (const int bar = function ? function->find_bar(gpa, offset) : -1; bar >= 0)
      return {function, unsigned(bar), offset};
  }
  return {};
}

// Outside the lock: a BAR's registers may take their time.
void PciBus::Memory::read(u64 offset, std::span<u8> data) {
  const Target target = owner.find(window_begin + offset);
  if (target.function) target.function->read_bar(target.bar, target.offset, data);
}

void PciBus::Memory::write(u64 offset, std::span<const u8> data) {
  const Target target = owner.find(window_begin + offset);
  if (target.function) target.function->write_bar(target.bar, target.offset, data);
}

}  // namespace anykvm::vmm
