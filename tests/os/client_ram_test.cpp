#include "os/client_ram.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "os/fault_guard.h"
#include "os/shared_mappings.h"

namespace anykvm::os {
namespace {

constexpr std::size_t size = 8 << 20, pages = size / page_size;

class ClientRam : public ::testing::Test {
 protected:
  u8* ram = nullptr;
  std::size_t length = size;

  void SetUp() override {
    watch_client_ram();
    ram = static_cast<u8*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(ram, MAP_FAILED);
    ASSERT_EQ(madvise(ram, size, MADV_DONTFORK), 0);
  }
  void TearDown() override { client_munmap(ram, length); }

  u8& page(std::size_t n) { return ram[n * page_size]; }
  void share(bool fresh = false) { share_client_ram(ram, size, fresh); }
  /// Descriptor of the file that all of it is in; -1: it is not.
  int file() {
    SharedMapping found[2];
    const unsigned count = find_shared_mappings(ram, ram + length, found, 2);
    return count == 1 && found[0].begin == ram && found[0].end == ram + length ? found[0].fd : -1;
  }
  /// Pages that the file has.
  std::size_t file_pages() {
    struct stat status;
    return fstat(file(), &status) == 0 ? std::size_t(status.st_blocks) * 512 / page_size : ~std::size_t(0);
  }
};

TEST_F(ClientRam, MovesWithItsContentsAndNothingElse) {
  page(3) = 33;
  page(pages - 1) = 44;
  page(7) = 0;  // the client may have allocated it on purpose
  const u64 before = client_ram_changes();
  share();
  ASSERT_GE(file(), 0) << client_ram_report().reason;
  EXPECT_NE(client_ram_changes(), before);
  EXPECT_EQ(file_pages(), 3u);
  EXPECT_EQ(page(3), 33);
  EXPECT_EQ(page(pages - 1), 44);
  EXPECT_EQ(page(4), 0);
  page(5) = 55;
  u8 read = 0;
  EXPECT_EQ(pread(file(), &read, 1, 5 * page_size), 1);
  EXPECT_EQ(read, 55);
  EXPECT_TRUE(may_be_mirrored(ram, ram + size));
  const int first = file();
  share();  // as often as a slot is made again
  EXPECT_EQ(file(), first);
}

TEST_F(ClientRam, HasZerosAfterDontneed) {
  std::memset(ram, 1, 8 * page_size);
  share();
  ASSERT_GE(file(), 0);
  page(9) = 2;
  for (const int advice : {MADV_DONTNEED, MADV_FREE, MADV_DONTNEED_LOCKED}) {
    page(2) = page(3) = 1;
    EXPECT_EQ(client_madvise(&page(2), 2 * page_size - 1, advice), 0) << advice;
    EXPECT_EQ(page(2) + page(3), 0) << advice;
    EXPECT_EQ(page(1) + page(4) + page(9), 4) << advice;
  }
  EXPECT_EQ(client_madvise(ram + 1, page_size, MADV_DONTNEED), -EINVAL);
}

TEST_F(ClientRam, StaysWhereAChildWouldInheritIt) {
  ASSERT_EQ(madvise(ram, size, MADV_DOFORK), 0);
  page(1) = 11;
  share();
  EXPECT_EQ(file(), -1);
  EXPECT_EQ(page(1), 11);
  EXPECT_NE(std::string(client_ram_report().reason).find("MADV_DONTFORK"), std::string::npos);
}

TEST_F(ClientRam, IsStillNotInherited) {
  share();
  ASSERT_GE(file(), 0);
  const pid_t child = fork();
  if (child == 0) {
    unsigned char there;
    _exit(mincore(ram, page_size, &there) != 0 && errno == ENOMEM ? 0 : 1);
  }
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(ClientRam, StaysWhereItIsNoOrdinaryMemory) {
  ASSERT_EQ(mprotect(&page(5), page_size, PROT_READ), 0);
  share();
  EXPECT_EQ(file(), -1);
  client_munmap(ram, size);
  ram = static_cast<u8*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_EQ(madvise(ram, size, MADV_DONTFORK), 0);
  if (mlock(ram, size) != 0) GTEST_SKIP() << "RLIMIT_MEMLOCK";
  share();
  EXPECT_EQ(file(), -1);
  ASSERT_EQ(munlock(ram, size), 0);
}

TEST_F(ClientRam, StaysWhereSomebodyMayHavePinnedIt) {
  page(1) = 11;
  share(true);
  EXPECT_EQ(file(), -1);
}

TEST_F(ClientRam, MovesWhileTheMachineRunsIfItIsEmpty) {
  share(true);
  EXPECT_GE(file(), 0);
}

TEST_F(ClientRam, StaysWhereThereIsNoFile) {
  page(1) = 11;
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = page_size;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  share();
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(file(), -1);
  page(2) = 22;
  EXPECT_EQ(page(1) + page(2), 33);
}

TEST_F(ClientRam, LosesNoStoreOfAnotherThread) {
  install_fault_handlers();
  std::atomic<bool> enough{false};
  u32 stored = 0;
  std::thread writer([&] {
    while (!enough) {
      for (std::size_t n = 0; n < pages; ++n) reinterpret_cast<std::atomic<u32>&>(page(n)).fetch_add(1);
      ++stored;
    }
  });
  while (reinterpret_cast<std::atomic<u32>&>(page(pages - 1)) == 0) std::this_thread::yield();
  share();
  const u32 then = reinterpret_cast<std::atomic<u32>&>(page(0));
  while (reinterpret_cast<std::atomic<u32>&>(page(0)) < then + 3) std::this_thread::yield();
  enough = true;
  writer.join();
  ASSERT_GE(file(), 0);
  for (std::size_t n = 0; n < pages; ++n) ASSERT_EQ(reinterpret_cast<u32&>(page(n)), stored) << n;
}

TEST_F(ClientRam, GivesItsFileBackWhenItIsUnmapped) {
  page(1) = 11;
  share();
  const int fd = file();
  ASSERT_GE(fd, 0);
  const u64 moved = client_ram_report().moved, before = client_ram_changes();
  ASSERT_EQ(client_munmap(ram, size / 2), 0);
  struct stat status;
  ASSERT_EQ(fstat(fd, &status), 0);
  EXPECT_EQ(status.st_blocks, 0);
  EXPECT_NE(client_ram_changes(), before);
  ASSERT_EQ(client_munmap(ram + size / 2, size / 2), 0);
  EXPECT_NE(fcntl(fd, F_GETFD), 0);
  EXPECT_EQ(client_ram_report().moved, moved - size);
}

TEST_F(ClientRam, LeavesAloneWhatIsMappedInItsPlace) {
  share();
  const int fd = memfd_create("the client's own", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, page_size), 0);
  const u64 before = client_ram_changes();
  ASSERT_EQ(client_mmap(&page(4), page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0), long(&page(4)));
  EXPECT_NE(client_ram_changes(), before);
  page(3) = page(4) = page(5) = 1;
  ASSERT_EQ(client_madvise(&page(3), 3 * page_size, MADV_DONTNEED), 0);
  EXPECT_EQ(page(3) + page(5), 0);
  EXPECT_EQ(page(4), 1);
  close(fd);
}

TEST_F(ClientRam, CanBeMovedAndGrow) {
  page(1) = 11;
  share();
  ASSERT_GE(file(), 0);
  EXPECT_EQ(client_mremap(ram, size, size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, nullptr), -EINVAL);
  const long there = client_mremap(ram, size, size + 4 * page_size, MREMAP_MAYMOVE, nullptr);
  ASSERT_GT(there, 0);
  ram = reinterpret_cast<u8*>(there);
  length = size + 4 * page_size;
  page(pages + 3) = 22;
  EXPECT_EQ(page(1) + page(pages + 3), 33);
  EXPECT_GE(file(), 0);
  ASSERT_EQ(client_madvise(ram, length, MADV_DONTNEED), 0);
  EXPECT_EQ(page(1) + page(pages + 3), 0);
  ASSERT_EQ(client_mremap(ram, length, size / 2, 0, nullptr), there);
  length = size / 2;
  EXPECT_GE(file(), 0);
}

TEST_F(ClientRam, IsNotForOthersOnceTheClientWatchesIt) {
  share();
  ASSERT_TRUE(may_be_mirrored(ram, ram + size));
  ASSERT_EQ(client_mprotect(&page(1), page_size, PROT_READ | PROT_WRITE), 0);
  EXPECT_TRUE(may_be_mirrored(ram, ram + size));
  ASSERT_EQ(client_mprotect(&page(1), page_size, PROT_READ), 0);
  EXPECT_FALSE(may_be_mirrored(ram, ram + size));
}

}  // namespace
}  // namespace anykvm::os
