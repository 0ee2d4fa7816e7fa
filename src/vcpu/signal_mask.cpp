#include "vcpu/signal_mask.h"

#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "os/attention.h"
#include "os/signals_blocked.h"
#include "os/tsc.h"

namespace anykvm::vcpu {

/// The thread that makes running vCPUs with a mask look up. One per process, joined with the last mask.
class Kicker {
 public:
  static Kicker& instance() {
    static Kicker& kicker = *new Kicker;  // never destroyed: vCPUs may outlive static objects
    return kicker;
  }

  void add(SignalMask& mask) {
    std::lock_guard lock(mutex_);
    masks_.push_back(&mask);
    if (thread_.joinable()) return;
    const os::SignalsBlocked blocked;
    thread_ = std::thread([this] { run(); });
  }

  void remove(SignalMask& mask) {
    std::thread finished;
    {
      std::lock_guard lock(mutex_);
      std::erase(masks_, &mask);
      if (!masks_.empty()) return;
      finished = std::move(thread_);
      changed_.notify_all();
    }
    if (finished.joinable()) finished.join();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    // A thread that follows this one may have been started: then masks_ is not empty, and that one is in thread_.
    while (thread_.get_id() == std::this_thread::get_id()) {
      bool any_running = false;
      for (SignalMask* mask : masks_) {
        if (mask->running_.load(std::memory_order_relaxed) == 0) continue;
        any_running = true;
        os::raise_attention(mask->attention_);
      }
      changed_.wait_for(lock, std::chrono::microseconds(any_running ? 100 : 1000));
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<SignalMask*> masks_;
  std::thread thread_;
};

SignalMask::SignalMask(u64 blocked, std::atomic<u32>& attention, const std::atomic<u32>& running, int wake_fd)
    : let_through_(~blocked), attention_(attention), running_(running), wake_fd_(wake_fd) {
  sigset_t let_through;
  sigemptyset(&blocked_);
  sigemptyset(&let_through);
  // The kernel's set is 64 bits, which is how libc's begins; sigaddset() would refuse the signals libc keeps to itself.
  std::memcpy(&blocked_, &blocked, sizeof blocked);
  std::memcpy(&let_through, &let_through_, sizeof let_through_);
  signal_fd_ = signalfd(-1, &let_through, SFD_CLOEXEC | SFD_NONBLOCK);
  Kicker::instance().add(*this);
}

SignalMask::~SignalMask() {
  Kicker::instance().remove(*this);
  if (signal_fd_ >= 0) close(signal_fd_);
}

bool SignalMask::pending() {
  const u64 now = os::host_tsc();
  if (now - asked_at_tsc_ < os::host_tsc_khz() / 20) return false;
  asked_at_tsc_ = now;
  sigset_t set;
  u64 bits;
  if (sigpending(&set) != 0) return false;
  std::memcpy(&bits, &set, sizeof bits);
  return bits & let_through_;
}

void SignalMask::wait() {
  pollfd sources[] = {{wake_fd_, POLLIN, 0}, {signal_fd_, POLLIN, 0}};
  poll(sources, 2, -1);
  u64 count;
  if (sources[0].revents & POLLIN) [[maybe_unused]]
    const ssize_t size = read(wake_fd_, &count, sizeof count);
  asked_at_tsc_ = 0;
}

}  // namespace anykvm::vcpu
