// virtio-net (Virtual I/O Device 1.2, section 5.1): one pair of queues between the guest and a network.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "vmm/event_loop.h"
#include "vmm/virtio/device.h"
#include "vmm/virtio/linux_virtio_net.h"

namespace anykvm::vmm {

/// The network at the other end of the cable. Everything here happens on the event loop's thread.
class NetBackend {
 public:
  using Receiver = std::function<void(std::span<const u8> frame)>;
  virtual ~NetBackend() = default;

  /// An Ethernet frame from the guest, without checksum at its end. May call the receiver before it returns.
  virtual void send(std::span<const u8> frame) = 0;
  /// Who gets the frames for the guest. Called once, before the event loop runs.
  void connect(Receiver receiver) { receiver_ = std::move(receiver); }

 protected:
  Receiver receiver_;
};

class NetDevice final : public VirtioDevice {
 public:
  NetDevice(EventLoop& loop, std::unique_ptr<NetBackend> backend, std::span<const u8, ETH_ALEN> mac);

  u32 id() const override;
  u64 features() const override;
  std::span<const u16> queue_sizes() const override;
  std::span<const u8> config() const override;
  void activate(u64 features) override { checksums_known_good_ = (features >> VIRTIO_NET_F_GUEST_CSUM) & 1; }
  void reset() override { stale_ = true; }
  void notify(unsigned queue) override;

 private:
  void work();
  void transmit(Chain& chain);
  void receive(std::span<const u8> frame);
  void deliver();
  void drop_stale();

  EventLoop& loop_;
  std::unique_ptr<NetBackend> backend_;
  virtio_net_config config_{};
  std::atomic<bool> posted_{false};    ///< work() is due
  std::atomic<bool> stale_{false};     ///< what waits for the guest was meant for the driver before the reset
  bool checksums_known_good_ = false;  ///< guarded by the transport's lock

  // The event loop's thread only.
  Chain chain_;
  std::vector<u8> frame_;
  std::deque<std::vector<u8>> to_guest_;  ///< frames that wait for a buffer
  bool transmitting_ = false;
};

}  // namespace anykvm::vmm
