// Host faults that are not bugs: guest RAM that the client has unmapped or protected, a bad pointer in an ioctl. A
// process-wide handler for SIGSEGV, SIGBUS, SIGFPE and SIGILL unwinds the guarded call that met one; every other fault
// goes to whoever handled it before, or kills the process as if the handler were not there.
#pragma once

namespace anykvm::os {

/// What a guard catches.
enum class HostFaults : unsigned {
  memory = 1,      ///< SIGSEGV and SIGBUS
  arithmetic = 2,  ///< SIGFPE
  illegal = 4,     ///< SIGILL
  all = memory | arithmetic | illegal,
};

/// Installs the handlers (SA_ONSTACK | SA_SIGINFO | SA_NODEFER) in front of the client's. The first call does it, the
/// others return at once. Thread-safe; not async-signal-safe. Handlers must not be blocked in a thread that meets a
/// fault: Linux kills a process that faults with the signal blocked.
void install_fault_handlers();

/// Calls f(arg). false: a host fault of the kind asked for unwound it. The callee-saved registers, x87 and MXCSR
/// control are those of before; what f was doing is abandoned, and destructors of its frames do not run. Guards nest;
/// the innermost that catches the fault gets it. No allocation, no lock, no system call.
///
/// accepts, when given, is asked (in the signal handler) whether a fault is expected at this address, of the memory or,
/// for the other kinds, of the instruction; it keeps a crash of somebody else's signal handler on top of f from being
/// taken for ours.
bool run_guarded(void (*f)(void*), void* arg, HostFaults catches = HostFaults::memory,
                 bool (*accepts)(void* arg, const void* address) = nullptr);

/// Machine code that this thread runs and knows how to leave at any instruction. `recover` is asked in the signal
/// handler about each SIGSEGV, SIGBUS, SIGFPE and SIGILL of the thread, before any guard: it may change the ucontext_t
/// so that the thread goes on elsewhere, and return true. The innermost is asked. A guard that unwinds also ends those
/// that began inside it. `unwinding`, if given, is called in the signal handler before a guard unwinds, be it inside or
/// outside: what the x87 unit and MXCSR hold is in the ucontext_t then, and gone behind it.
class FaultRecovery {
 public:
  using Recover = bool (*)(void* arg, void* ucontext);
  using Unwinding = void (*)(void* arg, const void* ucontext);
  FaultRecovery(Recover recover, void* arg, Unwinding unwinding = nullptr);
  ~FaultRecovery();
  FaultRecovery(const FaultRecovery&) = delete;
  FaultRecovery& operator=(const FaultRecovery&) = delete;

  bool operator()(void* ucontext) const { return recover_(arg_, ucontext); }
  void tell_unwinding(const void* ucontext) const;

 private:
  Recover recover_;
  void* arg_;
  Unwinding unwinding_;
  const FaultRecovery* outer_;
};

}  // namespace anykvm::os
