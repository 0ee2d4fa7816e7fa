#include "os/shared_mappings.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "os/proc_lines.h"

namespace anykvm::os {
namespace {

/// A descriptor of the file, open for reading and writing; -1: none.
int descriptor_of(dev_t device, ino_t inode) {
  constexpr int highest = 1 << 16, most_absent = 4096;
  for (int fd = 0, absent = 0; fd < highest && absent < most_absent; ++fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) {
      ++absent;
      continue;
    }
    if (status.st_dev == device && status.st_ino == inode && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR) return fd;
  }
  return -1;
}

}  // namespace

unsigned find_shared_mappings(const u8* begin, const u8* end, SharedMapping* found, unsigned most) {
  unsigned count = 0;
  for_each_line("/proc/self/maps", [&](const char* line) {
    unsigned long from, to, offset, inode;
    unsigned device_major, device_minor;
    char rights[5];
    if (std::sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &from, &to, rights, &offset, &device_major, &device_minor,
                    &inode) != 7)
      return true;
    auto* const first = std::max(reinterpret_cast<const u8*>(from), begin);
    auto* const last = std::min(reinterpret_cast<const u8*>(to), end);
    if (first >= last || std::strncmp(rights, "rw", 2) != 0 || rights[3] != 's' || inode == 0) return true;
    const int fd = descriptor_of(makedev(device_major, device_minor), inode);
    if (fd < 0) return true;
    const u64 at = offset + (u64(first) - from);
    if (count && found[count - 1].end == first && found[count - 1].fd == fd &&
        found[count - 1].offset + u64(first - found[count - 1].begin) == at)
      found[count - 1].end = const_cast<u8*>(last);
    else if (count < most)
      found[count++] = {const_cast<u8*>(first), const_cast<u8*>(last), fd, at};
    return true;
  });
  return count;
}

}  // namespace anykvm::os
