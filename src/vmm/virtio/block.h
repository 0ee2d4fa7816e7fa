// virtio-blk (Virtual I/O Device 1.2, section 5.2) over a raw disk image. One queue and one worker thread, so that a
// slow disk holds up neither vCPUs nor the event loop; data goes between file and guest RAM without a copy.
#pragma once

#include <linux/virtio_blk.h>

#include <array>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "vmm/virtio/device.h"
#include "vmm/virtio/disk_image.h"

namespace anykvm::vmm {

class BlockDevice final : public VirtioDevice {
 public:
  /// `serial` is what GET_ID tells (at most 20 bytes). Throws as DiskImage does.
  BlockDevice(const std::string& path, bool read_only, const std::string& serial);
  ~BlockDevice() override;

  u32 id() const override;
  u64 features() const override;
  std::span<const u16> queue_sizes() const override;
  std::span<const u8> config() const override;
  void activate(u64 features) override { features_ = features; }
  void notify(unsigned queue) override;

 private:
  void work();
  u32 answer(Chain& request);
  u8 transfer(Chain& request, u32 type, u64 sector, u32& written);
  u8 zero_ranges(const Chain& request, u32 type);
  [[nodiscard]] bool in_range(u64 sector, u64 bytes) const;
  [[nodiscard]] bool has(unsigned feature) const { return (features_ >> feature) & 1; }

  DiskImage image_;
  std::array<u8, VIRTIO_BLK_ID_BYTES> serial_{};
  virtio_blk_config config_{};
  u64 features_ = 0;  ///< negotiated; guarded by the transport's lock
  Chain chain_;
  std::vector<iovec> pieces_;

  std::mutex mutex_;  ///< guards the two flags
  std::condition_variable wake_;
  bool notified_ = false;
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace anykvm::vmm
