#include "os/memory_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace anykvm::os {

int create_memory_file(const char* name, std::size_t size) {
  const int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -errno;
  if (ftruncate(fd, static_cast<off_t>(size)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const int error = errno;
    close_file(fd);
    return -error;
  }
  return fd;
}

void close_file(int fd) { syscall(SYS_close, fd); }

Mapping::Mapping(int fd, std::size_t size, std::size_t offset) {
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (data != MAP_FAILED) data_ = data, size_ = size;
}

Mapping::~Mapping() {
  if (data_) munmap(data_, size_);
}

Mapping Mapping::lazy(std::size_t size) {
  Mapping mapping;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data != MAP_FAILED) mapping.data_ = data, mapping.size_ = size;
  return mapping;
}

}  // namespace anykvm::os
