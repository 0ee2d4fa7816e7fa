// One block: guest instructions up to a branch, emitted again for the host.
#pragma once

#include "engine/translate/code_cache.h"
#include "engine/translate/stubs.h"

namespace anykvm::engine::translate {

struct BlockRequest {
  const u8* page;   ///< host address of the page of guest code
  unsigned offset;  ///< of the first instruction
  Mode mode;
  bool vectors_allowed;  ///< CR0, CR4, XCR0 and MXCSR let vector instructions run; else the reference engine decides
  const Stubs* stubs;
  CodeCache* cache;  ///< where direct jumps in the page may find their target
};

/// Emits the block at [at, end). Returns the end of the code, or nullptr when there was no room.
u8* translate_block(const BlockRequest& request, u8* at, u8* end);

}  // namespace anykvm::engine::translate
