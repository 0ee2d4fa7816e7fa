// Device look-up and guest memory: who gets an access, and what is beyond the end.
#include "vmm/bus.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <system_error>

#include "vmm/guest_memory.h"

namespace anykvm::vmm {
namespace {

using ::testing::Each;

struct Probe final : IoDevice {
  void read(u64 offset, std::span<u8> data) override { data[0] = u8(offset); }
  void write(u64 offset, std::span<const u8> data) override { last_offset = offset, last = data[0]; }
  u64 last_offset = ~u64{0};
  u8 last = 0;
};

TEST(Bus, DispatchesByRange) {
  Bus bus;
  Probe low, high;
  bus.add(0x3f8, 8, high);
  bus.add(0x60, 1, low);
  u8 data[1];
  EXPECT_TRUE(bus.read(0x3fd, data));
  EXPECT_EQ(data[0], 5);
  EXPECT_TRUE(bus.write(0x60, data));
  EXPECT_EQ(low.last_offset, 0u);
}

TEST(Bus, EmptySpaceReadsOnes) {
  Bus bus;
  Probe device;
  bus.add(0x60, 1, device);
  u8 data[4] = {};
  for (const u64 address : {0x5full, 0x61ull, 0ull, ~0ull}) {
    EXPECT_FALSE(bus.read(address, data));
    EXPECT_THAT(data, Each(0xff));
    EXPECT_FALSE(bus.write(address, data));
  }
}

TEST(Bus, OverlapIsRefused) {
  Bus bus;
  Probe device;
  bus.add(0x10, 0x10, device);
  EXPECT_THROW(bus.add(0x1f, 1, device), std::logic_error);
  EXPECT_THROW(bus.add(0x8, 9, device), std::logic_error);
  EXPECT_THROW(bus.add(0x12, 2, device), std::logic_error);
  EXPECT_THROW(bus.add(0x40, 0, device), std::logic_error);
  bus.add(0x20, 1, device);
  bus.add(0xf, 1, device);
}

TEST(GuestMemory, ChecksEveryRange) {
  const GuestMemory memory(0x10001);
  EXPECT_EQ(memory.size(), 0x11000u);
  EXPECT_EQ(memory.at(0x10fff, 1).size(), 1u);
  EXPECT_TRUE(memory.at(0x10fff, 2).empty());
  EXPECT_TRUE(memory.at(0x11000, 1).empty());
  EXPECT_TRUE(memory.at(~0ull, 2).empty());
  EXPECT_TRUE(memory.at(1, ~0ull).empty());
  const u8 bytes[2] = {1, 2};
  EXPECT_FALSE(memory.write(0x10fff, bytes));
  EXPECT_EQ(memory.at(0x10fff, 1)[0], 0) << "nothing is copied";
  EXPECT_THROW(GuestMemory(0), std::system_error);
}

TEST(GuestMemory, GoesOnAboveTheHole) {
  const GuestMemory memory(GuestMemory::hole_begin + (2 << 20));
  ASSERT_EQ(memory.regions().size(), 2u);
  EXPECT_EQ(memory.regions()[1].base, GuestMemory::hole_end);
  EXPECT_TRUE(memory.at(GuestMemory::hole_begin - 1, 2).empty()) << "no range spans the hole";
  EXPECT_FALSE(memory.at(GuestMemory::hole_end, 2 << 20).empty());
  EXPECT_EQ(memory.at(GuestMemory::hole_end, 1).data(), memory.at(GuestMemory::hole_begin - 1, 1).data() + 1);
}

}  // namespace
}  // namespace anykvm::vmm
