// write(2) until everything is written.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <string_view>

namespace anykvm::os {

/// false: an error, and errno says which; part of the text may have been written.
inline bool write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written > 0)
      text.remove_prefix(static_cast<std::size_t>(written));
    else if (written == 0 || errno != EINTR)
      return false;
  }
  return true;
}

}  // namespace anykvm::os
