/* Preloaded in front of the interposer: looks at what KVM_RUN does on the thread that calls it. Allocations, and signal
 * handlers of the client's that run while a lock of KVM_RUN's is held, end the program with exit code 9 when it ends,
 * and are told on stderr with where they came from; so do fewer calls of KVM_RUN than RUN_PATH_LEAST says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

enum { most_frames = 24, most_findings = 16 };

static __thread int in_run, held;
static atomic_ulong runs;
static atomic_int findings;
static struct {
  const char* what;
  void* frames[most_frames];
  int depth;
} found[most_findings];

static void tell(const char* what) {
  in_run = 0; /* backtrace() may allocate */
  int index = atomic_fetch_add(&findings, 1);
  if (index < most_findings) {
    found[index].what = what;
    found[index].depth = backtrace(found[index].frames, most_frames);
  }
  in_run = 1;
}

static void watch(const char* what) {
  if (in_run) tell(what);
}

void* malloc(size_t size) {
  watch("malloc");
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  watch("calloc");
  return __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) {
  watch("realloc");
  return __libc_realloc(old, size);
}
void* memalign(size_t alignment, size_t size) {
  watch("memalign");
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  watch("aligned_alloc");
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** out, size_t alignment, size_t size) {
  watch("posix_memalign");
  *out = __libc_memalign(alignment, size);
  return *out ? 0 : 12;
}
void free(void* old) {
  if (old) watch("free");
  __libc_free(old);
}

static int (*next_lock)(pthread_mutex_t*);
static int (*next_unlock)(pthread_mutex_t*);
static int (*next_sigaction)(int, const struct sigaction*, struct sigaction*);
static int (*next_ioctl)(int, unsigned long, ...);

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  if (!next_lock) next_lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
  int result = next_lock(mutex);
  if (in_run && result == 0) ++held;
  return result;
}
int pthread_mutex_unlock(pthread_mutex_t* mutex) {
  if (!next_unlock) next_unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
  if (in_run) --held;
  return next_unlock(mutex);
}

static struct sigaction wanted[NSIG];

static void handler(int signal, siginfo_t* info, void* context) {
  const int running = in_run;
  if (running && held) tell("a signal handler with a lock held");
  in_run = 0;
  wanted[signal].sa_sigaction(signal, info, context); /* the arguments that sa_handler does not take do no harm */
  in_run = running;
}
int sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction before = wanted[signal], ours;
  if (action && action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN) {
    ours = wanted[signal] = *action;
    ours.sa_sigaction = handler;
    ours.sa_flags |= SA_SIGINFO;
    action = &ours;
  }
  int result = next_sigaction(signal, action, old);
  if (result == 0 && old && old->sa_sigaction == handler) *old = before;
  return result;
}

int ioctl(int fd, unsigned long request, ...) {
  va_list rest;
  va_start(rest, request);
  unsigned long argument = va_arg(rest, unsigned long);
  va_end(rest);
  if (request != KVM_RUN) return next_ioctl(fd, request, argument);
  atomic_fetch_add(&runs, 1);
  held = 0;
  in_run = 1;
  int result = next_ioctl(fd, request, argument);
  in_run = 0;
  return result;
}

static void report(void) {
  const char* least = getenv("RUN_PATH_LEAST");
  if (least && runs < strtoul(least, NULL, 10)) {
    dprintf(STDERR_FILENO, "KVM_RUN was called %lu times\n", (unsigned long)runs);
    _exit(9);
  }
  for (int i = 0; i < findings && i < most_findings; ++i) {
    dprintf(STDERR_FILENO, "in KVM_RUN: %s\n", found[i].what);
    backtrace_symbols_fd(found[i].frames, found[i].depth, STDERR_FILENO);
  }
  if (findings) _exit(9);
}

__attribute__((constructor)) static void begin(void) {
  void* frames[1];
  backtrace(frames, 1); /* it loads a library the first time */
  next_ioctl = dlsym(RTLD_NEXT, "ioctl");
  atexit(report);
}
