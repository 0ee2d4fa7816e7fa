#include "vm/event_fd.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace anykvm::vm {

int EventFd::identify(int fd, u64& identity) {
  if (fcntl(fd, F_GETFD) < 0) return -EBADF;
  char path[48];
  std::snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
  const int info = ::open(path, O_RDONLY | O_CLOEXEC);
  if (info < 0) {
    // No /proc: the number is all there is to tell one from another.
    identity = 1ull << 63 | static_cast<u32>(fd);
    return 0;
  }
  char text[512];
  const ssize_t size = read(info, text, sizeof text - 1);
  close(info);
  text[size > 0 ? size : 0] = 0;
  if (const char* id = std::strstr(text, "eventfd-id:")) {
    identity = std::strtoull(id + std::strlen("eventfd-id:"), nullptr, 10);
    return 0;
  }
  if (!std::strstr(text, "eventfd-count:")) return -EINVAL;
  identity = 1ull << 63 | static_cast<u32>(fd);  // before Linux 5.2 eventfds have no number
  return 0;
}

int EventFd::open(int fd, EventFd& out) {
  EventFd event;
  if (const int error = identify(fd, event.identity_)) return error;
  event.fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (event.fd_ < 0) return -errno;
  out = std::move(event);
  return 0;
}

EventFd::~EventFd() {
  if (fd_ >= 0) close(fd_);
}

void EventFd::signal() const {
  const u64 one = 1;
  // Only a counter at its end could make this fail or wait, and then the reader has its news already.
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
}

bool EventFd::consume() const {
  u64 count;
  iovec buffer{&count, sizeof count};
  // The client's descriptor may be a blocking one, and the client may be reading it too.
  const ssize_t size = preadv2(fd_, &buffer, 1, -1, RWF_NOWAIT);
  if (size >= 0 || errno == EAGAIN) return size == sizeof count;
  pollfd ready{fd_, POLLIN, 0};
  return poll(&ready, 1, 0) == 1 && read(fd_, &count, sizeof count) == sizeof count;
}

}  // namespace anykvm::vm
