// Where translated code lives: blocks by the host address of their first byte and their mode, pages by host address.
// Fixed tables in lazily mapped memory: nothing here allocates while a guest runs.
//
// The memory is a ring of segments. Each has a part for what runs often, so that it lies close together, and one for
// what does not: ways to the reference engine, TLB refills, tables. A new segment takes the place of the oldest, with
// all blocks of the pages that have some in it: only blocks of one page jump to each other.
#pragma once

#include "engine/translate/context.h"

namespace anykvm::engine::translate {

struct Block {
  u64 address = 0;  ///< host address of the guest's code; 0: it has been forgotten
  u8* code = nullptr;
  u32 next_in_page = 0;
  u32 code_bytes = 0;
  const u8* places = nullptr;  ///< for a PlaceReader
  u16 instructions = 0;        ///< as many PlaceInBlocks
  u8 mode = 0;
  u8 generation = 0;  ///< how many blocks were made for the place before it, which supersedes them; 0 for those
};

/// Where the code of one guest instruction begins, and the instruction.
struct PlaceInBlock {
  u16 code = 0;    ///< from the block's first byte
  u16 offset = 0;  ///< in the guest's page
};

/// A block's, one behind the other in memory: two bytes say how far each is from the one before, or, where that is too
/// far, an escape and all of it.
class PlaceReader {
 public:
  explicit PlaceReader(const u8* at) : at_(at) {}
  PlaceInBlock next();

 private:
  const u8* at_;
  PlaceInBlock last_;
};
class PlaceWriter {
 public:
  explicit PlaceWriter(Assembler& to) : to_(to) {}
  void put(PlaceInBlock place);

 private:
  Assembler& to_;
  PlaceInBlock last_;
};

/// A superseding block (crossing.cpp) that runs only if another has its code at the place that it knows has minus that
/// place here in its own code.
inline constexpr unsigned behind_in_guard = 2;

inline constexpr unsigned line_bytes = 64;

/// A page of guest code that has blocks. `copy` is what they were made from.
struct CodePage {
  u64 address = 0;
  u32 first_block = 0;  ///< 0: none
  u32 rewritten = 0;    ///< how often its blocks had to be dropped since then:
  u32 stepped = 0;      ///< instructions left to the reference engine, since it was rewritten too often
  u64 since = 0;        ///< TSC
  u64 lines = 0;        ///< which of its 64-byte lines the blocks were made from
  u64 verified = 0;     ///< the epoch in which the copy was last compared with memory
  u64 copied = 0;       ///< and in which its other lines were taken last
  Gva seen_at = 0;      ///< the guest address that it ran at last
  u64 seen_in = 0;      ///< and the Translator::era() then
  u32 moves = 0;        ///< how often it has run at two addresses in one era
};

/// Free memory of the code cache, or how far it has been used.
struct CodeRoom {
  u8* hot;
  u8* cold;
};

class CodeCache {
 public:
  static constexpr std::size_t default_bytes = 64u << 20, least_bytes = 4u << 20, most_bytes = 1u << 30;
  static constexpr u32 segments = 8;
  static constexpr u32 max_blocks = 1u << 18, max_pages = 1u << 14;
  /// A page rewritten more often than this in about a third of a second is not worth it for the rest of that time, or
  /// for so many instructions: to step them takes about as long as the translations that have been thrown away did.
  static constexpr u32 most_rewrites = 64, most_steps = most_rewrites * 400;
  static constexpr u64 rewrites_window = 1ull << 30;  ///< TSC ticks

  /// bytes: of code; brought to what is possible.
  explicit CodeCache(std::size_t bytes = default_bytes);
  ~CodeCache();
  CodeCache(const CodeCache&) = delete;
  CodeCache& operator=(const CodeCache&) = delete;

