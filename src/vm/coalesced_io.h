// Guest writes that the client wants collected rather than told one by one: zones, and the ring behind kvm_run that the
// client empties whenever it looks.
// Reference: api.rst 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; virt/kvm/coalesced_mmio.c for the ring's protocol.
//
// In the kernel one ring is mapped behind every vCPU. A vCPU's pages are a file of their own here, so that the ring is
// the one behind the vCPU that was made first, which is where clients look; only that vCPU's writes are collected, and
// the others' exit as without a zone.
#pragma once

#include <vector>

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::vm {

/// Immutable; a change makes a new one.
class CoalescedZones {
 public:
  bool covers(bool pio, u64 address, unsigned length) const;
  void add(const kvm_coalesced_mmio_zone& zone) { zones_.push_back(zone); }
  /// Every zone that contains this one.
  void remove(const kvm_coalesced_mmio_zone& zone);
  bool empty() const { return zones_.empty(); }
  std::size_t size() const { return zones_.size(); }

 private:
  std::vector<kvm_coalesced_mmio_zone> zones_;
};

/// false: the ring is full, or the client has broken it; the write exits.
bool put_into_ring(kvm_coalesced_mmio_ring& ring, bool pio, u64 address, const void* data, unsigned length);

}  // namespace anykvm::vm
