// virtio-rng (Virtual I/O Device 1.2, section 5.4): the host kernel's random numbers.
#pragma once

#include <atomic>

#include "vmm/event_loop.h"
#include "vmm/virtio/device.h"

namespace anykvm::vmm {

class EntropyDevice final : public VirtioDevice {
 public:
  explicit EntropyDevice(EventLoop& loop) : loop_(loop) {}

  u32 id() const override;
  u64 features() const override { return 0; }
  std::span<const u16> queue_sizes() const override;
  std::span<const u8> config() const override { return {}; }
  void notify(unsigned queue) override;

 private:
  void work();

  EventLoop& loop_;
  std::atomic<bool> posted_{false};  ///< work() is due: however often the guest notifies, it is posted once
  Chain chain_;
};

}  // namespace anykvm::vmm
