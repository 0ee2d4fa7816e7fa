#include "vmm/virtio/disk_image.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace anykvm::vmm {

namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error("disk '" + path + "': " + why);
}

std::string error_text(int error) { return std::strerror(error); }

// preadv and pwritev until all pieces are done: they may stop early for a signal, or at 2 GiB.
template <typename Transfer>
int transfer_all(std::span<iovec> pieces, u64 offset, Transfer&& transfer) {
  while (!pieces.empty()) {
    const int count = static_cast<int>(std::min<size_t>(pieces.size(), IOV_MAX));
    ssize_t done = transfer(pieces.data(), count, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return EIO;  // the file has become shorter
    offset += static_cast<u64>(done);
    while (!pieces.empty() && static_cast<size_t>(done) >= pieces.front().iov_len) {
      done -= static_cast<ssize_t>(pieces.front().iov_len);
      pieces = pieces.subspan(1);
    }
    if (done > 0) {
      pieces.front().iov_base = static_cast<u8*>(pieces.front().iov_base) + done;
      pieces.front().iov_len -= static_cast<size_t>(done);
    }
  }
  return 0;
}

struct Format {
  size_t offset;
  std::string_view magic;
  const char* name;
};
using namespace std::string_view_literals;
constexpr Format foreign_formats[] = {
    {0, "QFI\xfb"sv, "qcow2"},
    {0, "KDMV"sv, "VMDK"},
    {0, "# Disk DescriptorFile"sv, "VMDK"},
    {0, "vhdxfile"sv, "VHDX"},
    {0, "conectix"sv, "VHD"},
    {64, "\x7f\x10\xda\xbe"sv, "VDI"},
    {0, "\x1f\x8b\x08"sv, "gzip"},
    {0,
     "\xfd"
     "7zXZ\0"sv,
     "xz"},
    {0, "\x28\xb5\x2f\xfd"sv, "zstd"},
    {0, "BZh"sv, "bzip2"},
    {0, "PK\x03\x04"sv, "zip"},
};

}  // namespace

DiskImage::DiskImage(const std::string& path, bool read_only) : read_only_(read_only) {
  try {
    open(path);
    refuse_other_formats(path);
    lock(path);
  } catch (...) {
    if (fd_ >= 0) close(fd_);
    throw;
  }
}

DiskImage::~DiskImage() { close(fd_); }

void DiskImage::open(const std::string& path) {
  // O_NONBLOCK: a FIFO must not hang us before we can refuse it.
  fd_ = ::open(path.c_str(), (read_only_ ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) {
    if (errno == EISDIR) refuse(path, "is a directory");
    if (!read_only_ && (errno == EACCES || errno == EROFS || errno == EPERM)) {
      refuse(path, error_text(errno) + "; add ',ro' to use it read-only");
    }
    refuse(path, error_text(errno));
  }
  struct stat status;
  if (fstat(fd_, &status) != 0) refuse(path, error_text(errno));
  if (S_ISDIR(status.st_mode)) refuse(path, "is a directory");
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) refuse(path, "is neither a file nor a block device");
  const off_t end = lseek(fd_, 0, SEEK_END);
  if (end < 0) refuse(path, error_text(errno));
  bytes_ = static_cast<u64>(end);
  if (bytes_ == 0) refuse(path, "is empty");
}

void DiskImage::refuse_other_formats(const std::string& path) {
  std::array<char, 512> begin{};
  if (pread(fd_, begin.data(), begin.size(), 0) < 0) refuse(path, error_text(errno));
  const std::string_view head(begin.data(), begin.size());
  for (const Format& format : foreign_formats) {
    if (head.substr(format.offset).starts_with(format.magic)) {
      refuse(path, std::string("is in ") + format.name + " format; only raw images are supported");
    }
  }
  if (bytes_ % sector_size != 0) {
    refuse(path, "has " + std::to_string(bytes_) + " bytes, not a multiple of 512: truncated, or not a raw disk image");
  }
}

// An open file description lock on the whole file, which also meets the byte-range locks of QEMU.
void DiskImage::lock(const std::string& path) {
  struct flock whole {};
  whole.l_type = read_only_ ? F_RDLCK : F_WRLCK;
  whole.l_whence = SEEK_SET;
  if (fcntl(fd_, F_OFD_SETLK, &whole) == 0) return;
  if (errno != EAGAIN && errno != EACCES) return;  // a file system without locks
  refuse(path, read_only_ ? "is being written by another program, or by another --disk of this one"
                          : "is in use by another program, or by another --disk of this one (locked)");
}

int DiskImage::read(u64 offset, std::span<iovec> pieces) {
  return transfer_all(pieces, offset,
                      [this](iovec* list, int count, off_t at) { return preadv(fd_, list, count, at); });
}

int DiskImage::write(u64 offset, std::span<iovec> pieces) {
  return transfer_all(pieces, offset,
                      [this](iovec* list, int count, off_t at) { return pwritev(fd_, list, count, at); });
}

int DiskImage::flush() { return fdatasync(fd_) == 0 ? 0 : errno; }

int DiskImage::discard(u64 offset, u64 bytes) {
  const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (fallocate(fd_, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0) return 0;
  return errno == EOPNOTSUPP || errno == ENOSYS || errno == ENODEV ? 0 : errno;  // discarding is a hint
}

int DiskImage::write_zeroes(u64 offset, u64 bytes, bool unmap) {
  const int mode = (unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE) | FALLOC_FL_KEEP_SIZE;
  if (fallocate(fd_, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0) return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS && errno != ENODEV) return errno;
  static const std::array<u8, 64 * 1024> zeroes{};
  while (bytes > 0) {
    const size_t count = std::min<u64>(bytes, zeroes.size());
    iovec piece{const_cast<u8*>(zeroes.data()), count};
    if (const int error = write(offset, {&piece, 1})) return error;
    offset += count;
    bytes -= count;
  }
  return 0;
}

}  // namespace anykvm::vmm