  Block* find(u64 address, unsigned mode);
  /// nullptr: the tables are full; clear() and try again.
  CodePage* page_for(u64 address);
  CodePage* find_page(u64 address);
  const u8* copy_of(const CodePage& page) const { return copies_ + (&page - pages_) * page_size; }
  /// Copies the page but for the lines that have become blocks, once in an epoch.
  void take_copy(CodePage& page, u64 epoch);
  /// Sets the bits of the offsets at which the instructions of its blocks of 64-bit code begin.
  void mark_instructions(const CodePage& page, u64 (&begins)[page_size / 64]) const;
  /// Whether what the blocks were made from is still there.
  bool is_unchanged(const CodePage& page) const;
  /// Registers a block that has been emitted at room(), up to `used`. `places` and what follows: as in Block and
  /// CodePage.
  Block* add(CodePage& page, u64 address, unsigned mode, CodeRoom used, u32 code_bytes, const u8* places,
             u32 instructions, u64 lines);
  /// Calls f for each block of the page, superseded ones too.
  template <class F>
  void for_each_block(const CodePage& page, F f) const {
    for (u32 number = page.first_block; number; number = blocks_[number].next_in_page) f(blocks_[number]);
  }
  /// The block, dropped or not, that has its code at `host`; nullptr: none. Async-signal-safe.
  const Block* block_with(const u8* host) const;
  /// The offset in its page of the guest instruction whose hot code is at `host`; -1: none. Async-signal-safe.
  static int instruction_at(const Block& block, const u8* host);
  /// Forgets the block, which another is made for.
  void supersede(Block& block);
  /// Forgets the blocks of a page, which has been rewritten.
  void drop(CodePage& page);
  /// It is rewritten too often to be translated now: the reference engine executes one of its instructions.
  bool is_too_lively(CodePage& page) const;
  /// None is, from now on.
  void be_patient() { patient_ = true; }
  /// Makes room by forgetting what is oldest.
  void evict();
  void clear();

  bool is_code(const u8* host) const { return host >= code_ && host < code_ + segments * segment_bytes_; }
  /// Where the next block may be emitted, and where both parts end.
  CodeRoom room() const { return {hot_of(segment_) + hot_used_, cold_of(segment_) + cold_used_}; }
  CodeRoom room_end() const { return {cold_of(segment_), hot_of(segment_) + segment_bytes_}; }
  /// Hot code up to here is never forgotten: the common stubs.
  void keep_code(const u8* end) { kept_ = hot_used_ = aligned(std::size_t(end - code_)); }

 private:
  /// Blocks begin on multiples of 16, as the end does: none can be behind it.
  static constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 15) & ~std::size_t(15); }
  static constexpr u32 block_slots = max_blocks * 2, page_slots = max_pages * 2;
  static constexpr u32 blocks_in_segment = max_blocks / segments;
  /// Of the index: which block, and enough of its address and mode to tell most others without looking at them.
  struct IndexEntry {
    u32 tag, number;  ///< number 0: none
  };
  static u32 block_slot(u64 address, unsigned mode);
  u8* hot_of(u32 segment) const { return code_ + segment * segment_bytes_; }
  u8* cold_of(u32 segment) const { return hot_of(segment) + segment_bytes_ / 16 * 11; }
  void forget(CodePage& page);
  void remove(u32 number);

  const std::size_t segment_bytes_;
  u8* code_;
  Block* blocks_;            ///< [max_blocks], those of a segment together; number 0 is none
  IndexEntry* block_index_;  ///< [block_slots], open addressing
  CodePage* pages_;          ///< [max_pages]; number 0 is none
  u8* copies_;               ///< [max_pages] pages
  u32* page_index_;          ///< [page_slots]
  u32 segment_ = 0;          ///< the current one
  std::size_t hot_used_ = 0, cold_used_ = 0, kept_ = 0;
  u32 blocks_used_[segments] = {1};  ///< of each segment's numbers
  u32 page_count_ = 1;
  bool patient_ = false;
};

}  // namespace anykvm::engine::translate
