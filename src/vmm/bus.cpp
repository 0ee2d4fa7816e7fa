// Device look-up: a binary search over a handful of ranges.
#include "vmm/bus.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace anykvm::vmm {

void Bus::add(u64 base, u64 size, IoDevice& device) {
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), base,
                                      [](u64 value, const Range& range) { return value < range.base; });
  const bool hits_next = after != ranges_.end() && base + size > after->base;
  const bool hits_previous = after != ranges_.begin() && std::prev(after)->base + std::prev(after)->size > base;
  if (size == 0 || hits_next || hits_previous)
    throw std::logic_error("device range at " + std::to_string(base) + " overlaps another or is empty");
  ranges_.insert(after, {base, size, &device});
}

const Bus::Range* Bus::find(u64 addr) const {
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), addr,
                                      [](u64 value, const Range& range) { return value < range.base; });
  if (after == ranges_.begin()) return nullptr;
  const Range& range = *std::prev(after);
  return addr - range.base < range.size ? &range : nullptr;
}

bool Bus::read(u64 addr, std::span<u8> data) const {
  std::ranges::fill(data, u8{0xff});
  const Range* range = find(addr);
  if (range) range->device->read(addr - range->base, data);
  return range != nullptr;
}

bool Bus::write(u64 addr, std::span<const u8> data) const {
  const Range* range = find(addr);
  if (range) range->device->write(addr - range->base, data);
  return range != nullptr;
}

}  // namespace anykvm::vmm
