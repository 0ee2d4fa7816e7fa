// The I/O thread: descriptors, timers, posted work, sources, stopping.
#include "vmm/event_loop.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <future>

namespace anykvm::vmm {
namespace {

using namespace std::chrono_literals;

TEST(EventLoop, RunsPostsInOrderOnItsThread) {
  EventLoop loop;
  loop.start();
  std::promise<bool> done;
  std::string order;
  loop.post([&] { order += 'a'; });
  loop.post([&] { order += 'b', done.set_value(loop.on_loop_thread()); });
  EXPECT_TRUE(done.get_future().get());
  EXPECT_EQ(order, "ab");
  EXPECT_FALSE(loop.on_loop_thread());
}

TEST(EventLoop, WatchesDescriptorsUntilRemoved) {
  EventLoop loop;
  loop.start();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  std::promise<char> got;
  loop.add(ends[0], POLLIN, [&](short) {
    char byte;
    if (read(ends[0], &byte, 1) == 1) got.set_value(byte);
    loop.remove(ends[0]);
  });
  ASSERT_EQ(write(ends[1], "xy", 2), 2);
  EXPECT_EQ(got.get_future().get(), 'x');
  std::promise<void> after;
  loop.post([&] { after.set_value(); });
  after.get_future().wait();  // a second call of the callback would have thrown
  loop.stop();
  close(ends[0]);
  close(ends[1]);
}

TEST(EventLoop, TimersRunInOrderAndCanBeCancelled) {
  EventLoop loop;
  std::promise<void> done;
  std::string order;
  const u64 now = EventLoop::now_ns();
  loop.at(now + 20'000'000, [&] { order += 'c', done.set_value(); });
  loop.at(now + 5'000'000, [&] { order += 'a'; });
  const auto cancelled = loop.at(now + 10'000'000, [&] { order += 'b'; });
  loop.cancel(cancelled);
  loop.start();
  done.get_future().wait();
  EXPECT_EQ(order, "ac");
  EXPECT_GE(EventLoop::now_ns(), now + 20'000'000);
}

TEST(EventLoop, AsksSourcesBeforeEachWait) {
  struct Source final : PollSource {
    void before_poll(std::vector<pollfd>& fds, int& timeout_ms) override {
      fds.push_back({fd, POLLIN, 0});
      timeout_ms = 1000;
    }
    void after_poll(std::span<const pollfd> fds) override {
      if (fds.size() == 1 && fds[0].fd == fd && fds[0].revents && !told) told = true, ready.set_value();
    }
    int fd = -1;
    bool told = false;
    std::promise<void> ready;
  } source;
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  source.fd = ends[0];
  EventLoop loop;
  loop.add_source(source);
  loop.start();
  ASSERT_EQ(write(ends[1], "x", 1), 1);
  EXPECT_EQ(source.ready.get_future().wait_for(5s), std::future_status::ready);
  loop.stop();
  close(ends[0]);
  close(ends[1]);
}

TEST(EventLoop, StopsFromWithin) {
  EventLoop loop;
  loop.start();
  loop.post([&] { loop.stop(); });
  loop.stop();
}

}  // namespace
}  // namespace anykvm::vmm
