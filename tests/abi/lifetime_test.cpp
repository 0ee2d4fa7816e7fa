// How long things live: descriptors, VMs, calls in flight, children.
#include <dirent.h>
#include <gtest/gtest.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "abi/client.h"
#include "x86/types.h"

namespace anykvm::abi {
namespace {

using namespace std::chrono_literals;

constexpr unsigned char out_forever[] = {0xe6, 0x10, 0xeb, 0xfc};  // 1: out %al, $0x10; jmp 1b
constexpr unsigned char spin[] = {0xeb, 0xfe};                     // 1: jmp 1b

int count_entries(const char* path) {
  int count = 0;
  DIR* directory = opendir(path);
  while (readdir(directory)) ++count;
  closedir(directory);
  return count;
}

/// A joined thread stays in /proc for a moment.
int count_threads(int expected) {
  int count;
  for (int tries = 0; (count = count_entries("/proc/self/task")) > expected && tries < 1000; ++tries) usleep(1000);
  return count;
}

long resident_kib() {
  std::FILE* file = std::fopen("/proc/self/status", "r");
  char line[256];
  long kib = 0;
  while (std::fgets(line, sizeof line, file))
    if (std::sscanf(line, "VmRSS: %ld", &kib) == 1) break;
  std::fclose(file);
  return kib;
}

TEST(Lifetime, AVcpuOutlivesTheDescriptorsOfItsVmAndOfTheSystem) {
  GuestMachine machine(out_forever);
  machine.system.reset();
  machine.vm.reset();
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
    EXPECT_EQ(__u32{KVM_EXIT_IO}, machine.run->exit_reason);
  }
  kvm_regs regs;
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &regs));
}

TEST(Lifetime, AVcpusIdStaysTakenWhenItsDescriptorIsClosed) {
  TestMachine machine;
  machine.add_vcpu(0);
  machine.vcpu.reset();
  EXPECT_EQ(-EEXIST, machine.vm.call(KVM_CREATE_VCPU, 0ul));
}

TEST(Lifetime, TheRunAreaIsAPlainMappingOfTheDescriptor) {
  TestMachine machine;
  machine.add_vcpu();
  ASSERT_NE(nullptr, machine.run);
  void* again = mmap(nullptr, 4096, PROT_READ, MAP_SHARED, machine.vcpu.get(), 0);
  ASSERT_NE(MAP_FAILED, again);
  machine.run->request_interrupt_window = 1;
  EXPECT_EQ(1, static_cast<kvm_run*>(again)->request_interrupt_window);
  munmap(again, 4096);
  EXPECT_NE(0, ftruncate(machine.vcpu.get(), 0));  // sealed: nobody can take the pages away
  EXPECT_EQ(0, std::memcmp(&machine.run->cr8, "\0\0\0\0\0\0\0\0", 8));
}

TEST(Lifetime, ADuplicateIsTheSameVcpu) {
  GuestMachine machine(out_forever);
  const int copy = dup(machine.vcpu.get());
  ASSERT_EQ(0, adopt_duplicate(machine.vcpu.get(), copy));
  machine.vcpu.reset();
  EXPECT_EQ(0, abi::ioctl(copy, KVM_RUN, 0));
  EXPECT_EQ(0, abi::close(copy));
  EXPECT_FALSE(abi::owns(copy));
}

TEST(Lifetime, ClosingDuringRunOnAnotherThreadLetsItFinish) {
  GuestMachine machine(spin);
  std::atomic<long> result{1};
  std::thread runner([&] { result = machine.vcpu.call(KVM_RUN); });
  std::this_thread::sleep_for(20ms);
  const int fd = machine.vcpu.get();
  EXPECT_EQ(0, abi::close(fd));
  EXPECT_EQ(-EBADF, abi::ioctl(fd, KVM_RUN, 0));
  EXPECT_EQ(1, result);  // still running
  machine.run->immediate_exit = 1;
  runner.join();
  EXPECT_EQ(-EINTR, result);
}

TEST(Lifetime, AnotherThreadsCallWaitsForRun) {
  GuestMachine machine(spin);
  std::atomic<bool> ran{false}, got{false};
  std::thread runner([&] {
    machine.vcpu.call(KVM_RUN);
    ran = true;
  });
  std::this_thread::sleep_for(20ms);
  std::thread reader([&] {
    kvm_regs regs;
    EXPECT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &regs));
    EXPECT_EQ(0x1000u, regs.rip);
    got = true;
  });
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(got);
  machine.run->immediate_exit = 1;
  runner.join();
  reader.join();
  EXPECT_TRUE(got);
}

