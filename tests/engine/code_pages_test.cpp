#include "engine/direct/code_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "engine/native/decoded.h"
#include "engine/translate/shared_code.h"

namespace anykvm::engine::direct {
namespace {

using ::testing::ElementsAre;

constexpr u8 nop = 0x90, ret = 0xc3;

struct alignas(page_size) CodePage {
  u8 bytes[page_size];
  CodePage() { std::memset(bytes, ret, sizeof bytes); }
  void put(unsigned at, std::initializer_list<u8> code) { std::copy(code.begin(), code.end(), bytes + at); }
};

std::vector<unsigned> suspects(const CodePage& page, bool hides_xsave = false) {
  Suspect found[64];
  const unsigned count = find_suspects(page.bytes, hides_xsave, found, std::size(found));
  std::vector<unsigned> offsets;
  for (unsigned n = 0; n < count; ++n) offsets.push_back(found[n].offset);
  return offsets;
}

TEST(PageScan, FindsThemAtAnyAlignment) {
  for (unsigned at = 0; at < page_size - 1; ++at) {
    CodePage page;
    page.put(at, {0x0f, 0xa2});
    EXPECT_THAT(suspects(page), ElementsAre(at)) << "cpuid";
  }
  CodePage page;
  page.put(100, {0x0f, 0x01, 0xd0});        // xgetbv
  page.put(300, {0xf3, 0x0f, 0xc7, 0xf9});  // rdpid ecx
  page.put(500, {0x0f, 0x01, 0xf9});        // rdtscp: faults by itself
  page.put(600, {0x0f, 0xc7, 0x0f});        // cmpxchg8b
  page.put(700, {0x0f, 0xae, 0x27});        // xsave [rdi]
  EXPECT_THAT(suspects(page), ElementsAre(100u, 301u));
  EXPECT_THAT(suspects(page, true), ElementsAre(100u, 301u, 700u));
}

TEST(PageScan, SuspectsWhatMayBePartOfOneAtTheEnds) {
  CodePage begin, end;
  begin.put(0, {0xa2});
  EXPECT_THAT(suspects(begin), ElementsAre(0u));
  end.put(page_size - 2, {0x0f, 0x01});
  EXPECT_THAT(suspects(end), ElementsAre(page_size - 2));
}

/// Pages of one address space, from 0x400000 on, and what a translator would know of them.
class Pages : public ::testing::Test {
 protected:
  static constexpr Gva base = 0x400000;
  CodePage pages[3];
  std::map<const u8*, std::vector<unsigned>> known;  ///< offsets of instructions
  CodePages code;
  translate::SharedCode watcher;

  void SetUp() override { ASSERT_TRUE(code.begin()); }

