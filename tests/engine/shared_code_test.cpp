// Who is told, and when, that code of another vCPU's may have been written.
#include "engine/translate/shared_code.h"

#include <gtest/gtest.h>

namespace anykvm::engine::translate {
namespace {

constexpr u64 page = 0x7000;

class SharedCodeTest : public testing::Test {
 protected:
  /// One that runs, has served what was asked before, and was told nothing since.
  struct Vcpu {
    Vcpu() { run(); }
    ~Vcpu() { code.leave(); }
    void run() {
      code.enter(attention);
      (void)newly_watched();
      (void)code.is_stale(false);
      attention = 0;
    }
    unsigned newly_watched() { return code.newly_watched(watched); }
    bool told() { return attention.exchange(0); }
    SharedCode code;
    u64 watched[SharedCode::few];
    std::atomic<u32> attention{0};
  };

  /// The writer's TLB lets a store through that may be still to come when the reader watches the page again.
  void watch_during_a_store() {
    writer.code.written(page);
    (void)reader.code.is_stale(false);
    (void)reader.code.watch(page);
    EXPECT_FALSE(reader.code.is_stale(false));
    (void)reader.told();
  }

  Vcpu reader, writer, other;
};

TEST_F(SharedCodeTest, AStoreThatIsOverWhenItsVcpuLeavesIsTold) {
  other.code.leave();
  watch_during_a_store();
  writer.code.leave();
  EXPECT_TRUE(reader.told());
  EXPECT_TRUE(reader.code.is_stale(false));
  EXPECT_FALSE(reader.code.is_stale(false));
}

TEST_F(SharedCodeTest, TheLastToServeARequestTellsWhoMadeIt) {
  watch_during_a_store();
  EXPECT_EQ(writer.newly_watched(), 1u);
  EXPECT_TRUE(reader.told());
  EXPECT_FALSE(reader.code.is_stale(false));  // the other may still store
  EXPECT_EQ(other.newly_watched(), 0u);       // it cannot
  EXPECT_TRUE(reader.told());
  EXPECT_TRUE(reader.code.is_stale(false));
}

TEST_F(SharedCodeTest, ItsOwnStoreIsNoNewsUnlessAnotherPageIsWatchedNoMore) {
  constexpr u64 twin = page + SharedCode::address_bits + 1;
  const auto watch = [&](u64 at) { (void)reader.code.watch(at); };
  reader.code.written(page);
  (void)reader.code.is_stale(false);
  watch(page);
  (void)writer.newly_watched(), (void)other.newly_watched(), (void)reader.newly_watched();
  (void)reader.code.is_stale(false);
  reader.code.written(page);
  EXPECT_FALSE(reader.code.is_stale(false));
  EXPECT_TRUE(writer.code.is_stale(false));
  watch(page);
  (void)writer.newly_watched(), (void)other.newly_watched(), (void)reader.newly_watched();
  (void)reader.code.is_stale(false);
  watch(twin);
  EXPECT_TRUE(SharedCode::is_watched(page) && SharedCode::is_watched(twin));
  reader.code.written(twin);
  EXPECT_FALSE(SharedCode::is_watched(page) || SharedCode::is_watched(twin));
  EXPECT_TRUE(reader.code.is_stale(false));
}

TEST_F(SharedCodeTest, WhoWaitsForNothingIsLeftAlone) {
  watch_during_a_store();
  (void)other.told();
  EXPECT_EQ(writer.newly_watched(), 1u);
  EXPECT_FALSE(other.told());
}

}  // namespace
}  // namespace anykvm::engine::translate
