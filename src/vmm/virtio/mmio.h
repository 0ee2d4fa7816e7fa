// The virtio-mmio transport, version 2 (Virtual I/O Device 1.2, section 4.2): one device as 4 KiB of registers and an
// interrupt line.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "vmm/bus.h"
#include "vmm/guest_memory.h"
#include "vmm/irq_line.h"
#include "vmm/virtio/device.h"

namespace anykvm::vmm {

/// The line is held high while InterruptStatus has a bit set, so it may be wired as level- or edge-triggered.
/// Destroy it when neither vCPUs nor the event loop run any more.
class VirtioMmio final : public IoDevice, private VirtioTransport {
 public:
  static constexpr u64 window_size = 0x1000;

  VirtioMmio(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory, IrqLine& irq);
  ~VirtioMmio() override;

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  /// Why the device went to DEVICE_NEEDS_RESET last; empty when it never did.
  [[nodiscard]] std::string failure();

 private:
  struct Queue {
    QueueLayout layout;
    std::optional<VirtQueue> ready;
  };

  std::unique_lock<std::mutex> lock() override { return std::unique_lock(mutex_); }
  VirtQueue* queue(unsigned index) override;
  void announce(VirtQueue& queue) override;
  void fail(const std::string& reason) override;

  u32 read_register(u64 offset);
  void write_register(u64 offset, u32 value);
  void write_status(u32 value);
  void write_queue_ready(Queue& queue, u32 value);
  void reset();
  void raise(u32 cause);
  void acknowledge(u32 causes);
  [[nodiscard]] u64 offered_features() const;

  std::unique_ptr<VirtioDevice> device_;
  const GuestMemory& memory_;

  std::mutex mutex_;  ///< the transport's lock; guards all that follows but the interrupt
  u32 status_ = 0;
  u32 device_features_select_ = 0;
  u32 driver_features_select_ = 0;
  u64 driver_features_ = 0;
  u32 queue_select_ = 0;
  std::vector<Queue> queues_;
  std::string failure_;

  // The interrupt has its own lock, so that its handler never waits for a disk: causes and the line change together.
  std::mutex interrupt_mutex_;
  std::atomic<u32> interrupt_status_{0};
  IrqLine& irq_;
};

}  // namespace anykvm::vmm
