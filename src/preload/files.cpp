// The calls of an unmodified client that look at a path without a descriptor: is there a /dev/kvm, may I use it, what
// do the kvm modules' parameters say. libc's own calls among each other cannot be interposed, so fopen() is here as
// well.
#undef _FORTIFY_SOURCE
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "os/memory_file.h"
#include "preload/kvm_paths.h"
#include "preload/result.h"

extern "C" FILE* _IO_fopen(const char*, const char*);

namespace anykvm::preload {
namespace {

bool ours(const KvmPath& path) { return path.kind != PathKind::foreign; }

int stat_any(const char* path, struct stat* out, int folder, int flags) {
  const KvmPath found = find_kvm_path(path);
  if (!ours(found)) return static_cast<int>(syscall(SYS_newfstatat, folder, path, out, flags));
  return as_libc(stat_kvm_path(found, *out));
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
  const KvmPath found = find_kvm_path(path);
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

INTERPOSED int access(const char* path, int mode) noexcept {
  const KvmPath found = find_kvm_path(path);
  return ours(found) ? as_libc(access_kvm_path(found, mode)) : static_cast<int>(syscall(SYS_access, path, mode));
}

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
// What programs linked against a glibc before 2.33 call.
INTERPOSED int __xstat(int, const char* path, struct stat* out) noexcept { return stat_any(path, out, AT_FDCWD, 0); }
INTERPOSED int __xstat64(int, const char* path, struct stat64* out) noexcept {
  return stat_any(path, plain(out), AT_FDCWD, 0);
}

INTERPOSED int statx(int folder, const char* path, int flags, unsigned mask, struct statx* out) noexcept {
  const KvmPath found = find_kvm_path(path);
  if (ours(found)) return as_libc(statx_ours(found, *out));
  return static_cast<int>(syscall(SYS_statx, folder, path, flags, mask, out));
}

INTERPOSED FILE* fopen(const char* path, const char* mode) { return fopen_any(path, mode); }
INTERPOSED FILE* fopen64(const char* path, const char* mode) { return fopen_any(path, mode); }
