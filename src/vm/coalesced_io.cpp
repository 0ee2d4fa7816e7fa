#include "vm/coalesced_io.h"

#include <algorithm>
#include <cstring>

namespace anykvm::vm {
namespace {

constexpr u32 ring_entries = (page_size - sizeof(kvm_coalesced_mmio_ring)) / sizeof(kvm_coalesced_mmio);

bool contains(const kvm_coalesced_mmio_zone& zone, bool pio, u64 address, u64 length) {
  if ((zone.pio != 0) != pio || address + length < address) return false;
  return address >= zone.addr && address + length <= zone.addr + zone.size;
}

}  // namespace

bool CoalescedZones::covers(bool pio, u64 address, unsigned length) const {
  return std::ranges::any_of(zones_, [&](const auto& zone) { return contains(zone, pio, address, length); });
}

void CoalescedZones::remove(const kvm_coalesced_mmio_zone& removed) {
  std::erase_if(zones_, [&](const auto& zone) { return contains(zone, removed.pio != 0, removed.addr, removed.size); });
}

bool put_into_ring(kvm_coalesced_mmio_ring& ring, bool pio, u64 address, const void* data, unsigned length) {
  const u32 first = __atomic_load_n(&ring.first, __ATOMIC_ACQUIRE),
            last = __atomic_load_n(&ring.last, __ATOMIC_RELAXED);
  // One entry stays free, so that a full ring is not an empty one. The client may have written anything here.
  if (last >= ring_entries || (last + 1) % ring_entries == first) return false;
  kvm_coalesced_mmio& entry = ring.coalesced_mmio[last];
  entry.phys_addr = address;
  entry.len = length;
  std::memcpy(entry.data, data, length);
  entry.pio = pio;
  __atomic_store_n(&ring.last, (last + 1) % ring_entries, __ATOMIC_RELEASE);
  return true;
}

}  // namespace anykvm::vm
