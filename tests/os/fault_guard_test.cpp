// Faults that are ours are unwound; every other one reaches whoever would have had it.
#include "os/fault_guard.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "os/user_memory.h"

namespace anykvm::os {
namespace {

/// Volatile itself, so that the compiler does not see where it points.
volatile char* volatile wild = reinterpret_cast<volatile char*>(0x10);

// --- faults that are not ours: the first tests of this program, since the handlers are installed once a process -----

/// Runs f in a child and returns its wait status.
int status_of(void (*f)()) {
  const pid_t child = fork();
  if (child == 0) {
    f();
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

void as_the_kernel_does() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE}) ::signal(signal, SIG_DFL);
}

TEST(FaultsOfOthers, AWildPointerStillKillsWithTheRightSignal) {
  const int status = status_of([] {
    as_the_kernel_does();
    install_fault_handlers();
    *wild = 1;
  });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(SIGSEGV, WTERMSIG(status));
}

TEST(FaultsOfOthers, ASentSignalStillKills) {
  const int status = status_of([] {
    as_the_kernel_does();
    install_fault_handlers();
    run_guarded([](void*) { raise(SIGBUS); }, nullptr);
  });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(SIGBUS, WTERMSIG(status));
}

TEST(FaultsOfOthers, TheClientsHandlerStillRuns) {
  const int status = status_of([] {
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int signal, siginfo_t* info, void*) {
      _exit(signal == SIGSEGV && info->si_addr == wild ? 42 : 43);
    };
    sigaction(SIGSEGV, &action, nullptr);
    install_fault_handlers();
    *wild = 1;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(42, WEXITSTATUS(status));
}

// --- faults that are ours
// ---------------------------------------------------------------------------------------------

/// Two pages, the second inaccessible.
struct Edge {
  Edge() {
    base = static_cast<u8*>(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base + 4096, 4096, PROT_NONE);
  }
  ~Edge() { munmap(base, 8192); }
  u8* base;
};

TEST(UserMemory, CopiesEverySizeAndAlignment) {
  std::vector<u8> from(2000), to(2000);
  for (unsigned i = 0; i < from.size(); ++i) from[i] = static_cast<u8>(i * 7 + 1);
  for (unsigned size = 0; size < 600; ++size) {
    const unsigned offset = size % 13;
    std::fill(to.begin(), to.end(), 0);
    ASSERT_TRUE(copy_from_user(to.data() + 1, from.data() + offset, size));
    ASSERT_EQ(0, memcmp(to.data() + 1, from.data() + offset, size));
    ASSERT_EQ(0, to[0]);
    ASSERT_EQ(0, to[size + 1]);
  }
}

TEST(UserMemory, BadPointersAreReported) {
  Edge edge;
  u8 buffer[1024] = {};
  EXPECT_FALSE(copy_from_user(buffer, nullptr, 8));
  EXPECT_FALSE(copy_from_user(buffer, reinterpret_cast<void*>(0xffff'8000'0000'0000), 8));
  EXPECT_FALSE(copy_from_user(buffer, reinterpret_cast<void*>(0x1234'5678'0000'0000), 8));  // not canonical
  EXPECT_FALSE(copy_to_user(reinterpret_cast<void*>(8), buffer, 1000));
  EXPECT_TRUE(copy_to_user(edge.base + 4096 - 100, buffer, 100));
  EXPECT_FALSE(copy_to_user(edge.base + 4096 - 100, buffer, 101));
  EXPECT_FALSE(copy_from_user(buffer, edge.base + 4096 - 1000, 1024));
  EXPECT_TRUE(copy_from_user(buffer, nullptr, 0));
  mprotect(edge.base, 4096, PROT_READ);
  EXPECT_TRUE(copy_from_user(buffer, edge.base, 8));
  EXPECT_FALSE(copy_to_user(edge.base, buffer, 8));
}

TEST(UserMemory, APageBehindTheEndOfAFileIsABadPointer) {
  const int fd = memfd_create("short", 0);
  auto* page = static_cast<u8*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  u8 buffer[8];
  EXPECT_FALSE(copy_from_user(buffer, page, 8));  // SIGBUS
  munmap(page, 4096);
  close(fd);
}

TEST(FaultGuard, RunsAFunctionAndReportsAFault) {
  int value = 1;
  EXPECT_TRUE(run_guarded([](void* arg) { *static_cast<int*>(arg) = 2; }, &value));
  EXPECT_EQ(2, value);
  EXPECT_FALSE(run_guarded(
      [](void* arg) {
        *static_cast<int*>(arg) = 3;
        *wild = 1;
      },
      &value));
  EXPECT_EQ(3, value);
}

TEST(FaultGuard, NestsAndTheInnermostThatAcceptsGetsTheFault) {
  struct Trace {
    bool inner_finished = true, after_inner = false;
  } trace;
  EXPECT_TRUE(run_guarded(
      [](void* arg) {
        auto& trace = *static_cast<Trace*>(arg);
        trace.inner_finished = run_guarded([](void*) { *wild = 1; }, nullptr);
        trace.after_inner = true;
      },
      &trace));
  EXPECT_FALSE(trace.inner_finished);
  EXPECT_TRUE(trace.after_inner);

  trace = {};
  EXPECT_FALSE(run_guarded(
      [](void* arg) {
        auto& trace = *static_cast<Trace*>(arg);
        trace.inner_finished = run_guarded([](void*) { *wild = 1; }, nullptr, HostFaults::memory,
                                           [](void*, const void* address) { return address != wild; });
        trace.after_inner = true;
      },
      &trace));
  EXPECT_FALSE(trace.after_inner);
}

TEST(FaultGuard, ArithmeticFaultsAreCaughtOnlyWhenAskedFor) {
  const auto divide = [](void*) { asm volatile("xorl %%ecx, %%ecx; divl %%ecx" ::: "eax", "ecx", "edx", "cc"); };
  EXPECT_FALSE(run_guarded(divide, nullptr, HostFaults::arithmetic));
  EXPECT_FALSE(
      run_guarded([](void*) { run_guarded([](void*) { *wild = 1; }, nullptr, HostFaults::arithmetic); }, nullptr));
}

TEST(FaultGuard, FloatingPointControlIsRestored) {
  const auto spoil = [](void*) {
    const unsigned mxcsr = 0x9fc0;
    const unsigned short control = 0x0c7f;
    asm volatile("ldmxcsr %0; fldcw %1; fldz; fldz; std" ::"m"(mxcsr), "m"(control));
    *wild = 1;
  };
  unsigned before, after;
  unsigned short control_before, control_after;
  asm volatile("stmxcsr %0; fnstcw %1" : "=m"(before), "=m"(control_before));
  EXPECT_FALSE(run_guarded(spoil, nullptr));
  asm volatile("stmxcsr %0; fnstcw %1" : "=m"(after), "=m"(control_after));
  EXPECT_EQ(before, after);
  EXPECT_EQ(control_before, control_after);
}

TEST(FaultGuard, ThreadsHaveTheirOwnGuards) {
  std::vector<std::thread> threads;
  std::atomic<int> caught{0};
  for (std::uintptr_t i = 0; i < 4; ++i)
    threads.emplace_back([&caught, i] {
      void* const mine = reinterpret_cast<void*>(16 * (i + 1));  // what is stored to in turns would be a data race
      for (int n = 0; n < 2000; ++n)
        caught += !run_guarded([](void* at) { *static_cast<volatile char*>(at) = 1; }, mine);
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(8000, caught);
}

}  // namespace
}  // namespace anykvm::os
