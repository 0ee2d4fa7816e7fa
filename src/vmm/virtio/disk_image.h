// A raw disk image: a regular file or block device, locked against a second writer.
#pragma once

#include <sys/uio.h>

#include <span>
#include <string>
#include <vector>

#include "x86/types.h"

namespace anykvm::vmm {

class DiskImage {
 public:
  static constexpr u64 sector_size = 512;

  /// Throws std::runtime_error with a sentence that names the file when it is missing, not a file or block device,
  /// empty, not a whole number of sectors, in another format than raw, or in use by another program that would
  /// conflict: one writer, or any number of readers.
  DiskImage(const std::string& path, bool read_only);
  ~DiskImage();
  DiskImage(const DiskImage&) = delete;
  DiskImage& operator=(const DiskImage&) = delete;

  [[nodiscard]] bool read_only() const { return read_only_; }
  [[nodiscard]] u64 sectors() const { return bytes_ / sector_size; }

  // All return 0 or an errno, and are for one thread at a time. `pieces` are consumed.
  int read(u64 offset, std::span<iovec> pieces);
  int write(u64 offset, std::span<iovec> pieces);
  int flush();
  /// The bytes read as zeroes or as before, and may give their blocks back to the host.
  int discard(u64 offset, u64 bytes);
  /// The bytes read as zeroes; with `unmap` their blocks may be given back.
  int write_zeroes(u64 offset, u64 bytes, bool unmap);

 private:
  void open(const std::string& path);
  void refuse_other_formats(const std::string& path);
  void lock(const std::string& path);

  int fd_ = -1;
  bool read_only_;
  u64 bytes_ = 0;
};

}  // namespace anykvm::vmm
