// Descriptors and what they stand for, without any machine behind them.
#include "abi/fd_table.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "abi/descriptor_file.h"
#include "abi/vm_file.h"
#include "os/memory_file.h"
#include "os/process_identity.h"

namespace anykvm::abi {
namespace {

int new_fd() { return os::create_memory_file("test", 0); }

/// Something that says when it goes.
std::shared_ptr<VmFile> kept(std::atomic<int>& gone) {
  return {new VmFile(nullptr), [&gone](VmFile* file) {
            delete file;
            ++gone;
          }};
}

bool is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

TEST(FdTable, ADescriptorHasAMeaningFromInstallToClose) {
  const int fd = new_fd();
  EXPECT_FALSE(FileReference(fd));
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  {
    const FileReference file(fd);
    ASSERT_TRUE(file);
    EXPECT_EQ(FdKind::vm, file->kind);
    EXPECT_EQ(os::process_identity(), file->process);
  }
  EXPECT_EQ(0, gone);
  EXPECT_EQ(0, close_descriptor(fd));
  EXPECT_EQ(1, gone);
  EXPECT_FALSE(is_open(fd));
  EXPECT_FALSE(FileReference(fd));
  EXPECT_EQ(-EBADF, close_descriptor(fd));
}

TEST(FdTable, ForeignNumbersAreNotOurs) {
  for (const int fd : {-1, 0, 1, 2, 4095, 4096, 1 << 24, 0x7fffffff}) {
    EXPECT_FALSE(FileReference(fd)) << fd;
    EXPECT_EQ(-EBADF, close_descriptor(fd)) << fd;
  }
  EXPECT_EQ(-EMFILE, install_descriptor(1 << 24, {FdKind::system}));
}

TEST(FdTable, WhatIsForgottenEndsAndStaysOpen) {
  std::atomic<int> gone{0};
  const int fds[] = {new_fd(), new_fd(), new_fd()};
  for (const int fd : fds) ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  forget_descriptors(static_cast<u32>(fds[1]), static_cast<u32>(fds[1]));
  EXPECT_EQ(1, gone);
  EXPECT_TRUE(FileReference(fds[0]) && FileReference(fds[2]));
  forget_descriptors(3, ~u32{0});
  EXPECT_EQ(3, gone);
  for (const int fd : fds) {
    EXPECT_FALSE(FileReference(fd));
    EXPECT_TRUE(is_open(fd));
    os::close_file(fd);
  }
}

TEST(FdTable, AnUnknownDuplicateIsFoundByItsFile) {
  std::atomic<int> gone{0};
  const int fd = new_fd(), other = new_fd(), copy = ::dup(fd);
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  EXPECT_EQ(-EBADF, install_by_number(other, file_number(other)));
  EXPECT_EQ(0, install_by_number(copy, file_number(copy)));
  EXPECT_EQ(0, close_descriptor(fd));
  EXPECT_EQ(0, gone);
  EXPECT_EQ(0, close_descriptor(copy));
  EXPECT_EQ(1, gone);
  EXPECT_EQ(-EBADF, install_by_number(other, file_number(other)));
  os::close_file(other);
}

TEST(FdTable, AMarkSaysWhatTheFileIs) {
  for (const FdKind kind : {FdKind::system, FdKind::vm, FdKind::vcpu}) {
    const int fd = create_descriptor_file("test", kind, kind == FdKind::vcpu ? page_size : 0);
    FdKind read = FdKind::system;
    EXPECT_TRUE(read_mark(fd, read));
    EXPECT_EQ(kind, read);
    os::close_file(fd);
  }
  const int fd = new_fd();
  FdKind kind;
  EXPECT_FALSE(read_mark(fd, kind));
  EXPECT_FALSE(read_mark(-1, kind));
  EXPECT_FALSE(read_mark(STDIN_FILENO, kind));
  os::close_file(fd);
}

TEST(FdTable, ACallInFlightKeepsTheFile) {
  const int fd = new_fd();
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  {
    const FileReference in_flight(fd);
    EXPECT_EQ(0, close_descriptor(fd));
    EXPECT_EQ(0, gone);
    EXPECT_FALSE(FileReference(fd));
  }
  EXPECT_EQ(1, gone);
}

TEST(FdTable, DuplicatesShareOneFile) {
  const int fd = new_fd(), copy = dup(fd);
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  ASSERT_EQ(0, install_duplicate(fd, copy));
  EXPECT_EQ(&*FileReference(fd), &*FileReference(copy));
  EXPECT_EQ(0, close_descriptor(fd));
  EXPECT_EQ(0, gone);
  EXPECT_TRUE(FileReference(copy));
  EXPECT_EQ(0, close_descriptor(copy));
  EXPECT_EQ(1, gone);
}

TEST(FdTable, ADuplicateOfSomethingElseLosesItsMeaning) {
  const int fd = new_fd();
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  ASSERT_EQ(fd, dup2(0, fd));
  EXPECT_EQ(-EBADF, install_duplicate(0, fd));
  EXPECT_EQ(1, gone);
  EXPECT_FALSE(FileReference(fd));
  close(fd);
}

TEST(FdTable, ANumberClosedBehindOurBackIsTakenOver) {
  const int fd = new_fd();
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  close(fd);
  const int again = new_fd();
  ASSERT_EQ(fd, again);
  ASSERT_EQ(0, install_descriptor(again, {FdKind::system}));
  EXPECT_EQ(1, gone);
  EXPECT_EQ(FdKind::system, FileReference(again)->kind);
  close_descriptor(again);
}

TEST(FdTable, AForkedChildIsAnotherProcessAndTakesNothingApart) {
  const int fd = new_fd();
  std::atomic<int> gone{0};
  ASSERT_EQ(0, install_descriptor(fd, {FdKind::vm, nullptr, nullptr, kept(gone)}));
  const u64 identity = os::process_identity();
  const pid_t child = fork();
  if (child == 0) {
    bool good = os::process_identity() != identity && os::process_identity() == os::process_identity();
    good = good && FileReference(fd)->process == identity;
    good = good && close_descriptor(fd) == 0 && gone == 0 && !is_open(fd);
    const int own = new_fd();
    good = good && install_descriptor(own, {FdKind::vm, nullptr, nullptr, kept(gone)}) == 0;
    good = good && FileReference(own)->process == os::process_identity();
    good = good && close_descriptor(own) == 0 && gone == 1;
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(0, status);
  EXPECT_EQ(identity, os::process_identity());
  EXPECT_EQ(0, close_descriptor(fd));
  EXPECT_EQ(1, gone);
}

TEST(FdTable, LookUpRacesWithCloseAndReuse) {
  // Two threads make and close files at the same few numbers; four look them up and check that what they hold is whole:
  // the pointer that was installed with the kind, and still kept.
  constexpr int numbers = 4, rounds = 20'000;
  int fds[numbers];
  for (int& fd : fds) fd = new_fd();
  std::atomic<int> gone{0}, installed{0};
  std::atomic<bool> stop{false};
  std::atomic<long> found{0}, wrong{0};
  int machines[2];
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (unsigned n = t; !stop; ++n) {
        const FileReference file(fds[n % numbers]);
        if (!file) continue;
        ++found;
        const bool is_vm = file->kind == FdKind::vm;
        if (file->vm != reinterpret_cast<vm::Vm*>(&machines[is_vm]) || !file->keeps) ++wrong;
      }
    });
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&, t] {
      for (int n = 0; n < rounds; ++n) {
        const bool is_vm = (n + t) & 1;
        ++installed;
        install_descriptor(
            fds[(n * 7 + t) % numbers],
            {is_vm ? FdKind::vm : FdKind::vcpu, reinterpret_cast<vm::Vm*>(&machines[is_vm]), nullptr, kept(gone)});
        if (n % 3 == 0) install_duplicate(-1, fds[n % numbers]);
      }
    });
  threads[4].join();
  threads[5].join();
  stop = true;
  for (int t = 0; t < 4; ++t) threads[t].join();
  for (const int fd : fds) close_descriptor(fd);
  for (const int fd : fds) close(fd);
  EXPECT_EQ(0, wrong);
  EXPECT_GT(found, 0);
  EXPECT_EQ(installed, gone);
}

}  // namespace
}  // namespace anykvm::abi
