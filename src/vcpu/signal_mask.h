// KVM_SET_SIGNAL_MASK: the set of signals that is blocked while KVM_RUN runs, in place of the thread's own.
// Reference: api.rst 4.17.
//
// The kernel switches the thread's mask for the time of KVM_RUN, but a handler never runs in between: a signal that
// only the new mask lets through makes KVM_RUN return EINTR and stays pending. So nothing has to be switched here. It
// is enough to notice such signals: a halted vCPU polls a signalfd; for a running one a thread of this library, there
// only while some vCPU has a mask, has the engine return every 100 us, and the vCPU then asks sigpending().
#pragma once

#include <atomic>
#include <csignal>

#include "x86/types.h"

namespace anykvm::vcpu {

class SignalMask {
 public:
  /// attention: Cpu::attention of the vCPU, raised while running is not 0. wake_fd: an eventfd that ends wait().
  SignalMask(u64 blocked, std::atomic<u32>& attention, const std::atomic<u32>& running, int wake_fd);
  ~SignalMask();
  SignalMask(const SignalMask&) = delete;
  SignalMask& operator=(const SignalMask&) = delete;

  const sigset_t& blocked() const { return blocked_; }
  /// Whether a signal is pending on this thread that the mask lets through. Asks the kernel at most every 50 us.
  bool pending();
  /// Blocks until wake_fd is signalled or such a signal is pending (or a handler runs).
  void wait();

 private:
  friend class Kicker;
  sigset_t blocked_;
  u64 let_through_;  ///< bit n-1: signal n
  std::atomic<u32>& attention_;
  const std::atomic<u32>& running_;
  const int wake_fd_;
  int signal_fd_;
  u64 asked_at_tsc_ = 0;
};

}  // namespace anykvm::vcpu