  int judge(unsigned n) {
    for (const CodePage& page : pages) (void)watcher.watch(u64(page.bytes));
    const KnownCode what{[](void* self, const u8* host, u64(&begins)[64]) {
                           auto& all = static_cast<Pages*>(self)->known;
                           const auto page = all.find(host);
                           if (page == all.end()) return false;
                           for (unsigned offset : page->second) begins[offset / 64] |= 1ull << offset % 64;
                           return true;
                         },
                         this};
    return code.judge(pages[n].bytes, base + n * page_size, what, false, [this](Gva page) -> const u8* {
      const u64 number = (page - base) / page_size;
      return page >= base && number < std::size(pages) ? pages[number].bytes : nullptr;
    });
  }
};

TEST_F(Pages, WithoutSuspectsRunAsTheyAre) { EXPECT_EQ(judge(0), CodePages::as_it_is); }

TEST_F(Pages, AKnownCpuidIsReplacedInACopy) {
  pages[0].put(0x100, {nop, 0x0f, 0xa2, ret});
  known[pages[0].bytes] = {0x100};
  const int copy = judge(0);
  ASSERT_GE(copy, 0);
  u8 bytes[4];
  ASSERT_EQ(pread(code.fd(), bytes, sizeof bytes, copy * off_t(page_size) + 0x100), ssize_t(sizeof bytes));
  EXPECT_THAT(bytes, ElementsAre(nop, 0x0f, 0x0b, ret));
  EXPECT_EQ(pages[0].bytes[0x102], 0xa2) << "the guest's memory stays";
  EXPECT_TRUE(code.is_current(copy));
  EXPECT_EQ(judge(0), copy) << "there is no need for a second copy";
  pages[0].bytes[0x800] = nop;
  EXPECT_FALSE(code.is_current(copy));
  EXPECT_NE(judge(0), copy);
}

TEST_F(Pages, BytesInsideAnotherInstructionStay) {
  pages[0].put(0x100, {0xb8, 0x0f, 0xa2, 0x00, 0x00, ret});  // mov eax, 0xa20f
  known[pages[0].bytes] = {0x100};
  const int copy = judge(0);
  ASSERT_GE(copy, 0);
  CodePage runs;
  ASSERT_EQ(pread(code.fd(), runs.bytes, page_size, copy * off_t(page_size)), ssize_t(page_size));
  EXPECT_EQ(std::memcmp(runs.bytes, pages[0].bytes, page_size), 0);
}

TEST_F(Pages, WhatNobodyHasMetIsUnwantedUntilSomebodyDoes) {
  pages[0].put(0x100, {0x0f, 0xa2, ret});
  known[pages[0].bytes] = {0x200};
  EXPECT_EQ(judge(0), CodePages::unwanted);
  known[pages[0].bytes] = {0x100, 0x200};
  EXPECT_GE(judge(0), 0);
}

TEST_F(Pages, BranchesAreFollowedThroughOtherPages) {
  pages[0].put(0x100, {0x0f, 0xa2, ret});
  // In the next page: je into the page behind it, which calls the function in the first.
  pages[1].put(0x10, {0x0f, 0x84, 0xea, 0x0f, 0x00, 0x00});  // je +0xfea: 0x2000 - 0x1016
  pages[2].put(0x00, {0xe8, 0xfb, 0xe0, 0xff, 0xff});        // call 0x100
  known[pages[0].bytes] = {0x200};
  known[pages[1].bytes] = {0x10};
  EXPECT_GE(judge(0), 0);
}

TEST_F(Pages, APageThatNobodyKnowsIsUnwanted) {
  pages[0].put(0x340, {0x0f, 0xa2, ret});
  EXPECT_EQ(judge(0), CodePages::unwanted);
}

TEST_F(Pages, WhatHasBeenProvenOnceIsKnownToAll) {
  for (CodePage& page : pages) page.put(0x560, {0x0f, 0xa2, ret});
  EXPECT_EQ(judge(0), CodePages::unwanted);
  known[pages[1].bytes] = {0x560};
  EXPECT_GE(judge(1), 0);
  EXPECT_GE(judge(0), 0) << "the same bytes";
}

TEST(PageScan, AgreesWithTheDecoder) {
  // Wherever random bytes decode as one of them, they are suspect.
  std::mt19937 random(1);
  CodePage page;
  for (unsigned round = 0; round < 40; ++round) {
    for (u8& byte : page.bytes) {
      constexpr u8 likely[] = {0x0f, 0xa2, 0x01, 0xd0, 0xc7, 0xf8, 0xf3};
      byte = random() % 4 ? likely[random() % std::size(likely)] : u8(random());
    }
    Suspect found[page_size];
    const unsigned count = find_suspects(page.bytes, false, found, std::size(found));
    std::vector<bool> suspect(page_size);
    for (unsigned n = 0; n < count; ++n) suspect[found[n].offset] = true;
    for (unsigned at = 0; at + 15 <= page_size; ++at) {
      Decoded d;
      if (!ZYAN_SUCCESS(decode_instruction(page.bytes + at, 15, 64, d))) continue;
      const ZydisMnemonic name = d.mnemonic();
      if (name != ZYDIS_MNEMONIC_CPUID && name != ZYDIS_MNEMONIC_XGETBV && name != ZYDIS_MNEMONIC_RDPID) continue;
      EXPECT_TRUE(suspect[at + d.instruction.raw.prefix_count]) << "at " << at;
    }
  }
}

}  // namespace
}  // namespace anykvm::engine::direct
