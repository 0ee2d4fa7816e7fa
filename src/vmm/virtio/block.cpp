#include "vmm/virtio/block.h"

#include <linux/virtio_ids.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>

#include "os/signals_blocked.h"

namespace anykvm::vmm {

namespace {

constexpr u16 queue_size = 256;
constexpr u32 max_segments = queue_size - 2;  // a header and a status byte are part of every chain
constexpr u32 max_zero_sectors = 1u << 22;    // 2 GiB in one range
constexpr u32 max_zero_ranges = 32;

}  // namespace

BlockDevice::BlockDevice(const std::string& path, bool read_only, const std::string& serial) : image_(path, read_only) {
  std::memcpy(serial_.data(), serial.data(), std::min(serial.size(), serial_.size()));
  config_.capacity = image_.sectors();
  config_.seg_max = max_segments;
  config_.blk_size = DiskImage::sector_size;
  config_.max_discard_sectors = config_.max_write_zeroes_sectors = max_zero_sectors;
  config_.max_discard_seg = config_.max_write_zeroes_seg = max_zero_ranges;
  config_.discard_sector_alignment = 1;
  config_.write_zeroes_may_unmap = 1;
  const os::SignalsBlocked blocked;
  worker_ = std::thread([this] { work(); });
  pthread_setname_np(worker_.native_handle(), "virtio-blk");
}

BlockDevice::~BlockDevice() {
  {
    const std::lock_guard held(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  worker_.join();
}

u32 BlockDevice::id() const { return VIRTIO_ID_BLOCK; }

u64 BlockDevice::features() const {
  const u64 always = (1u << VIRTIO_BLK_F_SEG_MAX) | (1u << VIRTIO_BLK_F_BLK_SIZE) | (1u << VIRTIO_BLK_F_FLUSH);
  if (image_.read_only()) return always | (1u << VIRTIO_BLK_F_RO);
  return always | (1u << VIRTIO_BLK_F_DISCARD) | (1u << VIRTIO_BLK_F_WRITE_ZEROES);
}

std::span<const u16> BlockDevice::queue_sizes() const {
  static constexpr u16 sizes[] = {queue_size};
  return sizes;
}

std::span<const u8> BlockDevice::config() const { return {reinterpret_cast<const u8*>(&config_), sizeof(config_)}; }

void BlockDevice::notify(unsigned) {
  {
    const std::lock_guard held(mutex_);
    notified_ = true;
  }
  wake_.notify_one();
}

void BlockDevice::work() {
  bool more = false;
  for (;;) {
    {
      std::unique_lock held(mutex_);
      if (!more) wake_.wait(held, [this] { return notified_ || stopping_; });
      if (stopping_) return;
      notified_ = false;
    }
    more = serve(0, chain_, 1, [this](Chain& request) { return answer(request); }) == Served::more;
  }
}

// A request: a header to read, data one way or the other, and a status byte at the very end to write. What has no room
// for header or status cannot be answered; the driver gets it back with nothing written.
u32 BlockDevice::answer(Chain& request) {
  virtio_blk_outhdr header;
  const std::span<u8> header_bytes(reinterpret_cast<u8*>(&header), sizeof(header));
  if (request.writable.bytes() == 0 || request.readable.copy_out(0, header_bytes) != sizeof(header)) return 0;
  request.readable.drop_front(sizeof(header));
  const u64 data_bytes = request.writable.bytes() - 1;
  const iovec last = request.writable.pieces().back();
  u8* const status = static_cast<u8*>(last.iov_base) + last.iov_len - 1;
  request.writable.drop_back(1);

  u32 written = 0;
  switch (header.type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT: *status = transfer(request, header.type, header.sector, written); break;
    case VIRTIO_BLK_T_FLUSH: *status = image_.flush() == 0 ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR; break;
    case VIRTIO_BLK_T_GET_ID:
      written = static_cast<u32>(request.writable.copy_in(0, serial_));
      *status = VIRTIO_BLK_S_OK;
      break;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES: *status = zero_ranges(request, header.type); break;
    default: *status = VIRTIO_BLK_S_UNSUPP; break;
  }
  return written == data_bytes ? written + 1 : written;  // the status counts when no gap lies before it
}

bool BlockDevice::in_range(u64 sector, u64 bytes) const {
  return bytes % DiskImage::sector_size == 0 && sector <= image_.sectors() &&
         bytes / DiskImage::sector_size <= image_.sectors() - sector;
}

u8 BlockDevice::transfer(Chain& request, u32 type, u64 sector, u32& written) {
  const bool reading = type == VIRTIO_BLK_T_IN;
  const Buffers& data = reading ? request.writable : request.readable;
  if (!in_range(sector, data.bytes()) || (!reading && image_.read_only())) return VIRTIO_BLK_S_IOERR;
  pieces_.assign(data.pieces().begin(), data.pieces().end());
  const u64 offset = sector * DiskImage::sector_size;
  if (reading) {
    if (image_.read(offset, pieces_) != 0) return VIRTIO_BLK_S_IOERR;
    written = static_cast<u32>(data.bytes());
    return VIRTIO_BLK_S_OK;
  }
  if (image_.write(offset, pieces_) != 0) return VIRTIO_BLK_S_IOERR;
  // A driver that does not know of flushing expects a write-through disk.
  if (!has(VIRTIO_BLK_F_FLUSH) && image_.flush() != 0) return VIRTIO_BLK_S_IOERR;
  return VIRTIO_BLK_S_OK;
}

u8 BlockDevice::zero_ranges(const Chain& request, u32 type) {
  const bool discard = type == VIRTIO_BLK_T_DISCARD;
  if (!has(discard ? VIRTIO_BLK_F_DISCARD : VIRTIO_BLK_F_WRITE_ZEROES)) return VIRTIO_BLK_S_UNSUPP;
  std::array<virtio_blk_discard_write_zeroes, max_zero_ranges> ranges;
  const u64 bytes = request.readable.bytes();
  const u64 count = bytes / sizeof(ranges[0]);
  if (image_.read_only() || bytes % sizeof(ranges[0]) != 0 || count == 0 || count > ranges.size()) {
    return VIRTIO_BLK_S_IOERR;
  }
  request.readable.copy_out(0, {reinterpret_cast<u8*>(ranges.data()), bytes});
  const u32 known_flags = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
  for (const auto& range : std::span(ranges).first(count)) {
    const u64 length = u64{range.num_sectors} * DiskImage::sector_size;
    if (range.flags & ~known_flags) return VIRTIO_BLK_S_UNSUPP;
    if (range.num_sectors > max_zero_sectors || !in_range(range.sector, length)) return VIRTIO_BLK_S_IOERR;
    if (length == 0) continue;
    const u64 offset = range.sector * DiskImage::sector_size;
    const int error = discard ? image_.discard(offset, length) : image_.write_zeroes(offset, length, range.flags != 0);
    if (error != 0) return VIRTIO_BLK_S_IOERR;
  }
  return VIRTIO_BLK_S_OK;
}

}  // namespace anykvm::vmm
