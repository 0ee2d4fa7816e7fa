#include "os/fault_guard.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <csetjmp>
#endif

#include "os/client_ram.h"
#include "os/signal_handlers.h"
#include "x86/types.h"

// Everything from here to the handlers runs inside a signal handler of somebody else's process: no allocation, no lock,
// nothing but async-signal-safe calls.

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_handle_no_return();
#endif

namespace anykvm::os {
namespace {

/// One run_guarded() in progress. The assembly below knows the offsets of the first three fields.
struct Guard {
  u64 stack;
  u32 mxcsr;
  u16 x87_control;
  unsigned catches;
  bool (*accepts)(void*, const void*);
  void* arg;
  Guard* outer;
  const FaultRecovery* recovery;  ///< in force outside
};

static_assert(offsetof(Guard, stack) == 0 && offsetof(Guard, mxcsr) == 8 && offsetof(Guard, x87_control) == 12);

/// initial-exec: reached without __tls_get_addr, which may allocate.
[[gnu::tls_model("initial-exec")]] constinit thread_local Guard* innermost = nullptr;
[[gnu::tls_model("initial-exec")]] constinit thread_local const FaultRecovery* innermost_recovery = nullptr;

constexpr int handled_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
}  // namespace

extern "C" {
[[gnu::visibility("hidden")]] bool anykvm_guarded_call(void (*f)(void*), void* arg, Guard* guard);
[[gnu::visibility("hidden")]] extern const char anykvm_guard_landing[];
[[gnu::visibility("hidden")]] extern const char anykvm_user_copy[], anykvm_user_copy_end[], anykvm_user_copy_fault[];
}

// Leaves a way back in the guard, calls, and returns true; a fault continues at the landing with the stack pointer of
// then, which finds the callee-saved registers below it.
asm(R"(
    .pushsection .text.anykvm_guarded_call, "ax", @progbits
    .hidden anykvm_guarded_call
    .hidden anykvm_guard_landing
    .globl anykvm_guarded_call
    .globl anykvm_guard_landing
    .type anykvm_guarded_call, @function
    .p2align 4
anykvm_guarded_call:
    .cfi_startproc
    pushq %rbp
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %rbp, 0
    pushq %rbx
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %rbx, 0
    pushq %r12
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %r12, 0
    pushq %r13
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %r13, 0
    pushq %r14
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %r14, 0
    pushq %r15
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset %r15, 0
    pushq %rdx
    .cfi_adjust_cfa_offset 8
    movq %rsp, (%rdx)
    stmxcsr 8(%rdx)
    fnstcw 12(%rdx)
    movq %rdi, %rax
    movq %rsi, %rdi
    call *%rax
    movl $1, %eax
1:  popq %rdx
    .cfi_remember_state
    .cfi_adjust_cfa_offset -8
    popq %r15
    .cfi_adjust_cfa_offset -8
    popq %r14
    .cfi_adjust_cfa_offset -8
    popq %r13
    .cfi_adjust_cfa_offset -8
    popq %r12
    .cfi_adjust_cfa_offset -8
    popq %rbx
    .cfi_adjust_cfa_offset -8
    popq %rbp
    .cfi_adjust_cfa_offset -8
    ret
anykvm_guard_landing:
    .cfi_restore_state
    movq (%rsp), %rdx
    fninit
    fldcw 12(%rdx)
    ldmxcsr 8(%rdx)
    xorl %eax, %eax
    jmp 1b
    .cfi_endproc
    .size anykvm_guarded_call, . - anykvm_guarded_call
    .popsection
)");

namespace {

/// Flags that would disturb the code at the landing: TF, DF, AC.
constexpr greg_t disturbing_flags = 0x100 | 0x400 | 0x40000;

HostFaults kind_of(int signal) {
  if (signal == SIGFPE) return HostFaults::arithmetic;
  return signal == SIGILL ? HostFaults::illegal : HostFaults::memory;
}

bool unwind_guard(int signal, siginfo_t* info, ucontext_t& context) {
  mcontext_t& machine = context.uc_mcontext;
  const unsigned kind = static_cast<unsigned>(kind_of(signal));
  for (Guard* guard = innermost; guard; guard = guard->outer) {
    if (!(guard->catches & kind)) continue;
    if (guard->accepts && !guard->accepts(guard->arg, info->si_addr)) continue;
#if defined(__SANITIZE_ADDRESS__)
    __asan_handle_no_return();
#endif
    if (innermost_recovery) innermost_recovery->tell_unwinding(&context);
    innermost = guard->outer;
    innermost_recovery = guard->recovery;
    machine.gregs[REG_RSP] = static_cast<greg_t>(guard->stack);
    machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(anykvm_guard_landing);
    machine.gregs[REG_EFL] &= ~disturbing_flags;
    return true;
  }
  return false;
}

/// false: not this library's; the client's action is next.
bool on_fault(int signal, siginfo_t* info, void* context) {
  if (info->si_code <= 0) return false;
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  if (signal == SIGSEGV && info->si_code == SEGV_ACCERR && was_being_moved(info->si_addr)) return true;
  const auto rip = reinterpret_cast<const char*>(machine.gregs[REG_RIP]);
  if (kind_of(signal) == HostFaults::memory && rip >= anykvm_user_copy && rip < anykvm_user_copy_end) {
    machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(anykvm_user_copy_fault);
    return true;
  }
  if (innermost_recovery && (*innermost_recovery)(context)) return true;
  return unwind_guard(signal, info, *static_cast<ucontext_t*>(context));
}

/// 0 not yet, 1 under way, 2 done.
std::atomic<int> installed{0};

void install() {
  int expected = 0;
  if (!installed.compare_exchange_strong(expected, 1)) {
    while (installed.load(std::memory_order_acquire) != 2) usleep(10);
    return;
  }
  for (const int signal : handled_signals) claim_fault_signal(signal, on_fault);
  installed.store(2, std::memory_order_release);
}

}  // namespace

FaultRecovery::FaultRecovery(Recover recover, void* arg, Unwinding unwinding)
    : recover_(recover), arg_(arg), unwinding_(unwinding), outer_(innermost_recovery) {
  install_fault_handlers();
  std::atomic_signal_fence(std::memory_order_release);
  innermost_recovery = this;
}

void FaultRecovery::tell_unwinding(const void* ucontext) const {
  for (const FaultRecovery* each = this; each; each = each->outer_)
    if (each->unwinding_) each->unwinding_(each->arg_, ucontext);
}

FaultRecovery::~FaultRecovery() { innermost_recovery = outer_; }

void install_fault_handlers() {
  if (installed.load(std::memory_order_acquire) != 2) [[unlikely]]
    install();
}

bool run_guarded(void (*f)(void*), void* arg, HostFaults catches, bool (*accepts)(void*, const void*)) {
  install_fault_handlers();
  Guard guard;
  guard.catches = static_cast<unsigned>(catches);
  guard.accepts = accepts;
  guard.arg = arg;
  guard.outer = innermost;
  guard.recovery = innermost_recovery;
  innermost = &guard;
#if defined(__SANITIZE_THREAD__)
  // The sanitizer keeps a call stack of its own, which only longjmp() cuts back to what it is here.
  std::jmp_buf here;
  if (setjmp(here)) {
    innermost = guard.outer;
    return false;
  }
  if (!anykvm_guarded_call(f, arg, &guard)) std::longjmp(here, 1);
  innermost = guard.outer;
  return true;
#else
  const bool finished = anykvm_guarded_call(f, arg, &guard);
  innermost = guard.outer;
  return finished;
#endif
}

}  // namespace anykvm::os
