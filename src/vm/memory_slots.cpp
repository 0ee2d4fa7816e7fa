#include "vm/memory_slots.h"

#include <cerrno>
#include <vector>

#include "os/user_memory.h"

namespace anykvm::vm {
namespace {

constexpr u64 user_address_end = 0x7ffffffff000;  ///< Linux' TASK_SIZE_MAX with 4-level tables

u64 bitmap_words(u64 pages) { return (pages + 63) / 64; }

/// The bits of a bitmap's last word that stand for pages.
u64 last_word_mask(u64 pages) { return ~0ull >> (-pages & 63); }

std::shared_ptr<std::atomic<u64>[]> new_bitmap(u64 pages, bool all_dirty) {
  const u64 words = bitmap_words(pages);
  std::shared_ptr<std::atomic<u64>[]> bitmap(new std::atomic<u64>[words]());
  if (all_dirty) {
    for (u64 i = 0; i < words; ++i) bitmap[i].store(~0ull, std::memory_order_relaxed);
    bitmap[words - 1].store(last_word_mask(pages), std::memory_order_relaxed);
  }
  return bitmap;
}

}  // namespace

MemorySlots::MemorySlots(std::function<void()> flush) : flush_(std::move(flush)), current_(new SlotMap) {}

MemorySlots::~MemorySlots() { delete current_.load(); }

int MemorySlots::set_region(const kvm_userspace_memory_region& region) {
  const u32 id = region.slot & 0xffff, address_space = region.slot >> 16;
  if (id >= max_slots) return -EINVAL;
  if (region.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)) return -EINVAL;
  if ((region.memory_size | region.guest_phys_addr | region.userspace_addr) & ~page_mask) return -EINVAL;
  if (region.memory_size > user_address_end || region.userspace_addr > user_address_end - region.memory_size)
    return -EINVAL;
  if (address_space != 0) return -EINVAL;
  if (region.guest_phys_addr + region.memory_size < region.guest_phys_addr) return -EINVAL;
  if (region.memory_size / page_size > max_pages) return -EINVAL;

  std::lock_guard lock(mutex_);
  const MemorySlot* old = find(id);
  auto next = std::make_unique<SlotMap>(*current_.load(std::memory_order_relaxed));

  if (region.memory_size == 0) {
    if (!old) return -EINVAL;
    next->erase(old->base_gfn);
    base_of_.erase(id);
    publish(std::move(next));
    return 0;
  }

  MemorySlot slot{.base_gfn = region.guest_phys_addr / page_size,
                  .pages = region.memory_size / page_size,
                  .host = reinterpret_cast<u8*>(region.userspace_addr),
                  .id = id,
                  .flags = region.flags};
  bool moves = true;
  if (old) {
    if (old->host != slot.host || old->pages != slot.pages || ((old->flags ^ slot.flags) & KVM_MEM_READONLY))
      return -EINVAL;
    moves = old->base_gfn != slot.base_gfn;
    if (!moves && old->flags == slot.flags) return 0;
    slot.dirty = old->dirty;
    next->erase(old->base_gfn);
  }
  if (moves) {
    if (next->overlaps(slot.base_gfn, slot.end_gfn())) return -EEXIST;
    if (slot.end_gfn() - 1 > max_gfn) return -EINVAL;
  }
  if (!(slot.flags & KVM_MEM_LOG_DIRTY_PAGES))
    slot.dirty.reset();
  else if (!slot.dirty)
    slot.dirty = new_bitmap(slot.pages, manual_dirty_log_ & KVM_DIRTY_LOG_INITIALLY_SET);
  base_of_[id] = slot.base_gfn;
  next->insert(std::move(slot));
  publish(std::move(next));
  return 0;
}

void MemorySlots::publish(std::unique_ptr<SlotMap> next) {
  std::unique_ptr<const SlotMap> old(current_.exchange(next.release(), std::memory_order_seq_cst));
  version_.fetch_add(1, std::memory_order_release);
  flush_();
}

const MemorySlot* MemorySlots::find(u32 id) const {
  const auto base = base_of_.find(id);
  if (base == base_of_.end()) return nullptr;
  u32 hint = 0;
  return current_.load(std::memory_order_relaxed)->find(base->second, hint);
}

int MemorySlots::find_logged(u32 id, const MemorySlot*& slot) const {
  if ((id & 0xffff) >= max_slots || id >> 16 != 0) return -EINVAL;
  slot = find(id);
  return slot && slot->dirty ? 0 : -ENOENT;
}

void MemorySlots::set_manual_dirty_log(u32 options) {
  std::lock_guard lock(mutex_);
  manual_dirty_log_ = options;
}

