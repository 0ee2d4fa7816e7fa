// Where translated code lives: blocks by the host address of their first byte and their mode, pages by host address.
// Tables in lazily mapped memory, of which CodeMemory says how much may be used: nothing here allocates while a guest
// runs.
//
// The code lies in segments. Each has a part for what runs often, so that it lies close together, and one for what does
// not: ways to the reference engine, TLB refills, tables. Where no more may be had, a new segment takes the place of
// the oldest, with all blocks of the pages that have some in it: only blocks of one page jump to each other.
#pragma once

#include <bit>
#include <vector>

#include "engine/code_memory.h"
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
  bool superseded = false;
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

/// A page of guest code that has blocks, or had some lately. `copy` is what they were made from.
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
  static constexpr std::size_t segment_bytes = 1u << 20;
  static constexpr u32 blocks_in_segment = 2560;
  /// Units of CodeMemory: for a segment with the records and index of its blocks, for some pages' copies and records.
  static constexpr u32 segment_units = 19, pages_units = 4, pages_at_once = 60;
  static_assert(segment_units + pages_units == CodeMemory::guaranteed);
  /// A page rewritten more often than this in about a third of a second is not worth it for the rest of that time, or
  /// for so many instructions: to step them takes about as long as the translations that have been thrown away did.
  static constexpr u32 most_rewrites = 64, most_steps = most_rewrites * 400;
  static constexpr u64 rewrites_window = 1ull << 30;  ///< TSC ticks

  /// memory outlives it.
  explicit CodeCache(CodeMemory& memory);
  ~CodeCache();
  CodeCache(const CodeCache&) = delete;
  CodeCache& operator=(const CodeCache&) = delete;

  Block* find(u64 address, unsigned mode);
  /// nullptr: there is no room; evict() and try again.
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
  bool is_lively(const CodePage& page) const;
  /// None is, from now on.
  void be_patient() { patient_ = true; }
  /// Makes room, by forgetting what is oldest if there is no more memory. What is forgotten may be overwritten, but
  /// nobody's memory is less.
  void evict();
  /// Whether others have too little: give_back().
  bool is_asked() const { return memory_.is_asked(units()); }
  /// Forgets what is oldest and returns its memory.
  void give_back();
  void clear();

  bool is_code(const u8* host) const { return host >= code_ && host < code_ + most_segments_ * segment_bytes; }
  /// Where the next block may be emitted, and where both parts end.
  CodeRoom room() const { return {hot_of(segment_) + hot_used_, cold_of(segment_) + cold_used_}; }
  CodeRoom room_end() const { return {cold_of(segment_), hot_of(segment_) + segment_bytes}; }
  /// Hot code up to here is never forgotten: the common stubs.
  void keep_code(const u8* end) { kept_ = hot_used_ = aligned(std::size_t(end - code_)); }

 private:
  /// Blocks begin on multiples of 16, as the end does: none can be behind it.
  static constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 15) & ~std::size_t(15); }
  /// Of the index: which block, and enough of its address and mode to tell most others without looking at them.
  struct IndexEntry {
    u32 tag, number;  ///< number 0: none
  };
  static constexpr u32 slots_for(u32 segments) { return std::bit_ceil(segments * blocks_in_segment / 2 * 3); }
  u32 block_slot(u64 address, unsigned mode) const;
  u32 units() const { return held_ * segment_units + copied_ * pages_units; }
  u32 next_slot(u32 slot) const { return slot + 1 == block_slots_ ? 0 : slot + 1; }
  u8* hot_of(u32 segment) const { return code_ + segment * segment_bytes; }
  u8* cold_of(u32 segment) const { return hot_of(segment) + segment_bytes / 16 * 11; }
  void forget(CodePage& page);
  void index(u32 number);
  void remove(u32 number);
  void begin_segment(u32 segment);
  /// Forgets what has code there.
  void empty_segment(u32 segment);
  u32 oldest(u32 first) const;
  /// Makes an index for as many segments as are held, and one more.
  void widen_index();
  void free_page(u32 number);
  void free_unused_pages();

  CodeMemory& memory_;
  const u32 most_segments_, max_blocks_, most_copies_, max_pages_;
  u8* code_;
  Block* blocks_;            ///< [max_blocks_], those of a segment together; number 0 is none
  IndexEntry* block_index_;  ///< open addressing
  u32 block_slots_ = 0;      ///< how many of them are in use
  CodePage* pages_;          ///< [max_pages_]; number 0 is none
  u8* copies_;               ///< [max_pages_] pages
  u32* page_index_;          ///< [page_slots_]
  const u32 page_slots_;
  u32 segment_ = 0;               ///< the current one
  u32 held_ = 1, copied_ = 0;     ///< segments; how often memory was taken for pages
  u64 age_ = 1;                   ///< of the current one
  std::vector<u64> ages_;         ///< of each segment; 0: it is not held
  std::vector<u32> blocks_used_;  ///< of each segment's numbers
  std::size_t hot_used_ = 0, cold_used_ = 0, kept_ = 0;
  u32 page_count_ = 1;
  u32 free_pages_ = 0;  ///< the first of a list by CodePage::first_block
  bool patient_ = false;
};

}  // namespace anykvm::engine::translate
