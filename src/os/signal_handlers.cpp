#include "os/signal_handlers.h"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "os/process_identity.h"
#include "os/signals_blocked.h"

// libc's own sigaction, under the name that nobody interposes.
extern "C" int __sigaction(int, const struct sigaction*, struct sigaction*) noexcept;

namespace anykvm::os {
namespace {

/// What the client asked for, readable in a signal handler while another thread changes it: a sequence counter, odd
/// during a change.
struct Entry {
  std::atomic<u32> sequence{0};
  struct sigaction client {};
  std::atomic<FaultHandler> fault_handler{nullptr};
  void (*unused_handler)(int) = nullptr;  ///< take_unused_signal()'s
};

constinit Entry entries[NSIG];
constinit std::atomic_flag changing = ATOMIC_FLAG_INIT;

/// initial-exec: reached without __tls_get_addr, which may allocate.
[[gnu::tls_model("initial-exec")]] constinit thread_local SignalHold* innermost = nullptr;

/// The lock on changes. Signals are blocked while it is held, so that a handler on this thread cannot wait for it.
class ChangeLock {
 public:
  ChangeLock() {
    while (changing.test_and_set(std::memory_order_acquire)) __builtin_ia32_pause();
  }
  ~ChangeLock() { changing.clear(std::memory_order_release); }

 private:
  SignalsBlocked blocked_;
};

void set_client_action(Entry& entry, const struct sigaction& action) {
  entry.sequence.fetch_add(1, std::memory_order_acq_rel);
  entry.client = action;
  entry.sequence.fetch_add(1, std::memory_order_acq_rel);
}

struct sigaction client_action(Entry& entry) {
  for (;;) {
    const u32 before = entry.sequence.load(std::memory_order_acquire);
    struct sigaction action = entry.client;
    // A read that the copy above cannot sink below (and that the thread sanitizer understands).
    if (!(before & 1) && entry.sequence.fetch_add(0, std::memory_order_release) == before) return action;
  }
}

bool has_handler(const struct sigaction& action) {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN && action.sa_handler != SIG_ERR;
}

bool is_synchronous(int signal, const siginfo_t& info) {
  if (info.si_code <= 0) return false;
  return signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL || signal == SIGTRAP ||
         signal == SIGSYS;
}

void call(const struct sigaction& action, int signal, siginfo_t* info, void* context) {
  if (action.sa_flags & SA_SIGINFO)
    action.sa_sigaction(signal, info, context);
  else
    action.sa_handler(signal);
}

/// The signal's default action, taken for good.
void take_default(int signal, siginfo_t* info) {
  struct sigaction fatal {};
  fatal.sa_handler = SIG_DFL;
  __sigaction(signal, &fatal, nullptr);
  // A fault comes again when the handler returns, with the right address and core. What was sent has to be sent again.
  if (is_synchronous(signal, *info)) return;
  const long thread = syscall(SYS_gettid);
  if (syscall(SYS_rt_tgsigqueueinfo, getpid(), thread, signal, info) != 0)
    syscall(SYS_tgkill, getpid(), thread, signal);
}

/// A claimed signal that the library's handler did not want: everything the kernel would have done for the client.
void call_in_kernels_stead(Entry& entry, int signal, siginfo_t* info, void* context) {
  const struct sigaction action = client_action(entry);
  if (action.sa_handler == SIG_IGN && !is_synchronous(signal, *info)) return;
  if (!has_handler(action)) return take_default(signal, info);
  sigset_t blocked = action.sa_mask;
  if (!(action.sa_flags & SA_NODEFER)) sigaddset(&blocked, signal);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);  // undone by the return from this handler
  if (action.sa_flags & static_cast<int>(SA_RESETHAND)) {
    ChangeLock lock;
    struct sigaction none {};
    set_client_action(entry, none);
  }
  call(action, signal, info, context);
}

}  // namespace

/// What is installed for every handler of the client's.
struct SignalTrampoline {
  static void run(int signal, siginfo_t* info, void* context) {
    const int error = errno;
    Entry& entry = entries[signal];
    const FaultHandler fault_handler = entry.fault_handler.load(std::memory_order_acquire);
    SignalHold* const hold = innermost;
    if (fault_handler && fault_handler(signal, info, context)) {
    } else if (hold && !is_synchronous(signal, *info) &&
               hold->hold(signal, *info, *static_cast<ucontext_t*>(context))) {
    } else if (fault_handler) {
      call_in_kernels_stead(entry, signal, info, context);
    } else {
      const struct sigaction action = client_action(entry);
      if (has_handler(action)) call(action, signal, info, context);
    }
    errno = error;
  }
};

SignalHold::SignalHold(void (*notify)(void*), void* arg, const sigset_t* mask)
    : notify_(notify), arg_(arg), mask_(mask), outer_(innermost) {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  innermost = this;
}

bool SignalHold::hold(int signal, const siginfo_t& info, ucontext_t& context) {
  // One instruction, since another signal's trampoline may interrupt this one.
  const unsigned index = __atomic_fetch_add(&count_, 1, __ATOMIC_RELAXED);
  if (index >= capacity) {
    __atomic_fetch_sub(&count_, 1, __ATOMIC_RELAXED);
    notify_(arg_);
    return false;
  }
  held_[index] = info;
  sigaddset(&context.uc_sigmask, signal);
  if (!mask_ || !sigismember(mask_, signal)) notify_(arg_);
  return true;
}

