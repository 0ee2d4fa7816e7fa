// One block: guest instructions up to a branch, emitted again for the host.
#pragma once

#include "engine/translate/code_cache.h"
#include "engine/translate/decoder.h"
#include "engine/translate/stubs.h"

namespace anykvm::engine::translate {

inline constexpr unsigned most_instructions = 48;

struct BlockRequest {
  const u8* page;   ///< the bytes of the page of guest code, which nobody else writes
  u64 address;      ///< host address that the guest knows it by
  unsigned offset;  ///< of the first instruction
  Mode mode;
  const Stubs* stubs;
  Decoder* decoder;
  CodeCache* cache;  ///< where direct jumps in the page may find their target
  unsigned limit = most_instructions;
  /// The block is one instruction that continues on the next page. `rest` has that page's bytes as its blocks know
  /// them; the block at `behind`, of the same mode, is the one behind the instruction. See crossing.cpp.
  const u8* rest = nullptr;
  const u8* behind = nullptr;
  bool single_checks = false;  ///< no two accesses are checked together
  bool exact_flags = false;    ///< flags are kept even where nothing reads them
  bool supervised = false;     ///< only what may be repeated (is_repeatable) is emitted, the rest are steps
};

/// A block as it lies in memory: its code, what it seldom runs, and one PlaceInBlock for each instruction.
struct BlockCode {
  CodeRoom end{};  ///< behind all of it; hot is nullptr: there was no room
  u32 code_bytes = 0;
  const u8* places = nullptr;
  u32 instructions = 0;
  u64 lines = 0;  ///< of 64 bytes of the page that it depends on: bit 0 the first
};

/// Emits the block at [at, end).
BlockCode translate_block(const BlockRequest& request, CodeRoom at, CodeRoom end);

}  // namespace anykvm::engine::translate
