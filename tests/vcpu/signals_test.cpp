// Signals during KVM_RUN, on a guest that never exits by itself.
#include <setjmp.h>

#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

vcpu::Vcpu* handler_vcpu;
kvm_run* handler_run;
volatile int handled;
volatile u64 handler_rip;
sigjmp_buf handler_escape;

class Signals : public TestMachine {
 protected:
  Signals() { handled = 0; }
  ~Signals() override { signal(SIGUSR1, SIG_DFL); }

  /// Runs the guest on this thread while another sends SIGUSR1 here after 20 ms.
  int run_and_signal(vcpu::Vcpu& vcpu) {
    const pthread_t self = pthread_self();
    std::thread kicker([self] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      pthread_kill(self, SIGUSR1);
    });
    const int result = vcpu.run();
    kicker.join();
    return result;
  }
  vcpu::Vcpu& endless_loop() {
    auto& vcpu = add_vcpu();
    start_real_mode(vcpu, {0xeb, 0xfe});  // jmp .
    return vcpu;
  }
};

TEST_F(Signals, APlainHandlerEndsRun) {
  auto& vcpu = endless_loop();
  signal(SIGUSR1, [](int) { handled = handled + 1; });
  EXPECT_EQ(run_and_signal(vcpu), -EINTR);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_INTR);
  EXPECT_EQ(handled, 1);
  EXPECT_EQ(run_and_signal(vcpu), -EINTR) << "and is unblocked again";
  EXPECT_EQ(handled, 2);
}

TEST_F(Signals, AHandlerMayUseTheVcpuAndLeaveByALongJump) {
  auto& vcpu = endless_loop();
  handler_vcpu = &vcpu;
  struct sigaction action {};
  action.sa_sigaction = [](int, siginfo_t*, void*) {
    kvm_regs regs;
    handler_rip = handler_vcpu->get_regs(regs) == 0 ? regs.rip : ~0ull;
    siglongjmp(handler_escape, 1);
  };
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGUSR1, &action, nullptr);
  const pthread_t self = pthread_self();
  std::thread kicker([self] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    pthread_kill(self, SIGUSR1);
  });
  if (sigsetjmp(handler_escape, 1) == 0) {
    vcpu.run();
    ADD_FAILURE() << "the handler has not jumped";
  }
  kicker.join();
  EXPECT_EQ(handler_rip, 0u);
  run().immediate_exit = 1;
  EXPECT_EQ(vcpu.run(), -EINTR);
}

TEST_F(Signals, AHandlerThatSetsImmediateExit) {
  auto& vcpu = endless_loop();
  handler_run = &run();
  signal(SIGUSR1, [](int) { handler_run->immediate_exit = 1; });
  EXPECT_EQ(run_and_signal(vcpu), -EINTR);
}

TEST_F(Signals, ImmediateExitOfAnotherThreadIsNoticed) {
  auto& vcpu = endless_loop();
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    set_immediate_exit();
  });
  EXPECT_EQ(vcpu.run(), -EINTR);
  kicker.join();
}

TEST_F(Signals, EndAHalt) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0xfb, 0xf4});                  // sti; hlt
  signal(SIGUSR1, [](int) { handled = handled + 1; });  // with SA_RESTART
  EXPECT_EQ(run_and_signal(vcpu), -EINTR);
  EXPECT_EQ(handled, 1);
}

TEST_F(Signals, SigactionShowsTheClientItsOwnHandler) {
  struct sigaction action {
  }, old;
  action.sa_handler = [](int) { handled = handled + 1; };
  action.sa_flags = SA_RESTART;
  ASSERT_EQ(sigaction(SIGUSR1, &action, nullptr), 0);
  ASSERT_EQ(sigaction(SIGUSR1, nullptr, &old), 0);
  EXPECT_EQ(old.sa_handler, action.sa_handler);
  EXPECT_FALSE(old.sa_flags & SA_SIGINFO);
  EXPECT_TRUE(old.sa_flags & SA_RESTART);
  EXPECT_EQ(signal(SIGUSR1, SIG_IGN), action.sa_handler);
  EXPECT_EQ(signal(SIGUSR1, SIG_DFL), SIG_IGN);
  raise(SIGURG);  // ignored by default: no handler of ours in between

  struct sigaction before;
  ASSERT_EQ(sigaction(SIGBUS, nullptr, &before), 0);
  add_vcpu();  // the fault handlers are in place now
  ASSERT_EQ(sigaction(SIGBUS, nullptr, &old), 0);
  EXPECT_EQ(old.sa_handler, before.sa_handler);
  ASSERT_EQ(sigaction(SIGBUS, &action, nullptr), 0);
  raise(SIGBUS);
  EXPECT_EQ(handled, 1);
  EXPECT_EQ(signal(SIGBUS, before.sa_handler), action.sa_handler);
  sigaction(SIGBUS, &before, nullptr);
}

