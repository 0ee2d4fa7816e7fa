// The guest-physical address space: which part of the client's memory is guest RAM where, and the dirty log.
// Reference: api.rst 4.35 KVM_SET_USER_MEMORY_REGION, 4.8 KVM_GET_DIRTY_LOG, 4.117 KVM_CLEAR_DIRTY_LOG.
//
// Readers take an immutable snapshot without a lock. A change publishes a new one, then has every vCPU drop the host
// pointers it holds; only when each has done so is the old snapshot freed and the ioctl returns, so that the client may
// unmap the memory at once.
//
// The dirty log is what page(gpa, true) was asked for. A vCPU asks before its first store to a page and keeps the host
// pointer; so whoever takes bits out of the log has every vCPU forget its pointers before the client hears of it. Then
// each store is either done when the client looks at the page, or asks again and is in the next log.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "anykvm/kvm.h"
#include "vm/slot_map.h"
#include "x86/machine.h"
#include "x86/types.h"

namespace anykvm::vm {

class MemorySlots {
 public:
  static constexpr u32 max_slots = 32764;  ///< KVM_CAP_NR_MEMSLOTS
  static constexpr u64 max_pages = (1ull << 31) - 1;
  static constexpr Gfn max_gfn = (1ull << 40) - 1;  ///< 52-bit physical addresses

  /// flush: makes every vCPU forget its host pointers and waits for those that are in guest mode.
  explicit MemorySlots(std::function<void()> flush);
  ~MemorySlots();

  int set_region(const kvm_userspace_memory_region& region);
  /// Copies the slot's dirty bitmap to the client, and clears it unless that is left to clear_dirty_log().
  int get_dirty_log(const kvm_dirty_log& log);
  int clear_dirty_log(const kvm_clear_dirty_log& log);
  /// Has the host map what the guest would read. range becomes what is left; 0 as soon as a page was done.
  int pre_fault(kvm_pre_fault_memory& range);
  /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_INITIALLY_SET.
  void set_manual_dirty_log(u32 options);

  /// The page at gpa; for_write marks it in the dirty log. `hint` is the caller's last-hit cache (any value).
  /// Only while the caller is in guest mode (or otherwise waited for by `flush`).
  x86::HostPage page(Gpa gpa, bool for_write, u32& hint) const;
  /// The slots' memory, the first `most` of them, and a number that changes with them; same condition.
  unsigned ranges(x86::RamRange* out, unsigned most) const;
  u64 version() const { return version_.load(std::memory_order_acquire); }
  /// Whether gpa is RAM, now. Any thread.
  bool has_page(Gpa gpa);
  /// The guest's address of a host address (the first, where slots share memory); none: not a slot's.
  /// Async-signal-safe; same condition.
  std::optional<Gpa> gpa_of_host(const void* address) const;

 private:
  void publish(std::unique_ptr<SlotMap> next);
  /// With mutex_ held. nullptr: no such slot.
  const MemorySlot* find(u32 id) const;
  /// With mutex_ held. The slot if it is logged, in `slot`; 0 or -errno.
  int find_logged(u32 id, const MemorySlot*& slot) const;

  std::function<void()> flush_;
  std::mutex mutex_;  ///< changes
  u32 manual_dirty_log_ = 0;
  std::unordered_map<u32, Gfn> base_of_;  ///< by ID
  std::atomic<const SlotMap*> current_;
  std::atomic<u64> version_{0};  ///< of what current_ points to
};

}  // namespace anykvm::vm
