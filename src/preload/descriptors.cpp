// libanykvm-preload.so: the calls of an unmodified client that make, use and end descriptors. What concerns /dev/kvm
// and the descriptors made from it goes to abi/; everything else to libc or the kernel, as if this were not here.
//
// ioctl() is the KVM_RUN path: no allocation, no lock, no other library call. A foreign descriptor costs one look into
// a table. libc is reached by the names that nobody interposes, where it exports such a name; they keep open, close and
// fcntl cancellation points.
#undef _FORTIFY_SOURCE  // its inline open() would be defined twice
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>

#include "abi/abi.h"
#include "anykvm/kvm.h"
#include "os/client_ram.h"
#include "os/process_identity.h"
#include "os/user_memory.h"
#include "preload/kvm_paths.h"
#include "preload/result.h"

extern "C" {
int __open64(const char*, int, ...);
int __close(int);
int __fcntl(int, int, ...);
int _IO_fclose(FILE*);
}

namespace anykvm::preload {
namespace {

/// open and its kind read their third argument only when they may create a file.
bool has_mode(int flags) { return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE; }

#define MODE_ARGUMENT(mode, flags) \
  mode_t mode = 0;                 \
  if (has_mode(flags)) {           \
    va_list rest;                  \
    va_start(rest, flags);         \
    mode = va_arg(rest, mode_t);   \
    va_end(rest);                  \
  }

int open_any(const char* path, int flags, mode_t mode) {
  const KvmPath ours = find_kvm_path(AT_FDCWD, path);
  if (ours.kind != PathKind::foreign) return as_libc(open_kvm_path(ours, flags));
  return __open64(path, flags, mode);
}

int openat_any(int folder, const char* path, int flags, mode_t mode) {
  const KvmPath ours = find_kvm_path(folder, path);
  if (ours.kind != PathKind::foreign) return as_libc(open_kvm_path(ours, flags));
  return static_cast<int>(syscall(SYS_openat, folder, path, flags, mode));
}

/// A vfork child is recognised by its process id, which the parent's must be known for.
[[gnu::constructor]] void know_this_process() {
  os::process_identity();
  pthread_atfork(nullptr, nullptr, [] { os::process_identity(); });
}

/// After the kernel has made copy from fd: it means the same to us.
int adopt(int fd, int copy) {
  if (copy >= 0 && copy != fd && (abi::owns(fd) || abi::owns(copy)) && !os::in_vfork_child())
    abi::adopt_duplicate(fd, copy);
  return copy;
}

/// Before somebody else closes them.
void forget(unsigned first, unsigned last) {
  if (!os::in_vfork_child()) abi::forget(first, last);
}

long ioctl_of_unknown(int fd, unsigned long request, unsigned long argument) {
  if (request == UFFDIO_REGISTER)
    if (uffdio_register watched; os::get_user(watched, argument))
      os::client_watches_faults(watched.range.start, watched.range.len);
  if (_IOC_TYPE(request) == KVMIO) {
    const int adopted = abi::adopt_unknown(fd);
    if (adopted == 0) return as_libc(abi::ioctl(fd, request, argument));
    if (adopted != -EBADF) return as_libc(adopted);
  }
  return syscall(SYS_ioctl, fd, request, argument);
}

}  // namespace
}  // namespace anykvm::preload

using namespace anykvm::preload;
namespace abi = anykvm::abi;
namespace os = anykvm::os;

#define INTERPOSED extern "C" [[gnu::visibility("default")]]

