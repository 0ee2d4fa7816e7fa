// libanykvm-preload.so: the calls by which an unmodified client changes its memory. What concerns guest RAM that was
// moved to a file goes to os/client_ram.h; for everything else these are the system calls, and a comparison.
#undef _FORTIFY_SOURCE
#include <sys/mman.h>

#include <cstdarg>

#include "os/client_ram.h"
#include "preload/result.h"

namespace os = anykvm::os;

namespace {

[[gnu::constructor]] void watch() { os::watch_client_ram(); }

void* as_address(long result) {
  if (result < 0 && result > -4096) {
    errno = static_cast<int>(-result);
    return MAP_FAILED;
  }
  return reinterpret_cast<void*>(result);
}

}  // namespace

#define INTERPOSED extern "C" [[gnu::visibility("default")]]

INTERPOSED int madvise(void* begin, size_t size, int advice) noexcept {
  return anykvm::preload::as_libc(os::client_madvise(begin, size, advice));
}
INTERPOSED int munmap(void* begin, size_t size) noexcept {
  return anykvm::preload::as_libc(os::client_munmap(begin, size));
}
INTERPOSED int mprotect(void* begin, size_t size, int protection) noexcept {
  return anykvm::preload::as_libc(os::client_mprotect(begin, size, protection));
}
INTERPOSED void* mmap(void* begin, size_t size, int protection, int flags, int fd, off_t offset) noexcept {
  return as_address(os::client_mmap(begin, size, protection, flags, fd, offset));
}
INTERPOSED void* mmap64(void* begin, size_t size, int protection, int flags, int fd, off64_t offset) noexcept {
  return as_address(os::client_mmap(begin, size, protection, flags, fd, offset));
}
INTERPOSED void* mremap(void* old, size_t old_size, size_t size, int flags, ...) noexcept {
  void* wanted = nullptr;
  if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
    va_list rest;
    va_start(rest, flags);
    wanted = va_arg(rest, void*);
    va_end(rest);
  }
  return as_address(os::client_mremap(old, old_size, size, flags, wanted));
}
