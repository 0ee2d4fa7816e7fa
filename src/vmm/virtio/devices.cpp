#include "vmm/virtio/devices.h"

#include "vmm/virtio/block.h"
#include "vmm/virtio/entropy.h"
#include "vmm/virtio/net.h"
#include "vmm/virtio/user_network.h"

namespace anykvm::vmm {

std::unique_ptr<VirtioDevice> make_block(const BlockOptions& options) {
  return std::make_unique<BlockDevice>(options.path, options.read_only, options.serial);
}

std::unique_ptr<VirtioDevice> make_user_net(EventLoop& loop) {
  static constexpr u8 mac[ETH_ALEN] = {0x52, 0x54, 0x00, 0x12, 0x34, 0x56};  // locally administered
  return std::make_unique<NetDevice>(loop, std::make_unique<UserNetwork>(loop), mac);
}

std::unique_ptr<VirtioDevice> make_entropy(EventLoop& loop) { return std::make_unique<EntropyDevice>(loop); }

}  // namespace anykvm::vmm
