// An eventfd that the client gave us: our own descriptor of it, and its identity. The kernel compares eventfd objects,
// not descriptor numbers; a client may assign with one descriptor and deassign with a duplicate.
#pragma once

#include <utility>

#include "x86/types.h"

namespace anykvm::vm {

class EventFd {
 public:
  /// 0; -EBADF when fd is not open; -EINVAL when it is no eventfd.
  static int open(int fd, EventFd& out);
  /// Only the identity, for look-ups: the same errors.
  static int identify(int fd, u64& identity);

  EventFd() = default;
  EventFd(EventFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), identity_(other.identity_) {}
  EventFd& operator=(EventFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(identity_, other.identity_);
    return *this;
  }
  ~EventFd();

  int fd() const { return fd_; }
  u64 identity() const { return identity_; }
  /// Adds 1. Async-signal-safe.
  void signal() const;
  /// Takes the count without waiting; false: it was 0.
  bool consume() const;

 private:
  int fd_ = -1;
  u64 identity_ = 0;
};

}  // namespace anykvm::vm
