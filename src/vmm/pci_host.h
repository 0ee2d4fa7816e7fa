// A PCI bus with nothing on it but its host bridge, by configuration mechanism #1. (PCI Local Bus 3.0,
// section 3.2.2.3.2.) Guests look for PCI on every PC; one that finds none at all complains.
#pragma once

#include <mutex>

#include "vmm/bus.h"

namespace anykvm::vmm {

class PciHost final : public IoDevice {
 public:
  static constexpr u64 base_port = 0xcf8;
  static constexpr u64 port_count = 8;

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  std::mutex mutex_;
  u32 address_ = 0;
};

}  // namespace anykvm::vmm
