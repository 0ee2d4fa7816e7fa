#include "os/run_delay.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "os/memory_file.h"

namespace anykvm::os {
namespace {

/// The kernel's id of a thread, from its CPU clock's, which glibc makes of it (man 2 timer_create has the encoding): no
/// system call.
int id_of(pthread_t thread) {
  clockid_t clock;
  return pthread_getcpuclockid(thread, &clock) == 0 ? ~(clock >> 3) : 0;
}

void replace(std::atomic<int>& file, int by) {
  if (const int old = file.exchange(by, std::memory_order_acq_rel); old >= 0) close_file(old);
}

}  // namespace

RunDelay::~RunDelay() {
  open_.cancel();
  replace(file_, -1);
}

/// Timer thread.
void RunDelay::open(void* self) {
  auto& delay = *static_cast<RunDelay*>(self);
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", delay.thread_id_.load(std::memory_order_acquire));
  const long file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (file >= 0) replace(delay.file_, static_cast<int>(file));
}

bool RunDelay::read(u64& ns) {
  const pthread_t self = pthread_self();
  if (!pthread_equal(thread_, self)) [[unlikely]] {
    thread_ = self;
    replace(file_, -1);
    thread_id_.store(id_of(self), std::memory_order_release);
    open_.arm(0);
    return false;
  }
  const int file = file_.load(std::memory_order_acquire);
  if (file < 0) return false;
  // "time on a CPU, time waiting for one, times scheduled"
  char text[80];
  const long size = syscall(SYS_pread64, file, text, sizeof text - 1, 0);
  if (size <= 0) return false;
  text[size] = 0;
  char *second, *end;
  std::strtoull(text, &second, 10);
  ns = std::strtoull(second, &end, 10);
  return end != second;
}

}  // namespace anykvm::os
