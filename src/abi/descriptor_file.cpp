#include "abi/descriptor_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "os/memory_file.h"

namespace anykvm::abi {
namespace {

struct Mark {
  char magic[16] = "anykvm's memfd";
  FdKind kind = FdKind::system;
  u8 reserved[15] = {};
};

}  // namespace

int create_descriptor_file(const char* name, FdKind kind, u64 size) {
  const int fd = os::create_memory_file(name, size + sizeof(Mark));
  if (fd < 0) return fd;
  const Mark mark{.kind = kind};
  if (pwrite(fd, &mark, sizeof mark, static_cast<off_t>(size)) == static_cast<ssize_t>(sizeof mark)) return fd;
  os::close_file(fd);
  return -ENOMEM;
}

bool read_mark(int fd, FdKind& kind) {
  struct stat status;
  constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || fcntl(fd, F_GET_SEALS) != seals) return false;
  Mark mark;
  const off_t at = status.st_size - static_cast<off_t>(sizeof mark);
  if (at < 0 || pread(fd, &mark, sizeof mark, at) != static_cast<ssize_t>(sizeof mark)) return false;
  if (std::memcmp(mark.magic, Mark{}.magic, sizeof mark.magic) != 0) return false;
  kind = mark.kind;
  return kind <= FdKind::vcpu;
}

u64 file_number(int fd) {
  struct stat status;
  return fstat(fd, &status) == 0 ? status.st_ino : 0;
}

}  // namespace anykvm::abi
