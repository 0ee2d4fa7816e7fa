#include "vmm/virtio/net.h"

#include <algorithm>
#include <cstring>

namespace anykvm::vmm {

namespace {

constexpr unsigned receive_queue = 0;
constexpr unsigned transmit_queue = 1;
constexpr u16 queue_size = 256;
constexpr unsigned frames_per_turn = 64;    // then the event loop's other work gets its turn
constexpr size_t max_waiting_frames = 512;  // more are dropped, as a switch does
constexpr size_t max_frame = 65536 + ETH_HLEN;
constexpr size_t header_size = sizeof(virtio_net_hdr_v1);

}  // namespace

NetDevice::NetDevice(EventLoop& loop, std::unique_ptr<NetBackend> backend, std::span<const u8, ETH_ALEN> mac)
    : loop_(loop), backend_(std::move(backend)) {
  std::ranges::copy(mac, config_.mac);
  config_.status = VIRTIO_NET_S_LINK_UP;
  backend_->connect([this](std::span<const u8> frame) { receive(frame); });
}

u32 NetDevice::id() const { return VIRTIO_ID_NET; }

u64 NetDevice::features() const {
  return (1u << VIRTIO_NET_F_MAC) | (1u << VIRTIO_NET_F_STATUS) | (1u << VIRTIO_NET_F_GUEST_CSUM);
}

std::span<const u16> NetDevice::queue_sizes() const {
  static constexpr u16 sizes[] = {queue_size, queue_size};
  return sizes;
}

std::span<const u8> NetDevice::config() const { return {reinterpret_cast<const u8*>(&config_), sizeof(config_)}; }

void NetDevice::notify(unsigned) {
  if (!posted_.exchange(true)) loop_.post([this] { work(); });
}

void NetDevice::work() {
  posted_ = false;  // before looking: what is notified from here on is posted anew
  drop_stale();
  transmitting_ = true;
  const auto send = [this](Chain& chain) -> u32 {
    transmit(chain);
    return 0;
  };
  const Served served = serve(transmit_queue, chain_, frames_per_turn, send);
  transmitting_ = false;
  deliver();
  if (served == Served::more) notify(transmit_queue);
}

// No offload is offered, so the header says nothing; the rest is the frame.
void NetDevice::transmit(Chain& chain) {
  if (chain.readable.bytes() <= header_size || chain.readable.bytes() - header_size > max_frame) return;
  frame_.resize(chain.readable.bytes() - header_size);
  chain.readable.copy_out(header_size, frame_);
  backend_->send(frame_);
}

void NetDevice::drop_stale() {
  if (stale_.exchange(false)) to_guest_.clear();
}

void NetDevice::receive(std::span<const u8> frame) {
  drop_stale();
  if (frame.size() > max_frame || to_guest_.size() >= max_waiting_frames) return;
  to_guest_.emplace_back(frame.begin(), frame.end());
  // An answer from within send() waits until the transmit queue is done with: we hold the transport's lock.
  if (!transmitting_) deliver();
}

void NetDevice::deliver() {
  if (to_guest_.empty()) return;
  const auto fill = [this](Chain& chain) -> u32 {
    const std::vector<u8> frame = std::move(to_guest_.front());
    to_guest_.pop_front();
    if (chain.writable.bytes() < header_size + frame.size()) return 0;  // the frame is lost
    virtio_net_hdr_v1 header{};
    header.num_buffers = 1;
    // The frame never was on a wire: the guest need not verify its checksums.
    if (checksums_known_good_) header.flags = VIRTIO_NET_HDR_F_DATA_VALID;
    chain.writable.copy_in(0, {reinterpret_cast<const u8*>(&header), header_size});
    chain.writable.copy_in(header_size, frame);
    return static_cast<u32>(header_size + frame.size());
  };
  serve(receive_queue, chain_, static_cast<unsigned>(to_guest_.size()), fill);
}

}  // namespace anykvm::vmm
