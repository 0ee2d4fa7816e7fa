// The virtio devices that a machine can be built from. Put each into a VirtioMmio (mmio.h).
#pragma once

#include <memory>
#include <string>

#include "vmm/event_loop.h"
#include "vmm/virtio/device.h"

namespace anykvm::vmm {

struct BlockOptions {
  std::string path;
  bool read_only = false;
  std::string serial;  ///< /sys/block/vd*/serial in a Linux guest; at most 20 bytes
};

/// A disk. Throws std::runtime_error with one sentence that names the file and what is wrong with it.
std::unique_ptr<VirtioDevice> make_block(const BlockOptions& options);
/// A network card on the user network.
std::unique_ptr<VirtioDevice> make_user_net(EventLoop& loop);
/// A source of random numbers.
std::unique_ptr<VirtioDevice> make_entropy(EventLoop& loop);

}  // namespace anykvm::vmm
