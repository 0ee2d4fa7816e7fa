// Where translated code lives: blocks by the host address of their first byte and their mode, pages by host address.
// Fixed tables in lazily mapped memory: nothing here allocates while a guest runs.
#pragma once

#include "engine/translate/context.h"

namespace anykvm::engine::translate {

struct Block {
  u64 address = 0;  ///< host address of the guest's code
  u8* code = nullptr;
  u32 next_in_page = 0;
  u32 code_bytes = 0;    ///< behind them lie its PlaceInBlocks
  u16 instructions = 0;  ///< as many PlaceInBlocks
  u8 mode = 0;
  u8 generation = 0;  ///< how many blocks have been made for the place before it, and superseded
};

/// Where the code of one guest instruction begins, and the instruction.
struct PlaceInBlock {
  u16 code;    ///< from the block's first byte
  u16 offset;  ///< in the guest's page
};

inline constexpr unsigned line_bytes = 64;

/// A page of guest code that has blocks. `copy` is what they were made from.
struct CodePage {
  u64 address = 0;
  u32 first_block = 0;  ///< 0: none
  u32 rewritten = 0;    ///< how often its blocks had to be dropped since then:
  u64 since = 0;        ///< TSC
  u64 lines = 0;        ///< which of its 64-byte lines the blocks were made from
  u64 verified = 0;     ///< the epoch in which the copy was last compared with memory
};

class CodeCache {
 public:
  static constexpr std::size_t code_bytes = 32u << 20;
  static constexpr u32 max_blocks = 1u << 18, max_pages = 1u << 12;
  /// A page rewritten more often than this in about a third of a second is not worth it for the rest of that time.
  static constexpr u32 most_rewrites = 64;
  static constexpr u64 rewrites_window = 1ull << 30;  ///< TSC ticks

  CodeCache();
  ~CodeCache();
  CodeCache(const CodeCache&) = delete;
  CodeCache& operator=(const CodeCache&) = delete;

  Block* find(u64 address, unsigned mode);
  /// nullptr: the tables are full; clear() and try again.
  CodePage* page_for(u64 address);
  CodePage* find_page(u64 address);
  const u8* copy_of(const CodePage& page) const { return copies_ + (&page - pages_) * page_size; }
  /// Copies the page but for the lines that have become blocks.
  void take_copy(CodePage& page);
  /// Whether what the blocks were made from is still there.
  bool is_unchanged(const CodePage& page) const;
  /// Registers code emitted at free_code(); `used` bytes of it are taken, of which `code_bytes` are code.
  /// `lines` of the page went into it.
  Block* add(CodePage& page, u64 address, unsigned mode, std::size_t used, u32 code_bytes, u32 instructions, u64 lines);
  /// The block, dropped or not, that has its code at `host`; nullptr: none. Async-signal-safe.
  const Block* block_with(const u8* host) const;
  /// The offset in its page of the guest instruction whose hot code is at `host`; -1: none. Async-signal-safe.
  static int instruction_at(const Block& block, const u8* host);
  /// Forgets the block, which another is made for.
  void supersede(const Block& block);
  /// Forgets the blocks of a page.
  void drop(CodePage& page);
  /// It is rewritten too often to be translated now.
  bool is_too_lively(const CodePage& page) const;
  /// None is, from now on.
  void be_patient() { patient_ = true; }
  void clear();

  bool is_code(const u8* host) const { return host >= code_ && host < code_ + code_bytes; }
  u8* free_code() { return code_ + code_used_; }
  u8* code_end() { return code_ + code_bytes; }
  /// Code up to here survives clear(): the common stubs.
  void keep_code(const u8* end) { code_kept_ = code_used_ = aligned(std::size_t(end - code_)); }

 private:
  /// Blocks begin on multiples of 16, as the end does: none can be behind it.
  static constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 15) & ~std::size_t(15); }
  static constexpr u32 block_slots = max_blocks * 2, page_slots = max_pages * 2, removed = ~0u;
  static u32 block_slot(u64 address, unsigned mode);

  u8* code_;
  Block* blocks_;     ///< [max_blocks]; number 0 is none
  u32* block_index_;  ///< [block_slots], open addressing
  CodePage* pages_;   ///< [max_pages]; number 0 is none
  u8* copies_;        ///< [max_pages] pages
  u32* page_index_;   ///< [page_slots]
  std::size_t code_used_ = 0, code_kept_ = 0;
  u32 block_count_ = 1, page_count_ = 1;
  bool patient_ = false;
};

}  // namespace anykvm::engine::translate
