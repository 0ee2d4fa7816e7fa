// The virtio-pci transport of version 1.0 and later (Virtual I/O Device 1.2, section 4.1): one PCI function, its
// registers in BAR 0, its interrupt on INTA#.
#pragma once

#include "vmm/pci/function.h"
#include "vmm/virtio/registers.h"

namespace anykvm::vmm {

/// Destroy it when neither vCPUs nor the event loop run any more.
class VirtioPci final : public PciFunction, public VirtioRegisters {
 public:
  VirtioPci(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory);
  ~VirtioPci() override { end_device(); }

  void read_config(unsigned offset, std::span<u8> data) override;
  void write_config(unsigned offset, std::span<const u8> data) override;
  void read_bar(unsigned bar, u64 offset, std::span<u8> data) override;
  void write_bar(unsigned bar, u64 offset, std::span<const u8> data) override;

 private:
  struct Pin final : IrqLine {
    explicit Pin(VirtioPci& owner) : owner(owner) {}
    void set(bool level) override { owner.set_interrupt(level); }
    VirtioPci& owner;
  };
  u64 read_common(u64 offset);
  void write_common(u64 offset, u64 value, size_t bytes);
  /// The offset and length in the BAR that the configuration-space window stands for now; false when it is set to
  /// nothing that can be accessed.
  bool window(u64& offset, u64& length) const;

  Pin pin_;
  unsigned window_capability_ = 0;
};

}  // namespace anykvm::vmm