void SignalHold::release(void (*leaving)(void*), void* arg) {
  innermost = outer_;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const unsigned count = count_;
  if (count == 0) [[likely]]
    return;
  if (leaving) leaving(arg);

  sigset_t unblocked;
  pthread_sigmask(SIG_BLOCK, nullptr, &unblocked);
  for (unsigned i = 0; i < count; ++i) sigdelset(&unblocked, held_[i].si_signo);
  for (unsigned i = 0; i < count; ++i) {
    const int signal = held_[i].si_signo;
    const struct sigaction action = client_action(entries[signal]);
    if (action.sa_handler == SIG_IGN) continue;
    if (!has_handler(action)) {
      take_default(signal, &held_[i]);
      continue;
    }
    sigset_t during;
    sigorset(&during, &unblocked, &action.sa_mask);
    if (!(action.sa_flags & SA_NODEFER)) sigaddset(&during, signal);
    pthread_sigmask(SIG_SETMASK, &during, nullptr);
    ucontext_t context;
    getcontext(&context);
    context.uc_sigmask = unblocked;
    call(action, signal, &held_[i], &context);
    unblocked = context.uc_sigmask;
  }
  pthread_sigmask(SIG_SETMASK, &unblocked, nullptr);
}

void claim_fault_signal(int signal, FaultHandler handler) {
  ChangeLock lock;
  Entry& entry = entries[signal];
  struct sigaction before;
  __sigaction(signal, nullptr, &before);
  if (before.sa_sigaction != SignalTrampoline::run) set_client_action(entry, before);
  entry.fault_handler.store(handler, std::memory_order_release);
  struct sigaction ours {};
  ours.sa_sigaction = SignalTrampoline::run;
  ours.sa_flags = SA_ONSTACK | SA_SIGINFO | SA_NODEFER;
  __sigaction(signal, &ours, nullptr);
}

bool take_unused_signal(int signal, void (*handler)(int)) {
  ChangeLock lock;
  struct sigaction before, ours{};
  if (__sigaction(signal, nullptr, &before) != 0 || before.sa_handler != SIG_DFL) return false;
  entries[signal].unused_handler = handler;
  ours.sa_handler = handler;
  ours.sa_flags = SA_RESTART;
  return __sigaction(signal, &ours, nullptr) == 0;
}

namespace {

int interposed_sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  if (signal < 1 || signal >= NSIG) return __sigaction(signal, action, old);
  struct sigaction wanted {};
  if (action) wanted = *action;  // before the lock: the pointer may be bad, or alias old
  struct sigaction previous;
  int result = 0;
  if (in_vfork_child()) {
    result = __sigaction(signal, action ? &wanted : nullptr, &previous);
    if (result == 0 && previous.sa_sigaction == SignalTrampoline::run) previous = client_action(entries[signal]);
  } else {
    ChangeLock lock;
    Entry& entry = entries[signal];
    if (entry.fault_handler.load(std::memory_order_relaxed)) {
      previous = entry.client;
      if (action) set_client_action(entry, wanted);
    } else {
      const struct sigaction client = entry.client;
      struct sigaction installed = wanted;
      if (action && has_handler(wanted)) {
        set_client_action(entry, wanted);
        installed.sa_sigaction = SignalTrampoline::run;
        installed.sa_flags |= SA_SIGINFO;
      }
      result = __sigaction(signal, action ? &installed : nullptr, &previous);
      if (result != 0)
        set_client_action(entry, client);
      else if (previous.sa_sigaction == SignalTrampoline::run)
        previous = client;
      else if (entry.unused_handler && previous.sa_handler == entry.unused_handler)
        previous = {};
    }
  }
  if (result == 0 && old) *old = previous;
  return result;
}

sighandler_t interposed_signal(int signal, sighandler_t handler, int flags) {
  struct sigaction action {
  }, old;
  action.sa_handler = handler;
  action.sa_flags = flags;
  if (!(flags & SA_NODEFER)) sigaddset(&action.sa_mask, signal);
  if (handler == SIG_ERR) {
    errno = EINVAL;
    return SIG_ERR;
  }
  return interposed_sigaction(signal, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}

}  // namespace
}  // namespace anykvm::os

// The names that clients link to. `signal` has BSD semantics in glibc, `sysv_signal` those of System V.
extern "C" {
[[gnu::visibility("default")]] int sigaction(int signal, const struct sigaction* action,
                                             struct sigaction* old) noexcept {
  return anykvm::os::interposed_sigaction(signal, action, old);
}
[[gnu::visibility("default")]] sighandler_t signal(int signal, sighandler_t handler) noexcept {
  return anykvm::os::interposed_signal(signal, handler, SA_RESTART);
}
[[gnu::visibility("default")]] sighandler_t bsd_signal(int signal, sighandler_t handler) noexcept {
  return anykvm::os::interposed_signal(signal, handler, SA_RESTART);
}
[[gnu::visibility("default")]] sighandler_t ssignal(int signal, sighandler_t handler) noexcept {
  return anykvm::os::interposed_signal(signal, handler, SA_RESTART);
}
[[gnu::visibility("default")]] sighandler_t sysv_signal(int signal, sighandler_t handler) noexcept {
  return anykvm::os::interposed_signal(signal, handler, static_cast<int>(SA_RESETHAND | SA_NODEFER));
}
[[gnu::visibility("default")]] sighandler_t __sysv_signal(int signal, sighandler_t handler) noexcept {
  return anykvm::os::interposed_signal(signal, handler, static_cast<int>(SA_RESETHAND | SA_NODEFER));
}
}
