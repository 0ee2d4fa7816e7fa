// The client's signal handlers and KVM_RUN. In the kernel a signal ends KVM_RUN with EINTR, and its handler runs when
// the system call is over. Here guest code runs in the middle of a library call, so this library interposes sigaction()
// and signal(): each handler is installed behind a trampoline that, on a thread inside KVM_RUN, holds the signal (it
// stays blocked), has the vCPU stop, and calls the handler when KVM_RUN is about to return. The client's handler never
// sees guest state in the making, may call any KVM function, and may leave by siglongjmp().
//
// Handlers that came past libc's sigaction() (raw system calls) run at once, and are noticed only by what they set, or
// when they end a halt.
//
// Async-signal-safe throughout.
#pragma once

#include <csignal>

#include "x86/types.h"

namespace anykvm::os {

/// A thread's stay in KVM_RUN.
class SignalHold {
 public:
  /// From now on signals are held and `notify(arg)` is called for each, in signal context on this thread. `mask` (or
  /// nullptr) is KVM_SET_SIGNAL_MASK's: signals in it are held without notice.
  SignalHold(void (*notify)(void*), void* arg, const sigset_t* mask = nullptr);
  SignalHold(const SignalHold&) = delete;
  SignalHold& operator=(const SignalHold&) = delete;
  /// Ends the stay and calls the handlers of the signals held, as if they arrived now. No system call when there are
  /// none. The object must not be used afterwards: a handler may not come back. `leaving`, if given, is called before
  /// the first of them, to end what a handler that leaves by siglongjmp() would leave behind.
  void release(void (*leaving)(void*) = nullptr, void* arg = nullptr);

 private:
  friend struct SignalTrampoline;
  static constexpr unsigned capacity = 8;  ///< different signals at once; further ones are handled at once

  bool hold(int signal, const siginfo_t& info, ucontext_t& context);

  void (*const notify_)(void*);
  void* const arg_;
  const sigset_t* const mask_;
  SignalHold* const outer_;
  volatile unsigned count_ = 0;
  siginfo_t held_[capacity];
};

/// Puts a handler of the library's own in front of the client's for a fault signal: it is called first, and when it
/// returns false the client's action is taken, whatever that is or becomes. What the client sees of sigaction() is its
/// own. Signals so claimed stay installed with SA_ONSTACK | SA_SIGINFO | SA_NODEFER.
using FaultHandler = bool (*)(int signal, siginfo_t* info, void* context);
void claim_fault_signal(int signal, FaultHandler handler);

/// Installs a handler of the library's own for a signal that the client leaves at its default action, which is what the
/// client goes on seeing; a handler of the client's replaces it. false: the client has one, or ignores the signal.
bool take_unused_signal(int signal, void (*handler)(int));

}  // namespace anykvm::os
