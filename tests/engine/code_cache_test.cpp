// The translator's code cache where it is full.
#include "engine/translate/code_cache.h"

#include <gtest/gtest.h>

namespace anykvm::engine::translate {
namespace {

TEST(CodeCache, FreeCodeNeverBeginsBehindTheEnd) {
  CodeCache cache;
  cache.keep_code(cache.free_code() + 8);  // stubs of any length
  CodePage* page = cache.page_for(0x1000);
  ASSERT_NE(page, nullptr);
  const std::size_t left = std::size_t(cache.code_end() - cache.free_code());
  ASSERT_NE(cache.add(*page, 0x1000, 0, left - 1, 1, 1, 1), nullptr);
  EXPECT_LE(cache.free_code(), cache.code_end());
}

}  // namespace
}  // namespace anykvm::engine::translate
