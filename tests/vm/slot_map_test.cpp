// The map of slots against a std::map, through sizes at which its chunks are split, and its copies.
#include "vm/slot_map.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace anykvm::vm {
namespace {

MemorySlot slot(Gfn base, u64 pages) { return {.base_gfn = base, .pages = pages, .id = static_cast<u32>(base)}; }

TEST(SlotMap, IsAMap) {
  std::mt19937 random(1);
  SlotMap map;
  std::map<Gfn, u64> model;  // base -> pages
  const auto model_overlaps = [&](Gfn begin, Gfn end) {
    auto next = model.lower_bound(end);
    return next != model.begin() && (--next)->first + next->second > begin;
  };
  u32 hint = 0;
  for (int round = 0; round < 20000; ++round) {
    const Gfn base = random() % 4096;
    const u64 pages = 1 + random() % 3;
    const bool shrinks = round / 4000 % 2;  // grows to some thousand slots, shrinks to a few, and again
    const bool overlaps = map.overlaps(base, base + pages);
    ASSERT_EQ(overlaps, model_overlaps(base, base + pages)) << round;
    if (!overlaps && !shrinks) {
      map.insert(slot(base, pages));
      model[base] = pages;
    } else if (auto victim = model.lower_bound(base); shrinks && victim != model.end()) {
      map.erase(victim->first);
      model.erase(victim);
    }
    const Gfn gfn = random() % 4100;
    const MemorySlot* found = map.find(gfn, hint);
    ASSERT_EQ(found != nullptr, model_overlaps(gfn, gfn + 1)) << round;
    if (found) {
      ASSERT_TRUE(found->holds(gfn));
      ASSERT_EQ(map.find(gfn, hint), found) << "by the hint";
    }
  }
  unsigned count = 0;
  EXPECT_FALSE(map.any_of([&](const MemorySlot& each) {
    ++count;
    return model.at(each.base_gfn) != each.pages;
  }));
  EXPECT_EQ(count, model.size());
}

TEST(SlotMap, ACopyDoesNotChange) {
  SlotMap map;
  for (Gfn base = 1000; base != 0; --base) map.insert(slot(base, 1));
  const SlotMap before = map;
  for (Gfn base = 1; base <= 1000; base += 2) map.erase(base);
  map.insert(slot(5000, 10));
  u32 hint = 0;
  for (Gfn base = 1; base <= 1000; ++base) {
    EXPECT_NE(before.find(base, hint), nullptr);
    EXPECT_EQ(map.find(base, hint) != nullptr, base % 2 == 0);
  }
  EXPECT_EQ(before.find(5000, hint), nullptr);
  EXPECT_EQ(SlotMap().find(0, hint), nullptr);
}

}  // namespace
}  // namespace anykvm::vm
