// Ends a KVM_RUN that goes on for too long, as a client would: immediate_exit and a signal to the thread. A run that
// does not return then hangs, which the fuzzer notices.
#pragma once

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::fuzz {

class StopTimer {
 public:
  /// The signal, which the client of a test must not block.
  static int signal_number();
  /// From now on for this long the thread may be in KVM_RUN with this kvm_run.
  StopTimer(kvm_run* run, u64 microseconds);
  ~StopTimer();
  StopTimer(const StopTimer&) = delete;
  StopTimer& operator=(const StopTimer&) = delete;
};

}  // namespace anykvm::fuzz
