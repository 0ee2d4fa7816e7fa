#include "vmm/virtio/user_network.h"

#include <arpa/inet.h>
#include <libslirp.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace anykvm::vmm {

namespace {

short to_poll(int slirp_events) {
  short events = 0;
  if (slirp_events & SLIRP_POLL_IN) events |= POLLIN;
  if (slirp_events & SLIRP_POLL_OUT) events |= POLLOUT;
  if (slirp_events & SLIRP_POLL_PRI) events |= POLLPRI;
  if (slirp_events & SLIRP_POLL_ERR) events |= POLLERR;
  if (slirp_events & SLIRP_POLL_HUP) events |= POLLHUP;
  return events;
}

int from_poll(short events) {
  int slirp_events = 0;
  if (events & POLLIN) slirp_events |= SLIRP_POLL_IN;
  if (events & POLLOUT) slirp_events |= SLIRP_POLL_OUT;
  if (events & POLLPRI) slirp_events |= SLIRP_POLL_PRI;
  if (events & POLLERR) slirp_events |= SLIRP_POLL_ERR;
  if (events & POLLHUP) slirp_events |= SLIRP_POLL_HUP;
  return slirp_events;
}

in_addr address(const char* text) {
  in_addr parsed{};
  inet_pton(AF_INET, text, &parsed);
  return parsed;
}

}  // namespace

UserNetwork::UserNetwork(EventLoop& loop) : loop_(loop) {
  // libslirp keeps a pointer to the callbacks. Those for timers stay empty: only IPv6 router advertisements use them.
  // All descriptors are asked for before each wait, so there is nothing to register, and all happens on the loop's
  // thread, so there is nobody to wake.
  static const SlirpCb callbacks = {
      .send_packet = [](const void* frame, size_t size, void* self) -> ssize_t {
        const auto& receiver = static_cast<UserNetwork*>(self)->receiver_;
        if (receiver) receiver({static_cast<const u8*>(frame), size});
        return static_cast<ssize_t>(size);
      },
      .guest_error = [](const char*, void*) {},
      .clock_get_ns = [](void*) { return static_cast<int64_t>(EventLoop::now_ns()); },
      .register_poll_fd = [](int, void*) {},
      .unregister_poll_fd = [](int, void*) {},
      .notify = [](void*) {},
  };
  SlirpConfig config{};
  config.version = 1;
  config.in_enabled = true;
  config.vnetwork = address("10.0.2.0");
  config.vnetmask = address("255.255.255.0");
  config.vhost = address("10.0.2.2");
  config.vnameserver = address("10.0.2.3");
  config.vdhcp_start = address("10.0.2.15");
  slirp_ = slirp_new(&config, &callbacks, this);
  if (slirp_ == nullptr) throw std::runtime_error("user network: libslirp does not start");
  loop_.add_source(*this);
}

UserNetwork::~UserNetwork() {
  loop_.remove_source(*this);
  slirp_cleanup(slirp_);
}

void UserNetwork::send(std::span<const u8> frame) { slirp_input(slirp_, frame.data(), static_cast<int>(frame.size())); }

void UserNetwork::before_poll(std::vector<pollfd>& fds, int& timeout_ms) {
  struct Request {
    std::vector<pollfd>& fds;
    size_t begin;
  } request{fds, fds.size()};
  const auto add = [](int fd, int events, void* opaque) {
    auto& [fds, begin] = *static_cast<Request*>(opaque);
    fds.push_back({fd, to_poll(events), 0});
    return static_cast<int>(fds.size() - 1 - begin);
  };
  u32 timeout = timeout_ms < 0 ? std::numeric_limits<u32>::max() : static_cast<u32>(timeout_ms);
  slirp_pollfds_fill(slirp_, &timeout, add, &request);
  if (timeout <= static_cast<u32>(std::numeric_limits<int>::max())) timeout_ms = static_cast<int>(timeout);
}

void UserNetwork::after_poll(std::span<const pollfd> fds) {
  const auto revents = [](int index, void* opaque) {
    const auto& entries = *static_cast<const std::span<const pollfd>*>(opaque);
    return from_poll(entries[static_cast<size_t>(index)].revents);
  };
  slirp_pollfds_poll(slirp_, 0, revents, &fds);
}

}  // namespace anykvm::vmm
