#include "vmm/virtio/entropy.h"

#include <linux/virtio_ids.h>
#include <sys/random.h>

#include <algorithm>

namespace anykvm::vmm {

namespace {

constexpr u16 queue_size = 64;
// A request may be answered in part; this bounds what one costs the event loop.
constexpr size_t max_answer = 4096;
constexpr unsigned chains_per_turn = 16;

}  // namespace

u32 EntropyDevice::id() const { return VIRTIO_ID_RNG; }

std::span<const u16> EntropyDevice::queue_sizes() const {
  static constexpr u16 sizes[] = {queue_size};
  return sizes;
}

void EntropyDevice::notify(unsigned) {
  if (!posted_.exchange(true)) loop_.post([this] { work(); });
}

void EntropyDevice::work() {
  posted_ = false;  // before looking: what is notified from here on is posted anew
  const auto fill = [](Chain& request) -> u32 {
    size_t filled = 0;
    for (const iovec& piece : request.writable.pieces()) {
      const size_t wanted = std::min(piece.iov_len, max_answer - filled);
      const ssize_t got = getrandom(piece.iov_base, wanted, 0);
      if (got < 0) break;
      filled += static_cast<size_t>(got);
      if (static_cast<size_t>(got) < piece.iov_len) break;
    }
    return static_cast<u32>(filled);
  };
  if (serve(0, chain_, chains_per_turn, fill) == Served::more) notify(0);
}

}  // namespace anykvm::vmm
