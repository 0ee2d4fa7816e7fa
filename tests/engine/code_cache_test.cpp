// The translator's code cache where it is full.
#include "engine/translate/code_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "engine/translate/block.h"

namespace anykvm::engine::translate {
namespace {

class CodeCacheTest : public testing::Test {
 protected:
  /// A block that takes so much of both parts of its segment; nullptr: there is no room.
  Block* add(u64 address, std::size_t hot, std::size_t cold) {
    CodePage* page = cache.page_for(address & page_mask);
    const CodeRoom at = cache.room(), end = cache.room_end();
    if (!page || hot > std::size_t(end.hot - at.hot) || cold > std::size_t(end.cold - at.cold)) return nullptr;
    return cache.add(*page, address, 0, {at.hot + hot, at.cold + cold}, u32(hot), at.cold, 0, 1);
  }

  CodeMemory memory{CodeMemory::least_bytes};
  CodeCache cache{memory};
};

TEST_F(CodeCacheTest, FreeCodeNeverBeginsBehindTheEnd) {
  cache.keep_code(cache.room().hot + 8);  // stubs of any length
  const std::size_t left = std::size_t(cache.room_end().hot - cache.room().hot);
  const std::size_t cold_left = std::size_t(cache.room_end().cold - cache.room().cold);
  ASSERT_NE(add(0x1000, left - 1, cold_left - 1), nullptr);
  EXPECT_LE(cache.room().hot, cache.room_end().hot);
  EXPECT_LE(cache.room().cold, cache.room_end().cold);
}

TEST_F(CodeCacheTest, TheOldestMakesRoomAndTheRestIsFound) {
  constexpr u64 pages = 2000;
  const u8* const stubs_end = cache.room().hot + 100;
  cache.keep_code(stubs_end);
  unsigned evicted = 0;
  for (u64 n = 0; n < 20 * pages; ++n) {
    // Two blocks for each page, pages far apart in time.
    const u64 address = 0x10000 + n % pages * page_size + n / pages % 2 * 64;
    if (cache.find(address, 0)) continue;
    Block* block = add(address, 900 + n % 7 * 16, 500);
    if (!block) {
      cache.evict();
      ++evicted;
      block = add(address, 900, 500);
    }
    ASSERT_NE(block, nullptr) << n;
    ASSERT_GE(block->code, stubs_end);
    ASSERT_EQ(cache.find(address, 0), block);
    EXPECT_EQ(cache.block_with(block->code + 899), block);
    EXPECT_NE(cache.block_with(block->code - 1), block);
  }
  EXPECT_GT(evicted, 20u);
  EXPECT_LE(memory.taken(), memory.units());
  // What is found lies where it says, and its page has it.
  u64 found = 0;
  for (u64 n = 0; n < 2 * pages; ++n) {
    const u64 address = 0x10000 + n % pages * page_size + n / pages * 64;
    const Block* block = cache.find(address, 0);
    if (!block) continue;
    ++found;
    EXPECT_EQ(block->address, address);
    EXPECT_EQ(cache.block_with(block->code), block);
    EXPECT_NE(cache.find_page(address & page_mask)->first_block, 0u);
  }
  EXPECT_GT(found, 100u);  // a page goes with its first block
}

/// Vm's vCPUs, each with code of its own.
struct Sharing {
  explicit Sharing(CodeMemory& memory) : cache(memory) {}
  /// Translates pages from here on; forgets what is oldest as it has to.
  void fill(u64 from, u64 pages) {
    for (u64 n = 0; n < pages; ++n) {
      const u64 address = from + n * page_size;
      if (cache.is_asked()) cache.give_back();
      for (unsigned attempt = 0; !add(address); ++attempt) {
        ASSERT_LT(attempt, 2u) << n;
        cache.evict();
      }
      ASSERT_NE(cache.find(address, 0), nullptr);
    }
  }
  bool add(u64 address) {
    CodePage* page = cache.page_for(address);
    const CodeRoom at = cache.room(), end = cache.room_end();
    constexpr std::size_t bytes = 8000;
    if (!page || std::size_t(end.hot - at.hot) < bytes) return false;
    std::memset(at.hot, 0xcc, bytes);
    return cache.add(*page, address, 0, {at.hot + bytes, at.cold + 16}, bytes, at.cold, 0, 1);
  }
  /// How many of these pages it still has.
  u64 count(u64 from, u64 pages) {
    u64 found = 0;
    for (u64 n = 0; n < pages; ++n) found += cache.find(from + n * page_size, 0) != nullptr;
    return found;
  }
  CodeCache cache;
};

TEST(CodeMemory, IsSharedByNeed) {
  CodeMemory memory(32u << 20);
  constexpr u64 many = 20'000, from = 1u << 30;
  Sharing busy(memory);
  busy.fill(from, many);
  const auto is_all_taken = [&memory] { return memory.taken() > memory.units() - CodeCache::segment_units; };
  EXPECT_TRUE(is_all_taken()) << "what nobody else needs is there to be used";
  const u64 alone = busy.count(from, many);
  {
    Sharing late(memory);
    for (u64 n = 0; n < 200; ++n) {
      late.fill(from + n * 100 * page_size, 100);
      busy.fill(from + n * 100 * page_size, 100);
      EXPECT_LE(memory.taken(), memory.units() + CodeMemory::guaranteed);
    }
    const u64 first = busy.count(from, many), second = late.count(from, many);
    EXPECT_GT(first, alone / 3);
    EXPECT_GT(second, alone / 3);
    EXPECT_LE(memory.taken(), memory.units());
  }
  // And one has all again.
  busy.fill(from, many);
  EXPECT_TRUE(is_all_taken());
}

TEST(CodeMemory, ManyVcpusHaveALittleEach) {
  CodeMemory memory(CodeMemory::least_bytes);
  std::vector<std::unique_ptr<Sharing>> vcpus;
  for (unsigned n = 0; n < 16; ++n) vcpus.push_back(std::make_unique<Sharing>(memory));
  for (const auto& vcpu : vcpus) vcpu->fill(1u << 30, 2000);
  for (const auto& vcpu : vcpus) EXPECT_GT(vcpu->count(1u << 30, 2000), 0u);
  EXPECT_LE(memory.taken(), memory.units() + 16 * CodeMemory::guaranteed);
  vcpus.clear();
  EXPECT_EQ(memory.taken(), 0u);
}

TEST_F(CodeCacheTest, ARewrittenPagesBlocksAreForgotten) {
  for (u64 n = 0; n < 1000; ++n) ASSERT_NE(add(0x10000 + n * 64, 16, 16), nullptr);
  cache.drop(*cache.find_page(0x13000));
  for (u64 n = 0; n < 1000; ++n) {
    const u64 address = 0x10000 + n * 64;
    EXPECT_EQ(cache.find(address, 0) == nullptr, (address & page_mask) == 0x13000) << address;
  }
}

TEST_F(CodeCacheTest, ALivelyPageIsSteppedForAWhile) {
  const auto rewrite = [&](unsigned times) {
    for (unsigned n = 0; n < times; ++n) {
      ASSERT_NE(add(0x10000, 16, 16), nullptr);
      cache.drop(*cache.find_page(0x10000));
    }
  };
  rewrite(CodeCache::most_rewrites);
  CodePage& page = *cache.find_page(0x10000);
  EXPECT_FALSE(cache.is_too_lively(page));
  for (unsigned round = 0; round < 3; ++round) {
    rewrite(round ? CodeCache::most_rewrites + 1 : 1);
    unsigned stepped = 0;
    while (stepped < 2 * CodeCache::most_steps && cache.is_too_lively(page)) ++stepped;
    EXPECT_GT(stepped, CodeCache::most_steps / 2) << round;
    EXPECT_LE(stepped, CodeCache::most_steps) << round;
    EXPECT_FALSE(cache.is_too_lively(page)) << round;
  }
}

TEST_F(CodeCacheTest, ABlockThatDoesNotFitWritesNowhereElse) {
  u8 page[page_size];
  for (unsigned n = 0; n < page_size; ++n) page[n] = n % 2 ? 0x10 : 0x74;  // jz +16
  u8 code[8192];
  u8 *const hot = code, *const cold = code + 4096;
  Assembler a(cache.room().hot, cache.room_end().hot);
  const Stubs stubs = emit_stubs(a, false);
  Decoder decoder;
  const BlockRequest request{.page = page,
                             .address = 0x10000,
                             .offset = 0,
                             .mode = {},
                             .stubs = &stubs,
                             .decoder = &decoder,
                             .cache = &cache,
                             .limit = 8};
  bool fits = false;
  for (unsigned room = 0; !fits && room < 4096; ++room) {
    std::memset(code, 0xcc, sizeof code);
    fits = translate_block(request, {hot, cold}, {hot + room, cold + 4096}).end.hot;
    for (unsigned n = room; n < 4096; ++n) ASSERT_EQ(code[n], 0xcc) << n << " with room for " << room;
  }
  EXPECT_TRUE(fits);
}

TEST(PlaceInBlock, IsReadAsItWasWritten) {
  static constexpr PlaceInBlock places[] = {{0, 0},      {0, 4095},  {254, 4095}, {509, 4095},      {509, 0},
                                            {510, 255},  {600, 511}, {855, 512},  {855, 513},       {0xffff, 4000},
                                            {0xffff, 1}, {3, 2},     {257, 257},  {257 + 254, 512}, {766, 512}};
  u8 bytes[256];
  Assembler a(bytes, bytes + sizeof bytes);
  PlaceWriter writer(a);
  for (const PlaceInBlock place : places) writer.put(place);
  ASSERT_FALSE(a.overflowed());
  PlaceReader reader(bytes);
  for (const PlaceInBlock place : places) {
    const PlaceInBlock found = reader.next();
    EXPECT_EQ(found.code, place.code);
    EXPECT_EQ(found.offset, place.offset);
  }
}

}  // namespace
}  // namespace anykvm::engine::translate
