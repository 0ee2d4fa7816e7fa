// A PCI bus: configuration mechanism #1 (PCI Local Bus 3.0, section 3.2.2.3.2), and the memory window through which
// the functions' BARs are reached, wherever the guest has put them.
#pragma once

#include <array>
#include <functional>
#include <mutex>

#include "vmm/bus.h"
#include "vmm/pci/function.h"

namespace anykvm::vmm {

/// Itself the device at ports 0xcf8 to 0xcff; memory() is the one at the window. One function per slot.
class PciBus final : public IoDevice {
 public:
  static constexpr u64 base_port = 0xcf8;
  static constexpr u64 port_count = 8;
  static constexpr unsigned slot_count = 32;
  /// Where BARs can be: behind virtio-mmio's windows, up to the I/O APIC.
  static constexpr Gpa window_begin = 0xe000'0000;
  static constexpr Gpa window_end = 0xfec0'0000;

  /// `reset` is called, on a vCPU's thread, when the guest asks for a reset by port 0xcf9.
  explicit PciBus(std::function<void()> reset) : memory_(*this), reset_(std::move(reset)) {}

  /// Before the vCPUs run. The function outlives the bus; `interrupts` is where its pin goes.
  void add(unsigned slot, PciFunction& function, PciInterrupts& interrupts);
  IoDevice& memory() { return memory_; }

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  struct Memory final : IoDevice {
    explicit Memory(PciBus& owner) : owner(owner) {}
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    PciBus& owner;
  };
  struct Target {
    PciFunction* function = nullptr;
    unsigned bar = 0;
    u64 offset = 0;
  };
  PciFunction* selected() const;
  Target find(Gpa gpa);
  void write_reset_control(u8 value);

  Memory memory_;
  std::function<void()> reset_;
  std::array<PciFunction*, slot_count> functions_{};

  std::mutex mutex_;  ///< guards the address and all configuration spaces
  u32 address_ = 0;
  u8 reset_control_ = 0;
};

}  // namespace anykvm::vmm
