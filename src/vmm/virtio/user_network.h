// A network without privileges: libslirp ends the guest's IPv4 connections in ordinary sockets of this process.
// 10.0.2.0/24, with the host (its loopback included) at 10.0.2.2, a name server at 10.0.2.3, and DHCP from 10.0.2.15.
#pragma once

#include <span>
#include <vector>

#include "vmm/event_loop.h"
#include "vmm/virtio/net.h"

struct Slirp;

namespace anykvm::vmm {

/// Destroy it when the event loop does not run.
class UserNetwork final : public NetBackend, private PollSource {
 public:
  explicit UserNetwork(EventLoop& loop);
  ~UserNetwork() override;

  void send(std::span<const u8> frame) override;

 private:
  void before_poll(std::vector<pollfd>& fds, int& timeout_ms) override;
  void after_poll(std::span<const pollfd> fds) override;

  EventLoop& loop_;
  Slirp* slirp_;
};

}  // namespace anykvm::vmm
