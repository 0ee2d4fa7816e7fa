// The slots of one machine by guest-physical address: a sorted map whose copies share all but what differs, so that one
// change to a table of thousands of slots costs a copy of some hundreds.
//
// A copy that is not changed any more may be read by any thread.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "x86/types.h"

namespace anykvm::vm {

struct MemorySlot {
  Gfn base_gfn = 0;
  u64 pages = 0;
  u8* host = nullptr;
  u32 id = 0;
  u32 flags = 0;  ///< KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES
  /// One bit per page while dirty pages are logged; shared by the snapshots that contain the slot.
  std::shared_ptr<std::atomic<u64>[]> dirty;

  Gfn end_gfn() const { return base_gfn + pages; }
  bool holds(Gfn gfn) const { return gfn - base_gfn < pages; }
};

class SlotMap {
 public:
  /// The slot that holds gfn; nullptr: none. `hint` is the caller's last-hit cache (any value).
  const MemorySlot* find(Gfn gfn, u32& hint) const;
  bool overlaps(Gfn begin, Gfn end) const;
  /// The slot must not overlap one that is there.
  void insert(MemorySlot slot);
  /// The slot that begins there must be in the map.
  void erase(Gfn base_gfn);

  template <class F>
  bool any_of(F f) const {
    for (const Chunk& chunk : chunks_)
      for (const MemorySlot& slot : *chunk.slots)
        if (f(slot)) return true;
    return false;
  }

 private:
  static constexpr u32 chunk_slots = 256;
  struct Chunk {
    Gfn first;                                             ///< base_gfn of its first slot
    std::shared_ptr<const std::vector<MemorySlot>> slots;  ///< sorted, 1 to chunk_slots
  };
  static void replace(Chunk& chunk, std::vector<MemorySlot> slots);
  /// The last chunk that begins at or below gfn, chunks_.size() if there is none.
  std::size_t chunk_of(Gfn gfn) const;

  std::vector<Chunk> chunks_;  ///< sorted
};

}  // namespace anykvm::vm
