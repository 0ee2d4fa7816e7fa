#include "vm/slot_map.h"

#include <algorithm>

namespace anykvm::vm {

std::size_t SlotMap::chunk_of(Gfn gfn) const {
  const auto above = std::ranges::upper_bound(chunks_, gfn, {}, &Chunk::first);
  return above == chunks_.begin() ? chunks_.size() : static_cast<std::size_t>(above - chunks_.begin()) - 1;
}

const MemorySlot* SlotMap::find(Gfn gfn, u32& hint) const {
  if (const std::size_t chunk = hint / chunk_slots; chunk < chunks_.size()) {
    const auto& slots = *chunks_[chunk].slots;
    if (const u32 index = hint % chunk_slots; index < slots.size() && slots[index].holds(gfn)) return &slots[index];
  }
  const std::size_t chunk = chunk_of(gfn);
  if (chunk == chunks_.size()) return nullptr;
  const auto& slots = *chunks_[chunk].slots;
  const auto found = std::ranges::upper_bound(slots, gfn, {}, &MemorySlot::base_gfn) - 1;
  if (!found->holds(gfn)) return nullptr;
  hint = static_cast<u32>(chunk * chunk_slots + static_cast<std::size_t>(found - slots.begin()));
  return &*found;
}

bool SlotMap::overlaps(Gfn begin, Gfn end) const {
  // The last slot that begins below `end` ends furthest.
  const std::size_t chunk = chunk_of(end - 1);
  if (chunk == chunks_.size()) return false;
  const auto& slots = *chunks_[chunk].slots;
  return (std::ranges::upper_bound(slots, end - 1, {}, &MemorySlot::base_gfn) - 1)->end_gfn() > begin;
}

void SlotMap::replace(Chunk& chunk, std::vector<MemorySlot> slots) {
  chunk.first = slots.front().base_gfn;
  chunk.slots = std::make_shared<const std::vector<MemorySlot>>(std::move(slots));
}

void SlotMap::insert(MemorySlot slot) {
  std::size_t at = chunk_of(slot.base_gfn);
  if (at == chunks_.size()) at = 0;  // in front of all
  std::vector<MemorySlot> slots;
  if (chunks_.empty())
    chunks_.emplace_back();
  else
    slots = *chunks_[at].slots;
  const auto place = std::ranges::upper_bound(slots, slot.base_gfn, {}, &MemorySlot::base_gfn);
  slots.insert(place, std::move(slot));
  if (slots.size() > chunk_slots) {
    const auto middle = slots.begin() + chunk_slots / 2;
    Chunk upper;
    replace(upper, {std::make_move_iterator(middle), std::make_move_iterator(slots.end())});
    slots.erase(middle, slots.end());
    chunks_.insert(chunks_.begin() + static_cast<std::ptrdiff_t>(at) + 1, std::move(upper));
  }
  replace(chunks_[at], std::move(slots));
}

void SlotMap::erase(Gfn base_gfn) {
  const std::size_t at = chunk_of(base_gfn);
  std::vector<MemorySlot> slots = *chunks_[at].slots;
  slots.erase(std::ranges::lower_bound(slots, base_gfn, {}, &MemorySlot::base_gfn));
  if (slots.empty())
    chunks_.erase(chunks_.begin() + static_cast<std::ptrdiff_t>(at));
  else
    replace(chunks_[at], std::move(slots));
}

}  // namespace anykvm::vm
