// No event ever happens here (there are no buttons), so PM1 status reads zero and the SCI stays low.
#include "vmm/power_management.h"

#include <time.h>

namespace anykvm::vmm {

namespace {

constexpr u16 sci_enable = 1;
constexpr u16 sleep_enable = 1 << 13;
constexpr unsigned sleep_type_shift = 10;

u32 timer_ticks() {
  constexpr u64 hz = 3'579'545;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return u32(u64(now.tv_sec) * hz + u64(now.tv_nsec) * hz / 1'000'000'000);
}

}  // namespace

u8 PowerManagement::read_byte(u64 offset, u32 timer) const {
  switch (offset) {
    case event_block + 2:
    case event_block + 3: return u8(enable_ >> (8 * (offset - event_block - 2)));
    case control_block:
    case control_block + 1:
      // There is no SMI to switch to ACPI mode: it is always on.
      return u8((control_ | sci_enable) >> (8 * (offset - control_block)));
    case timer_block:
    case timer_block + 1:
    case timer_block + 2:
    case timer_block + 3: return u8(timer >> (8 * (offset - timer_block)));
    default: return 0;
  }
}

void PowerManagement::read(u64 offset, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  const u32 timer = timer_ticks();
  for (size_t i = 0; i < data.size(); ++i) data[i] = read_byte(offset + i, timer);
}

void PowerManagement::write(u64 offset, std::span<const u8> data) {
  bool off = false;
  {
    const std::scoped_lock lock(mutex_);
    const auto store = [](u16& word, u64 byte, u8 value) {
      word = u16((word & ~(0xff << (8 * byte))) | (value << (8 * byte)));
    };
    for (size_t i = 0; i < data.size(); ++i) {
      const u64 at = offset + i;
      if (at == event_block + 2 || at == event_block + 3) store(enable_, at - event_block - 2, data[i]);
      if (at == control_block || at == control_block + 1) store(control_, at - control_block, data[i]);
    }
    off = (control_ & sleep_enable) && ((control_ >> sleep_type_shift) & 7) == sleep_type_off;
    control_ &= u16(~sleep_enable);  // write only
  }
  if (off) power_off_();
}

}  // namespace anykvm::vmm
