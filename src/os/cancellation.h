// pthread_cancel() and KVM_RUN. A thread that has asked for PTHREAD_CANCEL_ASYNCHRONOUS may be cancelled in the middle
// of KVM_RUN: with the kernel that ends the system call, and the thread unwinds from there. Here it would unwind from
// any instruction of this library, locks held. So such a thread's cancellation is deferred while it is in KVM_RUN, and
// takes effect when KVM_RUN is about to return; this library interposes pthread_setcanceltype() to know the thread's
// wish, and pthread_cancel() to have the vCPU stop for it. Threads with the default type cost one load.
#pragma once

namespace anykvm::os {

/// A thread's stay in KVM_RUN, for the sake of pthread_cancel().
class CancellationHold {
 public:
  /// `notify(arg)` is called on the canceller's thread. A thread that has been cancelled already ends here.
  CancellationHold(void (*notify)(void*), void* arg);
  CancellationHold(const CancellationHold&) = delete;
  CancellationHold& operator=(const CancellationHold&) = delete;
  ~CancellationHold() { leave(); }
  /// Ends the stay: a thread that has been cancelled does not come back. No effect the second time.
  void release();

 private:
  friend struct CancelledThreads;
  void leave();

  void (*const notify_)(void*);
  void* const arg_;
  bool registered_ = false;
  unsigned long thread_ = 0;
  CancellationHold* next_ = nullptr;
};

}  // namespace anykvm::os