class SignalMasks : public Signals {
 protected:
  SignalMasks() {
    signal(SIGUSR1, [](int) { handled = handled + 1; });
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, &before);
  }
  ~SignalMasks() override { pthread_sigmask(SIG_SETMASK, &before, nullptr); }

  void expect_pending_and_take() {
    EXPECT_EQ(handled, 0) << "the handler does not run inside KVM_RUN";
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    const timespec now{};
    EXPECT_EQ(sigtimedwait(&usr1, nullptr, &now), SIGUSR1);
  }
  sigset_t before;
};

TEST_F(SignalMasks, ASignalThatOnlyTheMaskLetsThroughEndsRun) {
  auto& vcpu = endless_loop();
  const u64 none = 0;
  ASSERT_EQ(vcpu.set_signal_mask(&none), 0);
  const u64 start = os::monotonic_ns();
  EXPECT_EQ(run_and_signal(vcpu), -EINTR);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_INTR);
  EXPECT_LT(os::monotonic_ns() - start, 500'000'000u);
  EXPECT_EQ(vcpu.run(), -EINTR) << "it is still pending";
  expect_pending_and_take();
  ASSERT_EQ(vcpu.set_signal_mask(nullptr), 0);
}

TEST_F(SignalMasks, EndsAHalt) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0xfb, 0xf4});  // sti; hlt
  const u64 none = 0;
  ASSERT_EQ(vcpu.set_signal_mask(&none), 0);
  EXPECT_EQ(run_and_signal(vcpu), -EINTR);
  expect_pending_and_take();
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    set_immediate_exit();
    vcpu.wake();
  });
  EXPECT_EQ(vcpu.run(), -EINTR) << "wake() reaches the wait too";
  kicker.join();
}

TEST_F(SignalMasks, ABlockedSignalDoesNotEndRun) {
  auto& vcpu = endless_loop();
  const u64 all = ~0ull;
  ASSERT_EQ(vcpu.set_signal_mask(&all), 0);
  std::thread kicker([&, self = pthread_self()] {
    pthread_kill(self, SIGUSR1);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    set_immediate_exit();
  });
  const u64 start = os::monotonic_ns();
  EXPECT_EQ(vcpu.run(), -EINTR);
  EXPECT_GT(os::monotonic_ns() - start, 20'000'000u);
  kicker.join();
  expect_pending_and_take();
}

/// A thread that runs the vCPU for ever, to be cancelled at any instruction.
pthread_t run_in_cancellable_thread(vcpu::Vcpu& vcpu) {
  pthread_t thread;
  pthread_create(
      &thread, nullptr,
      [](void* vcpu) -> void* {
        pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, nullptr);
        for (;;) static_cast<vcpu::Vcpu*>(vcpu)->run();
      },
      &vcpu);
  return thread;
}

TEST_F(Signals, AThreadThatIsCancelledInRunLeavesTheVcpuUsable) {
  auto& vcpu = endless_loop();
  for (const unsigned delay_ms : {20u, 0u, 1u}) {
    const pthread_t thread = run_in_cancellable_thread(vcpu);
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
    EXPECT_EQ(pthread_cancel(thread), 0);
    void* result = nullptr;
    pthread_join(thread, &result);
    EXPECT_EQ(result, PTHREAD_CANCELED);
    kvm_regs regs;
    EXPECT_EQ(vcpu.get_regs(regs), 0);
  }
}

TEST_F(Signals, AThreadThatIsCancelledInAHaltEnds) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0xfa, 0xf4});  // cli; hlt
  const pthread_t thread = run_in_cancellable_thread(vcpu);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(pthread_cancel(thread), 0);
  void* result = nullptr;
  pthread_join(thread, &result);
  EXPECT_EQ(result, PTHREAD_CANCELED);
}

}  // namespace
}  // namespace anykvm
