// From this library's results to libc's.
#pragma once

#include <cerrno>

namespace anykvm::preload {

/// >= 0 as it is; -errno as -1 with errno set.
inline int as_libc(long result) {
  if (result >= 0) return static_cast<int>(result);
  errno = static_cast<int>(-result);
  return -1;
}

}  // namespace anykvm::preload
