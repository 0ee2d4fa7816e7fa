// The virtio-mmio transport, version 2 (Virtual I/O Device 1.2, section 4.2): one device as 4 KiB of registers and an
// interrupt line.
#pragma once

#include "vmm/bus.h"
#include "vmm/virtio/registers.h"

namespace anykvm::vmm {

/// Destroy it when neither vCPUs nor the event loop run any more.
class VirtioMmio final : public IoDevice, public VirtioRegisters {
 public:
  static constexpr u64 window_size = 0x1000;

  VirtioMmio(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory, IrqLine& irq)
      : VirtioRegisters(std::move(device), memory, irq) {}
  ~VirtioMmio() override { end_device(); }

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  u32 read_register(u64 offset);
  void write_register(u64 offset, u32 value);
};

}  // namespace anykvm::vmm
