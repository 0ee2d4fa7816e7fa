// Code that one vCPU has translated and another may write: what the vCPUs of this process tell each other of it.
//
// A page of guest memory is *code* (some vCPU has translations of it, and nobody's TLB lets stores to it through) or
// *writable* (TLBs may, and what was translated before is stale). The first store to a page of code makes it writable
// and tells the others, who compare their copies before they go on. Whoever translates from it again makes it code, and
// the others drop what their TLBs have of it. As on hardware, a store takes effect on other processors a little later,
// or at once where they execute a serializing instruction.
//
// Everything is lock-free and allocates nothing. The state of a page is kept by the low bits of its host address: pages
// that share one only make each other slower.
#pragma once

#include <atomic>

#include "x86/types.h"

namespace anykvm::engine::translate {

/// One vCPU's part. All but the destructor is called on its thread.
class SharedCode {
 public:
  SharedCode() = default;
  ~SharedCode();
  SharedCode(const SharedCode&) = delete;
  SharedCode& operator=(const SharedCode&) = delete;

  /// Guest code is going to run; attention is what makes it stop, the same in every call.
  void enter(std::atomic<u32>& attention);
  void leave();

  /// The low bits of a page's address: pages in which they agree are one here. So a TLB must not let stores through to
  /// any of them once one is watched.
  static constexpr u64 address_bits = (1ull << 32) - 1;

  /// The TLB is going to let stores to this page through.
  void written(u64 page);
  /// From now on stores to the page will be told. Comes before its bytes are read, or compared. true: this vCPU's own
  /// TLB may let some through, which it must not any more.
  [[nodiscard]] bool watch(u64 page);
  /// Whether watch() would find nothing to do.
  [[nodiscard]] static bool is_watched(u64 page);
  /// How many pages others have begun to watch that the TLB may let stores through to, which it must not any more:
  /// those in `pages`, or when there are more than fit, any. Those who wait for that are told.
  static constexpr unsigned few = 4;
  [[nodiscard]] unsigned newly_watched(u64 (&pages)[few]);
  /// Whether code may have been written that was not told of before. serialized: the guest has executed an instruction
  /// behind which it must see all that was written before.
  [[nodiscard]] bool is_stale(bool serialized);
  /// Whether newly_watched() and is_stale() have nothing to say.
  [[nodiscard]] bool is_quiet() const;

 private:
  struct Member;
  /// Make every other vCPU, or every one that waits for its requests to be served, leave guest code for a moment.
  void tell_others() const;
  void tell_waiting() const;
  template <class Wanted>
  void tell(Wanted wanted) const;
  static constexpr unsigned own_bits = 1u << 16;
  static constexpr unsigned own_bit(u64 page) { return unsigned(page >> 12) % own_bits; }
  bool settled() const;
  void stop_waiting();

  Member* member_ = nullptr;
  u64 writes_seen_ = 0;
  u64 last_watch_ = 0;           ///< the newest of its own requests that the others may not have served; 0: none
  u64 own_[own_bits / 64] = {};  ///< pages that the TLB may let stores through to, since it was last flushed for others
};

}  // namespace anykvm::engine::translate
