// What goes through the guest's kernel: system calls, switches between processes, page tables, faults, signals.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "workload.h"

static void fail(const char* what) {
  perror(what);
  exit(1);
}

static uint64_t getppid_loop(long repetitions) {
  const long parent = getppid();
  uint64_t right = 0;
  while (repetitions-- > 0) right += syscall(SYS_getppid) == parent;
  return right;
}

static int wait_for(pid_t child) {
  int status;
  if (waitpid(child, &status, 0) != child) fail("waitpid");
  return status;
}

static uint64_t ping_pong(long repetitions) {
  int there[2], back[2];
  if (pipe(there) || pipe(back)) fail("pipe");
  const pid_t child = fork();
  if (child < 0) fail("fork");
  uint64_t word = 1;
  if (child == 0) {
    for (long i = 0; i < repetitions; ++i) {
      if (read(there[0], &word, sizeof word) != sizeof word) _exit(1);
      word = word * 31 + i;
      if (write(back[1], &word, sizeof word) != sizeof word) _exit(1);
    }
    _exit(0);
  }
  for (long i = 0; i < repetitions; ++i) {
    if (write(there[1], &word, sizeof word) != sizeof word) fail("write");
    if (read(back[0], &word, sizeof word) != sizeof word) fail("read");
  }
  return word + wait_for(child);
}

static uint64_t fork_loop(long repetitions) {
  // A few pages of its own for each child to copy.
  enum { pages = 16 };
  static char memory[pages << 12];
  uint64_t sum = 0;
  for (long i = 0; i < repetitions; ++i) {
    for (int page = 0; page < pages; ++page) memory[page << 12] = i + page;
    const pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
      memory[0] += 1;
      _exit((memory[0] + memory[(pages - 1) << 12]) & 0x7f);
    }
    sum = sum * 31 + WEXITSTATUS(wait_for(child));
  }
  return sum;
}

static const char* self;

/// Starts this program again, which exits at once with the status that it is told.
static uint64_t exec_loop(long repetitions) {
  uint64_t sum = 0;
  for (long i = 0; i < repetitions; ++i) {
    char status[8];
    snprintf(status, sizeof status, "%d", (int)(i & 0x7f));
    char* arguments[] = {(char*)self, "exit", status, NULL};
    pid_t child;
    if (posix_spawn(&child, self, NULL, NULL, arguments, NULL)) fail("posix_spawn");
    sum = sum * 31 + WEXITSTATUS(wait_for(child));
  }
  return sum;
}

static uint64_t exit_with(long status) { exit(status); }

static uint64_t faults(long repetitions) {
  enum { pages = 512 };
  uint64_t sum = 0;
  while (repetitions-- > 0) {
    char* memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    madvise(memory, pages << 12, MADV_NOHUGEPAGE);  // one fault a page, whatever the kernel's setting
    for (int page = 0; page < pages; ++page) sum += memory[page << 12]++ == 0;
    munmap(memory, pages << 12);
  }
  return sum;
}

static volatile uint64_t taken;
static void take(int number) { taken += number; }

static uint64_t signals(long repetitions) {
  struct sigaction action = {.sa_handler = take};
  if (sigaction(SIGUSR1, &action, NULL)) fail("sigaction");
  while (repetitions-- > 0) raise(SIGUSR1);
  return taken;
}

int main(int argc, char** argv) {
  static const struct workload workloads[] = {{"getppid", getppid_loop}, {"pipe", ping_pong}, {"fork", fork_loop},
                                              {"exec", exec_loop},       {"faults", faults},  {"signals", signals},
                                              {"exit", exit_with}};
  self = argv[0];
  return RUN_WORKLOAD(workloads);
}