int MemorySlots::get_dirty_log(const kvm_dirty_log& log) {
  std::lock_guard lock(mutex_);
  const MemorySlot* slot = nullptr;
  if (const int error = find_logged(log.slot, slot)) return error;

  std::vector<u64> bitmap(bitmap_words(slot->pages));
  bool taken = false;
  for (u64 i = 0; i < bitmap.size(); ++i) {
    bitmap[i] = slot->dirty[i].load(std::memory_order_relaxed);
    if (bitmap[i] == 0 || manual_dirty_log_) continue;
    bitmap[i] = slot->dirty[i].exchange(0, std::memory_order_acq_rel);
    taken = true;
  }
  if (taken) flush_();
  if (os::copy_to_user(log.dirty_bitmap, bitmap.data(), bitmap.size() * sizeof(u64))) return 0;
  // The client has not learnt of them.
  if (taken)
    for (u64 i = 0; i < bitmap.size(); ++i) slot->dirty[i].fetch_or(bitmap[i], std::memory_order_acq_rel);
  return -EFAULT;
}

int MemorySlots::clear_dirty_log(const kvm_clear_dirty_log& log) {
  std::lock_guard lock(mutex_);
  const MemorySlot* slot = nullptr;
  if (log.first_page % 64 != 0) return -EINVAL;
  if (const int error = find_logged(log.slot, slot)) return error;
  if (log.first_page > slot->pages) return -EINVAL;
  // All but the range at the slot's end is whole words.
  const u64 left = slot->pages - log.first_page;
  if (log.num_pages > left || (log.num_pages < left && log.num_pages % 64 != 0)) return -EINVAL;

  std::vector<u64> bitmap(bitmap_words(log.num_pages));
  if (!os::copy_from_user(bitmap.data(), log.dirty_bitmap, bitmap.size() * sizeof(u64))) return -EFAULT;
  bool taken = false;
  for (u64 i = 0; i < bitmap.size(); ++i)
    if (bitmap[i] != 0)
      taken |= slot->dirty[log.first_page / 64 + i].fetch_and(~bitmap[i], std::memory_order_acq_rel) & bitmap[i];
  if (taken) flush_();
  return 0;
}

x86::HostPage MemorySlots::page(Gpa gpa, bool for_write, u32& hint) const {
  const Gfn gfn = gpa / page_size;
  const MemorySlot* found = current_.load(std::memory_order_acquire)->find(gfn, hint);
  if (!found) return {};
  const MemorySlot& slot = *found;
  const u64 index = gfn - slot.base_gfn;
  x86::HostPage page{slot.host + index * page_size, !(slot.flags & KVM_MEM_READONLY)};
  if (slot.dirty && page.writable) {
    // Stores are announced while they are logged, so that a page is only writable to who announced one.
    if (for_write)
      slot.dirty[index / 64].fetch_or(1ull << index % 64, std::memory_order_acq_rel);
    else
      page.writable = false;
  }
  return page;
}

bool MemorySlots::has_page(Gpa gpa) {
  std::lock_guard lock(mutex_);
  u32 hint = 0;
  return page(gpa, false, hint).host != nullptr;
}

std::optional<Gpa> MemorySlots::gpa_of_host(const void* address) const {
  std::optional<Gpa> gpa;
  current_.load(std::memory_order_acquire)->any_of([&](const MemorySlot& slot) {
    const u64 offset = static_cast<u64>(static_cast<const u8*>(address) - slot.host);
    if (offset < slot.pages * page_size) gpa = slot.base_gfn * page_size + offset;
    return gpa.has_value();
  });
  return gpa;
}

unsigned MemorySlots::ranges(x86::RamRange* out, unsigned most) const {
  unsigned count = 0;
  current_.load(std::memory_order_acquire)->any_of([&](const MemorySlot& slot) {
    if (count < most) out[count++] = {slot.host, slot.pages * page_size};
    return count == most;
  });
  return count;
}

int MemorySlots::pre_fault(kvm_pre_fault_memory& range) {
  if (range.flags || (range.gpa | range.size) & ~page_mask || range.gpa + range.size <= range.gpa) return -EINVAL;
  const u64 size = range.size;
  int error = 0;
  u32 hint = 0;
  for (; range.size != 0; range.gpa += page_size, range.size -= page_size) {
    const u8* host = nullptr;
    {
      // Not while the page comes: that may need another thread of the client's.
      std::lock_guard lock(mutex_);
      if (const MemorySlot* slot = current_.load(std::memory_order_relaxed)->find(range.gpa / page_size, hint))
        host = slot->host + (range.gpa - slot->base_gfn * page_size);
    }
    u8 byte;
    error = !host ? -ENOENT : !os::copy_from_user(&byte, host, 1) ? -EFAULT : 0;
    if (error) break;
  }
  return range.size != size ? 0 : error;
}

}  // namespace anykvm::vm
