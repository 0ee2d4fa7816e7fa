// What a rehearsal stored, to be taken back, and what the same instructions are to store again.
#pragma once

#include <span>

#include "x86/types.h"

namespace anykvm::engine::lockstep {

/// Fixed tables in lazily mapped memory.
class StoreLog {
 public:
  struct Store {
    u8* host;
    Gva gva;
    u32 size;
    u32 at;  ///< of its bytes
  };
  /// For so many instructions a rehearsal, each of which stores at most 4 KiB in at most 80 pieces.
  explicit StoreLog(u32 instructions);
  ~StoreLog();
  StoreLog(const StoreLog&) = delete;
  StoreLog& operator=(const StoreLog&) = delete;

  void clear() { count_ = bytes_ = 0; }
  /// Before the store is made.
  void note(u8* host, u32 size, Gva gva);
  /// Keeps what the stores have left in memory, then puts back what was there. Only bytes of stores are touched: a
  /// device may be writing beside them.
  void take_back();
  /// The same once more, without keeping.
  void put_back() const;
  /// Makes the stores that were taken back.
  void store_again() const;

  std::span<const Store> stores() const { return {stores_, count_}; }
  const u8* left(const Store& store) const { return after_ + store.at; }  ///< what the store's bytes were in the end

 private:
  u32 most_stores_, most_bytes_;
  Store* stores_;
  u8 *before_, *after_;
  u32 count_ = 0, bytes_ = 0;
};

/// The pages that translated code may have stored to, as they were before its first store.
class PageCopies {
 public:
  static constexpr u32 most_pages = 4096;
  PageCopies();
  ~PageCopies();
  PageCopies(const PageCopies&) = delete;
  PageCopies& operator=(const PageCopies&) = delete;

  void clear();
  void take(u8* page);
  /// The copy of the page with this byte, or nullptr.
  u8* find(const u8* host);
  u32 count() const { return count_; }
  u8* page(u32 n) const { return pages_[n]; }
  u8* copy(u32 n) const { return copies_ + std::size_t(n) * page_size; }

 private:
  static constexpr u32 slots = most_pages * 2;
  static u32 slot(const u8* page) { return u32(u64(page) >> 12 ^ u64(page) >> 25) % slots; }

  u8* copies_;
  u8* pages_[most_pages];
  u16 index_[slots] = {};  ///< number + 1
  u32 count_ = 0;
};

}  // namespace anykvm::engine::lockstep