TEST(Lifetime, AForkedChildsCallsFailAndTheParentGoesOn) {
  GuestMachine machine(out_forever);
  ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
  const pid_t child = fork();
  if (child == 0) {
    kvm_regs regs;
    bool good = machine.vcpu.call(KVM_RUN) == -EIO && machine.vcpu.call(KVM_GET_REGS, &regs) == -EIO &&
                machine.vm.call(KVM_CHECK_EXTENSION, 0ul) == -EIO && machine.vcpu.call(0x1234) == -EIO;
    // The system's descriptor belongs to nobody's memory.
    good = good && machine.system.call(KVM_GET_API_VERSION) == KVM_API_VERSION;
    const TestFd own(machine.system.call(KVM_CREATE_VM, 0ul));
    good = good && own.get() >= 0 && own.call(KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_USER_MEMORY) == 1;
    machine.vcpu.reset();
    machine.vm.reset();
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(0, status);
  EXPECT_EQ(0, machine.vcpu.call(KVM_RUN));
}

TEST(Lifetime, TheClientsProtectionOfGuestRamIsEfault) {
  GuestMachine machine(out_forever);
  ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
  mprotect(machine.ram, machine.ram_size, PROT_NONE);
  EXPECT_EQ(-EFAULT, machine.vcpu.call(KVM_RUN));
  mprotect(machine.ram, machine.ram_size, PROT_READ | PROT_WRITE);
  EXPECT_EQ(0, machine.vcpu.call(KVM_RUN));
}

TEST(Lifetime, AThousandMachinesLeaveNothingBehind) {
  const auto one = [] {
    GuestMachine machine(out_forever);
    ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
    ASSERT_EQ(__u32{KVM_EXIT_IO}, machine.run->exit_reason);
  };
  for (int i = 0; i < 50; ++i) one();
  const int fds = count_entries("/proc/self/fd"), threads = count_entries("/proc/self/task");
  const long kib = resident_kib();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) one();
  const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_EQ(fds, count_entries("/proc/self/fd"));
  EXPECT_EQ(threads, count_threads(threads));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they keep freed memory for a while
  EXPECT_LT(resident_kib(), kib + 2048);
#else
  EXPECT_GT(kib, 0);
#endif
  RecordProperty("milliseconds", static_cast<int>(seconds * 1000));
}

sigjmp_buf way_out;

TEST(Lifetime, AHandlerThatJumpsOutOfRunLeavesNothingBehind) {
  std::thread([] {}).join();  // with the first thread the thread sanitizer starts its own
  const int threads = count_entries("/proc/self/task");
  struct sigaction action {
  }, before;
  action.sa_handler = [](int) { siglongjmp(way_out, 1); };
  sigaction(SIGALRM, &action, &before);
  {
    GuestMachine machine(spin, /*irqchip=*/true);
    EXPECT_GT(count_entries("/proc/self/task"), threads);  // the timers' thread
    for (static int i = 0; i < 5; ++i) {                   // static: survives the jump
      if (sigsetjmp(way_out, 1) == 0) {
        const itimerval soon{.it_interval = {}, .it_value = {.tv_sec = 0, .tv_usec = 2000}};
        setitimer(ITIMER_REAL, &soon, nullptr);
        machine.vcpu.call(KVM_RUN);
        ADD_FAILURE() << "the handler has not jumped";
      }
    }
    kvm_regs regs;
    EXPECT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &regs));
    EXPECT_EQ(0x1000u, regs.rip);
  }
  EXPECT_EQ(threads, count_threads(threads));
  sigaction(SIGALRM, &before, nullptr);
}

TEST(Lifetime, TheExportedFunctionsAnswerAsSystemCalls) {
  const int fd = anykvm_open(O_RDWR);
  ASSERT_GE(fd, 0);
  EXPECT_FALSE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  EXPECT_TRUE(anykvm_owns(fd));
  EXPECT_EQ(KVM_API_VERSION, anykvm_ioctl(fd, KVM_GET_API_VERSION, 0));
  EXPECT_EQ(-1, anykvm_ioctl(fd, KVM_GET_API_VERSION, 1));
  EXPECT_EQ(EINVAL, errno);
  EXPECT_EQ(0, anykvm_close(fd));
  EXPECT_EQ(-1, anykvm_close(fd));
  EXPECT_EQ(EBADF, errno);
}

}  // namespace
}  // namespace anykvm::abi
