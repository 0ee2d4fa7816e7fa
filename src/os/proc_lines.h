// The lines of a file of /proc, without allocation.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>

#include "os/memory_file.h"

namespace anykvm::os {

/// Calls each(line) with the lines of a file, without their ends, until that returns false. Lines of 8 KiB and more are
/// told in parts. false: the file cannot be opened.
template <class Each>
bool for_each_line(const char* path, Each each) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char buffer[8192];
  std::size_t filled = 0;
  for (bool more = true; more;) {
    const ssize_t got = read(fd, buffer + filled, sizeof buffer - 1 - filled);
    if (got > 0) filled += std::size_t(got);
    if (got <= 0 || filled == sizeof buffer - 1) buffer[filled++] = '\n';
    more = got > 0;
    char* line = buffer;
    while (char* const end = static_cast<char*>(std::memchr(line, '\n', filled - std::size_t(line - buffer)))) {
      *end = 0;
      if (!each(static_cast<const char*>(line))) {
        close_file(fd);
        return true;
      }
      line = end + 1;
    }
    filled -= std::size_t(line - buffer);
    std::memmove(buffer, line, filled);
  }
  close_file(fd);
  return true;
}

}  // namespace anykvm::os
