// Split virtqueues: the rules of the ring, and what a driver that breaks them gets.
#include "vmm/virtio/queue.h"

#include <random>

#include "virtio_driver.h"

namespace anykvm::vmm {
namespace {

constexpr u64 event_index = u64{1} << VIRTIO_RING_F_EVENT_IDX;
constexpr u64 indirect = u64{1} << VIRTIO_RING_F_INDIRECT_DESC;
constexpr Gpa buffers = 0x100000;
constexpr u64 memory_size = 4 << 20;

class VirtQueueTest : public testing::Test {
 protected:
  VirtQueue make(u64 features = indirect) {
    auto made = VirtQueue::make(memory_, driver_.layout(), features);
    EXPECT_TRUE(made) << made.error();
    return *made;
  }
  void expect_broken(const char* why, u64 features = indirect) {
    VirtQueue queue = make(features);
    EXPECT_EQ(queue.take(chain_), VirtQueue::Take::broken);
    ASSERT_NE(queue.error(), nullptr);
    EXPECT_NE(std::string(queue.error()).find(why), std::string::npos) << queue.error();
    EXPECT_EQ(queue.take(chain_), VirtQueue::Take::broken) << "broken stays broken";
    EXPECT_FALSE(queue.ask_for_notification());
  }

  GuestMemory memory_{memory_size};
  FakeQueue driver_{memory_, 0x10000, 8};
  Chain chain_;
};

TEST_F(VirtQueueTest, TakesAChainAndGivesItBack) {
  driver_.descriptor(3, buffers, 10, VRING_DESC_F_NEXT, 5);
  driver_.descriptor(5, buffers + 100, 20, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
  driver_.descriptor(1, buffers + 200, 30, VRING_DESC_F_WRITE);
  VirtQueue queue = make();
  EXPECT_EQ(queue.take(chain_), VirtQueue::Take::empty);
  driver_.offer(3);
  ASSERT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  EXPECT_EQ(chain_.head, 3);
  EXPECT_EQ(chain_.readable.bytes(), 10u);
  EXPECT_EQ(chain_.writable.bytes(), 50u);
  EXPECT_EQ(chain_.writable.pieces().size(), 2u);
  EXPECT_EQ(driver_.used_index(), 0);
  queue.give_back(chain_, 42);
  EXPECT_EQ(driver_.used_index(), 1);
  EXPECT_EQ(driver_.used(0).id, 3u);
  EXPECT_EQ(driver_.used(0).len, 42u);
  EXPECT_EQ(queue.take(chain_), VirtQueue::Take::empty);
}

TEST_F(VirtQueueTest, IndicesWrapAround) {
  driver_.descriptor(2, buffers, 1);
  VirtQueue queue = make();
  for (unsigned round = 0; round < 70000; ++round) {
    driver_.offer(2);
    ASSERT_EQ(queue.take(chain_), VirtQueue::Take::chain) << round;
    queue.give_back(chain_, round);
    ASSERT_EQ(driver_.used_index(), static_cast<u16>(round + 1));
  }
}

TEST_F(VirtQueueTest, FollowsAnIndirectTable) {
  driver_.descriptor(0, buffers, 3 * 16, VRING_DESC_F_INDIRECT);
  driver_.put(buffers, vring_desc{buffers + 0x1000, 5, VRING_DESC_F_NEXT, 2});
  driver_.put(buffers + 32, vring_desc{buffers + 0x2000, 7, VRING_DESC_F_WRITE, 0});
  driver_.offer(0);
  VirtQueue queue = make();
  ASSERT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  EXPECT_EQ(chain_.readable.bytes(), 5u);
  EXPECT_EQ(chain_.writable.bytes(), 7u);
}

TEST_F(VirtQueueTest, AnEmptyDescriptorAddsNothing) {
  driver_.descriptor(0, ~u64{0}, 0, VRING_DESC_F_NEXT, 1);
  driver_.descriptor(1, buffers, 4);
  driver_.offer(0);
  VirtQueue queue = make();
  ASSERT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  EXPECT_EQ(chain_.readable.pieces().size(), 1u);
}

TEST_F(VirtQueueTest, PutBackIsTakenAgain) {
  driver_.descriptor(0, buffers, 4);
  driver_.offer(0);
  VirtQueue queue = make();
  ASSERT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  queue.put_back();
  EXPECT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  EXPECT_EQ(queue.take(chain_), VirtQueue::Take::empty);
}

TEST_F(VirtQueueTest, LoopIsBroken) {
  driver_.descriptor(0, buffers, 4, VRING_DESC_F_NEXT, 1);
  driver_.descriptor(1, buffers, 4, VRING_DESC_F_NEXT, 0);
  driver_.offer(0);
  expect_broken("loop");
}

TEST_F(VirtQueueTest, LoopOfEmptyDescriptorsIsBroken) {
  driver_.descriptor(0, 0, 0, VRING_DESC_F_NEXT, 0);
  driver_.offer(0);
  expect_broken("loop");
}

TEST_F(VirtQueueTest, LoopInAnIndirectTableIsBroken) {
  driver_.descriptor(0, buffers, 2 * 16, VRING_DESC_F_INDIRECT);
  driver_.put(buffers, vring_desc{buffers, 4, VRING_DESC_F_NEXT, 1});
  driver_.put(buffers + 16, vring_desc{buffers, 4, VRING_DESC_F_NEXT, 0});
  driver_.offer(0);
  expect_broken("loop");
}

TEST_F(VirtQueueTest, HeadOutsideTheTableIsBroken) {
  driver_.offer(8);
  expect_broken("outside its table");
}

TEST_F(VirtQueueTest, NextOutsideTheTableIsBroken) {
  driver_.descriptor(0, buffers, 4, VRING_DESC_F_NEXT, 0xffff);
  driver_.offer(0);
  expect_broken("outside its table");
}

TEST_F(VirtQueueTest, AddressesOutsideMemoryAreBroken) {
  const vring_desc bad[] = {
      {memory_size, 1},  {memory_size - 1, 2},       {0, 0xffffffff}, {~u64{0}, 1}, {~u64{0} - 100, 4096},
      {0xc0000000, 512}, {u64{1} << 63, 0x80000000},
  };
  for (const vring_desc& descriptor : bad) {
    for (u16 flags : {u16{0}, u16{VRING_DESC_F_WRITE}}) {
      FakeQueue fresh(memory_, 0x10000, 8);
      fresh.descriptor(0, descriptor.addr, descriptor.len, flags);
      fresh.offer(0);
      expect_broken("outside guest memory");
    }
  }
}

TEST_F(VirtQueueTest, ReadableBehindWritableIsBroken) {
  driver_.descriptor(0, buffers, 4, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
  driver_.descriptor(1, buffers, 4);
  driver_.offer(0);
  expect_broken("behind a writable");
}

TEST_F(VirtQueueTest, AvailableIndexAheadOfTheRingIsBroken) {
  driver_.announce(9);
  expect_broken("ahead");
}

TEST_F(VirtQueueTest, IndirectWhereItMayNotBeIsBroken) {
  driver_.descriptor(0, buffers, 16, VRING_DESC_F_INDIRECT);
  driver_.put(buffers, vring_desc{buffers, 16, VRING_DESC_F_INDIRECT, 0});
  driver_.offer(0);
  expect_broken("where none may be");     // nested
  expect_broken("where none may be", 0);  // not negotiated
  driver_.descriptor(0, buffers, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1);
  expect_broken("where none may be");
}

TEST_F(VirtQueueTest, ImpossibleIndirectTablesAreBroken) {
  driver_.offer(0);
  for (u32 bytes : {0u, 15u, 17u, 1025u * 16, 0xfffffff0u}) {
    driver_.descriptor(0, buffers, bytes, VRING_DESC_F_INDIRECT);
    expect_broken("impossible size");
  }
  driver_.descriptor(0, memory_size - 16, 32, VRING_DESC_F_INDIRECT);
  expect_broken("outside guest memory");
}

TEST_F(VirtQueueTest, AChainOfMoreThanFourGiBIsBroken) {
  for (u16 i = 0; i < 1024; ++i) {
    driver_.put(buffers + i * 16u, vring_desc{0, memory_size, u16(i < 1023 ? VRING_DESC_F_NEXT : 0), u16(i + 1)});
  }
  driver_.descriptor(0, buffers, 1, VRING_DESC_F_NEXT, 1);
  driver_.descriptor(1, buffers, 1024 * 16, VRING_DESC_F_INDIRECT);
  driver_.offer(1);  // exactly that much is allowed
  VirtQueue queue = make();
  EXPECT_EQ(queue.take(chain_), VirtQueue::Take::chain);
  FakeQueue one_more(memory_, 0x10000, 8);
  one_more.offer(0);
  expect_broken("4 GiB");
}

TEST_F(VirtQueueTest, ImpossibleLayoutsAreRefused) {
  const QueueLayout good{8, 0x10000, 0x11000, 0x12000};
  EXPECT_TRUE(VirtQueue::make(memory_, good, 0));
  const auto refused = [&](auto&& change) {
    QueueLayout layout = good;
    change(layout);
    return !VirtQueue::make(memory_, layout, 0);
  };
  EXPECT_TRUE(refused([](auto& layout) { layout.size = 0; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.size = 3; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.size = 2048; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.size = 0x80000000; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.descriptors += 8; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.available += 1; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.used += 2; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.descriptors = memory_size - 16; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.available = ~u64{0} - 1; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.used = memory_size - 4; }));
  // The used ring ends exactly at the end of memory, or two bytes behind it.
  EXPECT_FALSE(refused([](auto& layout) { layout.used = memory_size - 4 - 8 * 8 - 4; }));
  EXPECT_TRUE(refused([](auto& layout) { layout.used = memory_size - 4 - 8 * 8; }));
}

TEST_F(VirtQueueTest, InterruptsByFlag) {
  driver_.descriptor(0, buffers, 4);
  VirtQueue queue = make();
  EXPECT_FALSE(queue.needs_interrupt()) << "nothing was given back";
  driver_.offer(0);
  queue.take(chain_);
  queue.give_back(chain_, 0);
  EXPECT_TRUE(queue.needs_interrupt());
  EXPECT_FALSE(queue.needs_interrupt()) << "announced already";
  driver_.available_flags(VRING_AVAIL_F_NO_INTERRUPT);
  driver_.offer(0);
  queue.take(chain_);
  queue.give_back(chain_, 0);
  EXPECT_FALSE(queue.needs_interrupt());
}

TEST_F(VirtQueueTest, InterruptsByEventIndex) {
  driver_.descriptor(0, buffers, 4);
  VirtQueue queue = make(event_index);
  driver_.used_event(2);  // wanted when the third is given back
  std::vector<bool> interrupts;
  for (int i = 0; i < 5; ++i) {
    driver_.offer(0);
    queue.take(chain_);
    queue.give_back(chain_, 0);
    interrupts.push_back(queue.needs_interrupt());
  }
  EXPECT_EQ(interrupts, (std::vector{false, false, true, false, false}));
}

TEST_F(VirtQueueTest, NotificationsByFlag) {
  VirtQueue queue = make();
  queue.suppress_notification();
  EXPECT_EQ(driver_.used_flags(), VRING_USED_F_NO_NOTIFY);
  EXPECT_FALSE(queue.ask_for_notification());
  EXPECT_EQ(driver_.used_flags(), 0);
  driver_.descriptor(0, buffers, 4);
  driver_.offer(0);
  EXPECT_TRUE(queue.ask_for_notification()) << "one came before we asked";
}

TEST_F(VirtQueueTest, NotificationsByEventIndex) {
  driver_.descriptor(0, buffers, 4);
  VirtQueue queue = make(event_index);
  driver_.offer(0);
  driver_.offer(0);
  queue.take(chain_);
  queue.suppress_notification();
  EXPECT_EQ(driver_.available_event(), 0);
  EXPECT_TRUE(queue.ask_for_notification());
  queue.take(chain_);
  EXPECT_FALSE(queue.ask_for_notification());
  EXPECT_EQ(driver_.available_event(), 2);
}

TEST(BuffersTest, CopiesAndDropsAcrossPieces) {
  std::vector<u8> a{1, 2, 3}, b{4}, c{5, 6, 7, 8};
  Buffers list;
  for (auto* piece : {&a, &b, &c}) list.append(*piece);
  std::vector<u8> out(5);
  EXPECT_EQ(list.copy_out(2, out), 5u);
  EXPECT_EQ(out, (std::vector<u8>{3, 4, 5, 6, 7}));
  EXPECT_EQ(list.copy_out(6, out), 2u);
  EXPECT_EQ(list.copy_out(8, out), 0u);
  EXPECT_EQ(list.copy_in(3, std::vector<u8>{40, 50}), 2u);
  EXPECT_EQ(b[0], 40);
  EXPECT_EQ(c[0], 50);
  list.drop_front(4);
  EXPECT_EQ(list.bytes(), 4u);
  EXPECT_EQ(list.pieces().size(), 1u);
  list.drop_back(3);
  EXPECT_EQ(list.copy_out(0, out), 1u);
  EXPECT_EQ(out[0], 50);
  list.drop_front(1);
  EXPECT_EQ(list.pieces().size(), 0u);
}

// Whatever lies in memory, and however it changes, taking chains ends, and all pieces lie in guest memory.
TEST_F(VirtQueueTest, SurvivesRandomRings) {
  std::mt19937 random(1);
  const auto all = memory_.at(0, memory_size);
  const auto word = [&] { return static_cast<u32>(random()); };
  for (int round = 0; round < 20000; ++round) {
    FakeQueue ring(memory_, 0x10000, 8);
    for (u32 i = 0; i < 8; ++i) {
      // Mostly plausible, so that chains get somewhere; indirect tables lie among such descriptors themselves.
      const u64 addr = word() % 4 ? 0x10000 + (word() % 64) * 16 : (u64{word()} << 32 | word());
      const u32 len = word() % 4 ? (word() % 20) * 16 : word();
      ring.descriptor(i, addr, len, word() % 4 ? word() % 8 : word(), word() % 8 ? word() % 8 : word());
    }
    for (u16 i = 0; i < 8; ++i) ring.put<u16>(ring.layout().available + 4 + i * 2, word() % 8 ? word() % 8 : word());
    ring.announce(word() % 8 ? word() % 9 : word());
    VirtQueue queue = make(word() % 2 ? indirect | event_index : word());
    unsigned taken = 0;
    while (queue.take(chain_) == VirtQueue::Take::chain) {
      ASSERT_LE(++taken, 8u);
      for (const Buffers* list : {&chain_.readable, &chain_.writable}) {
        u64 bytes = 0;
        for (const iovec& piece : list->pieces()) {
          const u8* begin = static_cast<u8*>(piece.iov_base);
          ASSERT_GE(begin, all.data());
          ASSERT_LE(begin + piece.iov_len, all.data() + all.size());
          bytes += piece.iov_len;
        }
        ASSERT_EQ(bytes, list->bytes());
      }
      queue.give_back(chain_, word());
      queue.needs_interrupt();
    }
    queue.ask_for_notification();
  }
}

}  // namespace
}  // namespace anykvm::vmm