INTERPOSED int open(const char* path, int flags, ...) {
  MODE_ARGUMENT(mode, flags);
  return open_any(path, flags, mode);
}
INTERPOSED int open64(const char* path, int flags, ...) {
  MODE_ARGUMENT(mode, flags);
  return open_any(path, flags, mode);
}
INTERPOSED int creat(const char* path, mode_t mode) { return open_any(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
INTERPOSED int creat64(const char* path, mode_t mode) { return open_any(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
INTERPOSED int openat(int folder, const char* path, int flags, ...) {
  MODE_ARGUMENT(mode, flags);
  return openat_any(folder, path, flags, mode);
}
INTERPOSED int openat64(int folder, const char* path, int flags, ...) {
  MODE_ARGUMENT(mode, flags);
  return openat_any(folder, path, flags, mode);
}
// What a client built with _FORTIFY_SOURCE calls.
INTERPOSED int __open_2(const char* path, int flags) { return open_any(path, flags, 0); }
INTERPOSED int __open64_2(const char* path, int flags) { return open_any(path, flags, 0); }
INTERPOSED int __openat_2(int folder, const char* path, int flags) { return openat_any(folder, path, flags, 0); }
INTERPOSED int __openat64_2(int folder, const char* path, int flags) { return openat_any(folder, path, flags, 0); }

// Not noexcept, as its declaration is: a thread that is cancelled in KVM_RUN unwinds through it.
INTERPOSED int interposed_ioctl(int fd, unsigned long request, ...) asm("ioctl");
int interposed_ioctl(int fd, unsigned long request, ...) {
  va_list rest;
  va_start(rest, request);
  const unsigned long argument = va_arg(rest, unsigned long);
  va_end(rest);
  const long result = abi::ioctl(fd, request, argument);
  if (result >= 0) return static_cast<int>(result);
  // EBADF is also what a call of ours may answer, about another descriptor that it was given.
  if (result == -EBADF && !abi::owns(fd)) return static_cast<int>(ioctl_of_unknown(fd, request, argument));
  return as_libc(result);
}

INTERPOSED int close(int fd) {
  if (abi::owns(fd) && !os::in_vfork_child() && abi::close(fd) == 0) return 0;
  return __close(fd);
}

INTERPOSED int close_range(unsigned first, unsigned last, int flags) noexcept {
  const bool closes = first <= last && (flags & ~CLOSE_RANGE_UNSHARE) == 0;
  if (closes) forget(first, last);
  return static_cast<int>(syscall(SYS_close_range, first, last, flags));
}

INTERPOSED void closefrom(int first) noexcept {
  const unsigned low = first < 0 ? 0 : static_cast<unsigned>(first);
  forget(low, UINT_MAX);
  if (syscall(SYS_close_range, low, UINT_MAX, 0) == 0) return;
  // Before Linux 5.9.
  const int end = static_cast<int>(sysconf(_SC_OPEN_MAX));
  for (int fd = static_cast<int>(low); fd < end; ++fd) __close(fd);
}

// fdopen() makes a stream of any descriptor.
INTERPOSED int fclose(FILE* file) {
  const int error = errno;
  if (const int fd = fileno(file); fd >= 0 && abi::owns(fd))
    forget(static_cast<unsigned>(fd), static_cast<unsigned>(fd));
  errno = error;
  return _IO_fclose(file);
}

INTERPOSED int dup(int fd) noexcept { return adopt(fd, static_cast<int>(syscall(SYS_dup, fd))); }
INTERPOSED int dup2(int fd, int copy) noexcept { return adopt(fd, static_cast<int>(syscall(SYS_dup2, fd, copy))); }
INTERPOSED int dup3(int fd, int copy, int flags) noexcept {
  return adopt(fd, static_cast<int>(syscall(SYS_dup3, fd, copy, flags)));
}

namespace {
int fcntl_any(int fd, int command, unsigned long argument) {
  const int result = __fcntl(fd, command, argument);
  return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? adopt(fd, result) : result;
}
}  // namespace

INTERPOSED int fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  const unsigned long argument = va_arg(rest, unsigned long);
  va_end(rest);
  return fcntl_any(fd, command, argument);
}
INTERPOSED int fcntl64(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  const unsigned long argument = va_arg(rest, unsigned long);
  va_end(rest);
  return fcntl_any(fd, command, argument);
}
