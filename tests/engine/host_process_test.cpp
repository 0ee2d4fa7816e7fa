#include "engine/direct/host_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "os/attention.h"

namespace anykvm::engine::direct {
namespace {

constexpr u64 code_at = 0x400000, data_at = 0x7fff00000000;

/// A process with a page of code, and a file with another page for it.
class Process : public ::testing::Test {
 protected:
  int file = -1;
  u8* memory = nullptr;
  Zygote zygote;
  HostProcess process;
  std::atomic<u32> attention{0};
  u8 immediate_exit = 0;

  void SetUp() override {
    file = memfd_create("pages", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(file, 2 * page_size), 0);
    memory = static_cast<u8*>(mmap(nullptr, 2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    const int files[] = {file};
    if (!zygote.start(files)) GTEST_SKIP() << "this host lets no process be forked that way";
    ASSERT_TRUE(process.start(zygote));
    process.map(code_at, page_size, PROT_READ | PROT_EXEC, file, 0);
  }
  void TearDown() override {
    munmap(memory, 2 * page_size);
    close(file);
  }

  greg_t* registers() { return process.context()->uc_mcontext.gregs; }
  void run(std::initializer_list<u8> code) {
    std::copy(code.begin(), code.end(), memory);
    registers()[REG_RIP] = code_at;
    go();
  }
  void go() {
    process.go();
    ASSERT_EQ(process.wait(attention, &immediate_exit), HostProcess::Stop::signal);
    ASSERT_NE(process.context(), nullptr);
  }
};

TEST_F(Process, ASystemCallStopsItAndIsNotMade) {
  registers()[REG_RAX] = 60;  // exit
  registers()[REG_RBX] = 0x123456789abc;
  run({0x0f, 0x05});
  EXPECT_EQ(process.signal(), unsigned(SIGSYS));
  EXPECT_EQ(u64(registers()[REG_RIP]), code_at + 2);
  EXPECT_EQ(registers()[REG_RAX], 60);
  EXPECT_EQ(registers()[REG_RBX], 0x123456789abc);
}

TEST_F(Process, ItCannotMakeTheCallsOfItsHandler) {
  for (const greg_t call : {202, 15, 9}) {  // futex, rt_sigreturn, mmap
    registers()[REG_RAX] = call;
    run({0x0f, 0x05});
    EXPECT_EQ(process.signal(), unsigned(SIGSYS)) << call;
  }
}

TEST_F(Process, PageFaultsAreToldAndServed) {
  registers()[REG_RDI] = data_at + 8;
  memory[page_size + 8] = 42;
  run({0x8a, 0x07, 0xfe, 0x07, 0x0f, 0x0b});  // mov al, [rdi] ; inc byte [rdi] ; ud2
  EXPECT_EQ(process.signal(), unsigned(SIGSEGV));
  EXPECT_EQ(registers()[REG_TRAPNO], 14);
  EXPECT_EQ(u64(registers()[REG_CR2]), data_at + 8);
  process.map(data_at, page_size, PROT_READ, file, page_size);
  go();
  EXPECT_EQ(process.signal(), unsigned(SIGSEGV)) << "it may not write";
  EXPECT_EQ(registers()[REG_RAX] & 0xff, 42);
  EXPECT_EQ(registers()[REG_ERR] & 2, 2);
  process.map(data_at, page_size, PROT_READ | PROT_WRITE, file, page_size);
  go();
  EXPECT_EQ(process.signal(), unsigned(SIGILL));
  EXPECT_EQ(memory[page_size + 8], 43);
  process.unmap(data_at, page_size);
  run({0x8a, 0x07});
  EXPECT_EQ(process.signal(), unsigned(SIGSEGV)) << "gone again";
}

TEST_F(Process, AttentionStopsALoop) {
  std::thread raiser([this] {
    while (attention.load() != os::attention_sleeps) std::this_thread::yield();
    os::raise_attention(attention);
  });
  run({0xeb, 0xfe});  // jmp $
  raiser.join();
  EXPECT_EQ(process.signal(), unsigned(HostProcess::kick_signal));
  EXPECT_EQ(u64(registers()[REG_RIP]), code_at);
  EXPECT_EQ(attention.load(), os::attention_raised) << "it is still to be served";
  immediate_exit = 1;
  attention = 0;
  go();
  EXPECT_EQ(process.signal(), unsigned(HostProcess::kick_signal)) << "as a handler of this thread would have it";
}

TEST_F(Process, SegmentBasesAreItsOwn) {
  process.fs_base() = 0x1111111111;
  process.gs_base() = 0x2222222222;
  run({0xf3, 0x48, 0x0f, 0xae, 0xc0, 0xf3, 0x48, 0x0f, 0xae, 0xcb, 0x0f, 0x0b});  // rdfsbase rax ; rdgsbase rbx ; ud2
  EXPECT_EQ(registers()[REG_RAX], 0x1111111111);
  EXPECT_EQ(registers()[REG_RBX], 0x2222222222);
  EXPECT_EQ(process.fs_base(), 0x1111111111u);
}

TEST_F(Process, TheTimeStampCounterIsNotRead) {
  run({0x0f, 0x31});
  EXPECT_EQ(process.signal(), unsigned(SIGSEGV));
  EXPECT_EQ(registers()[REG_TRAPNO], 13);
}

TEST_F(Process, AnotherOneStartsInItsPlace) {
  process.end();
  EXPECT_FALSE(process.running());
  ASSERT_TRUE(process.start(zygote));
  process.map(code_at, page_size, PROT_READ | PROT_EXEC, file, 0);
  run({0x0f, 0x0b});
  EXPECT_EQ(process.signal(), unsigned(SIGILL));
  EXPECT_EQ(u64(registers()[REG_RIP]), code_at);
}

TEST_F(Process, ManyMappingsAreMade) {
  constexpr u64 pages = 3 * Commands::most;
  for (u64 n = 0; n < pages; ++n)
    process.map(data_at + 2 * n * page_size, page_size, PROT_READ | PROT_WRITE, file, page_size);
  registers()[REG_RDI] = greg_t(data_at + 2 * (pages - 1) * page_size);
  registers()[REG_RSI] = greg_t(data_at);
  memory[page_size] = 7;
  run({0xfe, 0x07, 0xfe, 0x06, 0x0f, 0x0b});  // inc byte [rdi] ; inc byte [rsi] ; ud2
  EXPECT_EQ(process.signal(), unsigned(SIGILL));
  EXPECT_EQ(memory[page_size], 9);
}

}  // namespace
}  // namespace anykvm::engine::direct
