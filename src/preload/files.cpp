// The calls of an unmodified client that look at a path without a descriptor: is there a /dev/kvm, may I use it, what
// do the kvm modules' parameters say. libc's own calls among each other cannot be interposed, so fopen() is here as
// well.
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "abi/abi.h"
#include "os/memory_file.h"
#include "preload/kvm_paths.h"
#include "preload/result.h"

extern "C" FILE* _IO_fopen(const char*, const char*);

namespace anykvm::preload {
namespace {

/// libc emulates its flags where the kernel has none, and exports it by no other name.
auto next_faccessat() {
  using Call = int (*)(int, const char*, int, int);
  static constinit std::atomic<Call> known{nullptr};
  Call call = known.load(std::memory_order_relaxed);
  if (!call) known.store(call = reinterpret_cast<Call>(dlsym(RTLD_NEXT, "faccessat")), std::memory_order_relaxed);
  return call;
}

bool ours(const KvmPath& path) { return path.kind != PathKind::foreign; }

/// The path, or with AT_EMPTY_PATH the descriptor.
KvmPath find(int folder, const char* path, int flags) {
  if ((flags & AT_EMPTY_PATH) && path && !*path && abi::is_system(folder)) return {PathKind::device, {}};
  return find_kvm_path(folder, path);
}

int stat_any(const char* path, struct stat* out, int folder, int flags) {
  const KvmPath found = find(folder, path, flags);
  if (!ours(found)) return static_cast<int>(syscall(SYS_newfstatat, folder, path, out, flags));
  return as_libc(stat_kvm_path(found, *out));
}

int fstat_any(int fd, struct stat* out) {
  if (!abi::is_system(fd)) return static_cast<int>(syscall(SYS_fstat, fd, out));
  return as_libc(stat_kvm_path({PathKind::device, {}}, *out));
}

int access_any(int folder, const char* path, int mode, int flags) {
  const KvmPath found = find_kvm_path(folder, path);
  if (ours(found)) return as_libc(access_kvm_path(found, mode));
  if (flags == 0) return static_cast<int>(syscall(SYS_faccessat, folder, path, mode));
  return next_faccessat()(folder, path, mode, flags);
}

// On x86-64 the two are one structure under two names.
static_assert(sizeof(struct stat) == sizeof(struct stat64));
struct stat* plain(struct stat64* out) {
  return reinterpret_cast<struct stat*>(out);
}

int statx_ours(const KvmPath& path, struct statx& out) {
  struct stat status;
  if (const int error = stat_kvm_path(path, status)) return error;
  out = {};
  out.stx_mask = STATX_TYPE | STATX_MODE | STATX_NLINK | STATX_UID | STATX_GID | STATX_SIZE;
  out.stx_blksize = static_cast<__u32>(status.st_blksize);
  out.stx_nlink = 1;
  out.stx_mode = static_cast<__u16>(status.st_mode);
  out.stx_size = static_cast<__u64>(status.st_size);
  out.stx_rdev_major = static_cast<__u32>(status.st_rdev >> 8 & 0xfff);
  out.stx_rdev_minor = static_cast<__u32>(status.st_rdev & 0xff);
  return 0;
}

FILE* fopen_any(const char* path, const char* mode) {
  const KvmPath found = find_kvm_path(AT_FDCWD, path);
  if (!ours(found)) return _IO_fopen(path, mode);
  const bool reads = mode[0] == 'r' && !std::strchr(mode, '+');
  const int fd = as_libc(open_kvm_path(found, (reads ? O_RDONLY : O_RDWR) | (std::strchr(mode, 'e') ? O_CLOEXEC : 0)));
  if (fd < 0) return nullptr;
  FILE* file = fdopen(fd, mode);
  if (!file) os::close_file(fd);
  return file;
}

}  // namespace
}  // namespace anykvm::preload

using namespace anykvm::preload;

#define INTERPOSED extern "C" [[gnu::visibility("default")]]

INTERPOSED int access(const char* path, int mode) noexcept { return access_any(AT_FDCWD, path, mode, 0); }
INTERPOSED int faccessat(int folder, const char* path, int mode, int flags) noexcept {
  return access_any(folder, path, mode, flags);
}
INTERPOSED int eaccess(const char* path, int mode) noexcept { return access_any(AT_FDCWD, path, mode, AT_EACCESS); }
INTERPOSED int euidaccess(const char* path, int mode) noexcept { return access_any(AT_FDCWD, path, mode, AT_EACCESS); }

INTERPOSED int stat(const char* path, struct stat* out) noexcept { return stat_any(path, out, AT_FDCWD, 0); }
INTERPOSED int stat64(const char* path, struct stat64* out) noexcept { return stat_any(path, plain(out), AT_FDCWD, 0); }
INTERPOSED int lstat(const char* path, struct stat* out) noexcept {
  return stat_any(path, out, AT_FDCWD, AT_SYMLINK_NOFOLLOW);
}
INTERPOSED int lstat64(const char* path, struct stat64* out) noexcept {
  return stat_any(path, plain(out), AT_FDCWD, AT_SYMLINK_NOFOLLOW);
}
INTERPOSED int fstatat(int folder, const char* path, struct stat* out, int flags) noexcept {
  return stat_any(path, out, folder, flags);
}
INTERPOSED int fstatat64(int folder, const char* path, struct stat64* out, int flags) noexcept {
  return stat_any(path, plain(out), folder, flags);
}
INTERPOSED int fstat(int fd, struct stat* out) noexcept { return fstat_any(fd, out); }
INTERPOSED int fstat64(int fd, struct stat64* out) noexcept { return fstat_any(fd, plain(out)); }
// What programs linked against a glibc before 2.33 call.
INTERPOSED int __xstat(int, const char* path, struct stat* out) noexcept { return stat_any(path, out, AT_FDCWD, 0); }
INTERPOSED int __xstat64(int, const char* path, struct stat64* out) noexcept {
  return stat_any(path, plain(out), AT_FDCWD, 0);
}
INTERPOSED int __lxstat(int, const char* path, struct stat* out) noexcept {
  return stat_any(path, out, AT_FDCWD, AT_SYMLINK_NOFOLLOW);
}
INTERPOSED int __lxstat64(int, const char* path, struct stat64* out) noexcept {
  return stat_any(path, plain(out), AT_FDCWD, AT_SYMLINK_NOFOLLOW);
}
INTERPOSED int __fxstat(int, int fd, struct stat* out) noexcept { return fstat_any(fd, out); }
INTERPOSED int __fxstat64(int, int fd, struct stat64* out) noexcept { return fstat_any(fd, plain(out)); }
INTERPOSED int __fxstatat(int, int folder, const char* path, struct stat* out, int flags) noexcept {
  return stat_any(path, out, folder, flags);
}
INTERPOSED int __fxstatat64(int, int folder, const char* path, struct stat64* out, int flags) noexcept {
  return stat_any(path, plain(out), folder, flags);
}

INTERPOSED int statx(int folder, const char* path, int flags, unsigned mask, struct statx* out) noexcept {
  const KvmPath found = find(folder, path, flags);
  if (ours(found)) return as_libc(statx_ours(found, *out));
  return static_cast<int>(syscall(SYS_statx, folder, path, flags, mask, out));
}

INTERPOSED FILE* fopen(const char* path, const char* mode) { return fopen_any(path, mode); }
INTERPOSED FILE* fopen64(const char* path, const char* mode) { return fopen_any(path, mode); }
