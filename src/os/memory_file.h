// Memory with a descriptor: what stands behind the VM's and the vCPU's fd.
#pragma once

#include <cstddef>
#include <utility>

namespace anykvm::os {

/// A memfd of this size, close-on-exec, sealed against shrinking and growing so that a mapping of it can always be
/// touched. The descriptor, or -errno.
int create_memory_file(const char* name, std::size_t size);

/// close(2) past an interposer, which may stand in the place of close().
void close_file(int fd);

/// A mapping, unmapped at the end; a shared one of a file unless it says otherwise. Empty when it failed.
class Mapping {
 public:
  Mapping() = default;
  /// Maps [offset, offset + size) of fd for reading and writing; on failure data() is nullptr and errno says why.
  Mapping(int fd, std::size_t size, std::size_t offset = 0);
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Mapping();

  /// Private zeros, which take no memory before they are touched; empty: there are none to be had.
  static Mapping lazy(std::size_t size);

  void* data() const { return data_; }
  /// It stays mapped.
  void* release() { return std::exchange(data_, nullptr); }
  std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace anykvm::os
