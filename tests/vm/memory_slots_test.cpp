// KVM_SET_USER_MEMORY_REGION and KVM_GET_DIRTY_LOG: what is accepted, and every refusal.
#include "vm/memory_slots.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cerrno>

namespace anykvm::vm {
namespace {

class MemorySlotsTest : public testing::Test {
 protected:
  static constexpr u64 size = 64 * page_size;

  MemorySlotsTest()
      : slots([this] { ++flushes; }),
        memory(static_cast<u8*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}
  ~MemorySlotsTest() override { munmap(memory, size); }

  kvm_userspace_memory_region region(u32 slot, Gpa gpa, u64 bytes, u64 offset = 0, u32 flags = 0) const {
    return {.slot = slot,
            .flags = flags,
            .guest_phys_addr = gpa,
            .memory_size = bytes,
            .userspace_addr = reinterpret_cast<u64>(memory) + offset};
  }
  u8* host(Gpa gpa, bool for_write = false) { return slots.page(gpa, for_write, hint).host; }
  int dirty_log(u32 slot, u64* bitmap) {
    kvm_dirty_log log{};
    log.slot = slot;
    log.dirty_bitmap = bitmap;
    return slots.get_dirty_log(log);
  }

  unsigned flushes = 0;
  MemorySlots slots;
  u8* memory;
  u32 hint = 0;
};

TEST_F(MemorySlotsTest, CreatesFindsAndDeletes) {
  EXPECT_EQ(host(0x1000), nullptr);
  ASSERT_EQ(slots.set_region(region(3, 0x1000, 4 * page_size)), 0);
  ASSERT_EQ(slots.set_region(region(1, 0x100000, page_size, 4 * page_size)), 0);
  EXPECT_EQ(host(0x0fff), nullptr);
  EXPECT_EQ(host(0x1000), memory);
  EXPECT_EQ(host(0x4fff), memory + 3 * page_size);
  EXPECT_EQ(host(0x5000), nullptr);
  EXPECT_EQ(host(0x100123), memory + 4 * page_size);
  EXPECT_TRUE(slots.page(0x1000, true, hint).writable);
  EXPECT_EQ(slots.gpa_of_host(memory + 5 * page_size - 1), 0x100fff);
  EXPECT_EQ(slots.gpa_of_host(memory + 5 * page_size), std::nullopt);

  const unsigned before = flushes;
  ASSERT_EQ(slots.set_region(region(3, 0, 0)), 0);
  EXPECT_GT(flushes, before);
  EXPECT_EQ(host(0x1000), nullptr);
  EXPECT_EQ(host(0x100000), memory + 4 * page_size);
  EXPECT_EQ(slots.set_region(region(3, 0, 0)), -EINVAL) << "there is nothing to delete";
}

TEST_F(MemorySlotsTest, Moves) {
  ASSERT_EQ(slots.set_region(region(0, 0x1000, 2 * page_size)), 0);
  ASSERT_EQ(slots.set_region(region(0, 0x2000, 2 * page_size)), 0) << "a slot does not overlap with itself";
  EXPECT_EQ(host(0x1000), nullptr);
  EXPECT_EQ(host(0x2000), memory);
  const unsigned before = flushes;
  EXPECT_EQ(slots.set_region(region(0, 0x2000, 2 * page_size)), 0);
  EXPECT_EQ(flushes, before) << "nothing changed";
}

TEST_F(MemorySlotsTest, RefusesWhatTheKernelRefuses) {
  ASSERT_EQ(slots.set_region(region(0, 0x10000, 4 * page_size)), 0);
  const auto expect = [&](kvm_userspace_memory_region bad, int error, const char* why) {
    EXPECT_EQ(slots.set_region(bad), error) << why;
    EXPECT_EQ(host(0x10000), memory) << why;
    EXPECT_EQ(host(0x14000), nullptr) << why;
  };
  expect(region(1, 0x20000, page_size, 0, 4), -EINVAL, "unknown flag");
  expect(region(1, 0x20800, page_size), -EINVAL, "guest address");
  expect(region(1, 0x20000, page_size + 1), -EINVAL, "size");
  expect(region(1, 0x20000, page_size, 16), -EINVAL, "host address");
  expect(region(MemorySlots::max_slots, 0x20000, page_size), -EINVAL, "slot ID");
  expect(region(1 << 16, 0x20000, page_size), -EINVAL, "address space");
  expect(region(1, 0xfffffffffffff000, 2 * page_size), -EINVAL, "wraps");
  expect(region(1, 1ull << 52, page_size), -EINVAL, "beyond physical addresses");
  auto far = region(1, 0x20000, page_size);
  far.userspace_addr = 0x7ffffffff000;
  expect(far, -EINVAL, "not a user address");
  far.userspace_addr = 0xffff800000000000;
  expect(far, -EINVAL, "not a user address");
  auto huge = region(1, 0x100000000, (MemorySlots::max_pages + 1) * page_size);
  huge.userspace_addr = page_size;
  expect(huge, -EINVAL, "too many pages");
  expect(region(1, 0x13000, page_size), -EEXIST, "overlap at the end");
  expect(region(1, 0xf000, 2 * page_size), -EEXIST, "overlap at the start");
  expect(region(1, 0x0, 64 * page_size), -EEXIST, "around");
  expect(region(0, 0x10000, 5 * page_size), -EINVAL, "size of an existing slot");
  expect(region(0, 0x10000, 4 * page_size, page_size), -EINVAL, "host address of an existing slot");
  expect(region(0, 0x10000, 4 * page_size, 0, KVM_MEM_READONLY), -EINVAL, "READONLY of an existing slot");
}

TEST_F(MemorySlotsTest, ReadOnlyIsNotWritable) {
  ASSERT_EQ(slots.set_region(region(0, 0, page_size, 0, KVM_MEM_READONLY)), 0);
  EXPECT_FALSE(slots.page(0, true, hint).writable);
  EXPECT_EQ(host(0), memory);
}

TEST_F(MemorySlotsTest, KeepsTheDirtyLog) {
  u64 bitmap[2];
  ASSERT_EQ(slots.set_region(region(0, 0, 64 * page_size)), 0);
  EXPECT_EQ(dirty_log(0, bitmap), -ENOENT);
  EXPECT_EQ(dirty_log(7, bitmap), -ENOENT);
  EXPECT_EQ(dirty_log(MemorySlots::max_slots, bitmap), -EINVAL);
  EXPECT_EQ(dirty_log(1 << 16, bitmap), -EINVAL);

  ASSERT_EQ(slots.set_region(region(0, 0, 64 * page_size, 0, KVM_MEM_LOG_DIRTY_PAGES)), 0);
  EXPECT_FALSE(slots.page(5 * page_size, false, hint).writable) << "stores have to be announced";
  EXPECT_TRUE(slots.page(5 * page_size, true, hint).writable);
  EXPECT_TRUE(slots.page(63 * page_size, true, hint).writable);
  bitmap[1] = 0x1234;
  ASSERT_EQ(dirty_log(0, bitmap), 0);
  EXPECT_EQ(bitmap[0], 1ull << 5 | 1ull << 63);
  EXPECT_EQ(bitmap[1], 0x1234u) << "one word is 64 pages";
  ASSERT_EQ(dirty_log(0, bitmap), 0);
  EXPECT_EQ(bitmap[0], 0u) << "reading clears";
  EXPECT_EQ(dirty_log(0, nullptr), -EFAULT);

  ASSERT_EQ(slots.set_region(region(0, 0, 64 * page_size)), 0);
  EXPECT_EQ(dirty_log(0, bitmap), -ENOENT);
  EXPECT_TRUE(slots.page(0, false, hint).writable);
}

TEST_F(MemorySlotsTest, PreFaultsUpToTheEndOfMemory) {
  ASSERT_EQ(slots.set_region(region(0, 0x10000, 4 * page_size)), 0);
  kvm_pre_fault_memory range{.gpa = 0x11000, .size = 8 * page_size};
  EXPECT_EQ(slots.pre_fault(range), 0);
  EXPECT_EQ(range.gpa, 0x14000u);
  EXPECT_EQ(range.size, 5 * page_size);
  EXPECT_EQ(slots.pre_fault(range), -ENOENT);
  EXPECT_EQ(range.size, 5 * page_size);
  unsigned char present[4];
  ASSERT_EQ(mincore(memory, sizeof present * page_size, present), 0);
  EXPECT_TRUE(present[1] & 1 && present[2] & 1 && present[3] & 1);

  ASSERT_EQ(mprotect(memory, page_size, PROT_NONE), 0);
  range = {.gpa = 0x10000, .size = page_size};
  EXPECT_EQ(slots.pre_fault(range), -EFAULT);
  for (const kvm_pre_fault_memory& bad : {kvm_pre_fault_memory{.gpa = 0x10001, .size = page_size},
                                          {.gpa = 0x10000, .size = 1},
                                          {.gpa = 0x10000, .size = 0},
                                          {.gpa = 0x10000, .size = page_size, .flags = 1},
                                          {.gpa = ~0xfffull, .size = page_size}}) {
    range = bad;
    EXPECT_EQ(slots.pre_fault(range), -EINVAL);
  }
}

}  // namespace
}  // namespace anykvm::vm
