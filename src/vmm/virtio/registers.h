// What every transport's registers stand for: status, features, queues and the causes of interrupts of one virtio
// device (Virtual I/O Device 1.2, chapters 2 and 3). A transport derives from it and gives the registers their
// addresses.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "vmm/guest_memory.h"
#include "vmm/irq_line.h"
#include "vmm/virtio/device.h"

namespace anykvm::vmm {

class VirtioRegisters : protected VirtioTransport {
 public:
  ~VirtioRegisters() override { end_device(); }

  /// Why the device went to DEVICE_NEEDS_RESET last; empty when it never did.
  [[nodiscard]] std::string failure();

 protected:
  struct Queue {
    QueueLayout layout;
    std::optional<VirtQueue> ready;
  };

  /// The line is held high while there is a cause, so it may be wired as level- or edge-triggered.
  VirtioRegisters(std::unique_ptr<VirtioDevice> device, const GuestMemory& memory, IrqLine& irq);
  /// The device's own thread works with our members and the interrupt line: a transport ends it first of all.
  void end_device() { device_.reset(); }

  VirtioDevice& device() { return *device_; }
  std::unique_lock<std::mutex> lock() override { return std::unique_lock(mutex_); }

  // With the lock held. The names are the specification's.
  [[nodiscard]] u32 device_feature() const { return half(offered_features(), device_feature_select); }
  void write_driver_feature(u32 value);
  [[nodiscard]] u32 driver_feature() const { return half(driver_features_, driver_feature_select); }
  [[nodiscard]] u32 status() const { return status_; }
  void write_status(u32 value);
  [[nodiscard]] size_t queue_count() const { return queues_.size(); }
  /// The queue that queue_select names, or nullptr.
  Queue* selected_queue() { return queue_select < queues_.size() ? &queues_[queue_select] : nullptr; }
  /// The device's limit for it; 0 when there is no such queue.
  [[nodiscard]] u16 selected_queue_limit() const;
  /// Puts the selected queue to work where its layout says.
  void enable_queue(Queue& queue);
  u32 device_feature_select = 0, driver_feature_select = 0, queue_select = 0;

  // Without the lock.
  void notify(u32 queue);
  [[nodiscard]] u32 interrupt_status() const { return interrupt_status_; }
  /// Takes `causes` back and returns those that were pending.
  u32 acknowledge(u32 causes);
  /// Copies from the device's configuration space; zeroes behind its end.
  void read_device_config(u64 offset, std::span<u8> data);

  static void set_half(u64& value, u32 select, u32 half);
  static u32 half(u64 value, u32 select);

 private:
  VirtQueue* queue(unsigned index) override;
  void announce(VirtQueue& queue) override;
  void fail(const std::string& reason) override;
  void reset();
  void raise(u32 cause);
  [[nodiscard]] u64 offered_features() const;

  std::unique_ptr<VirtioDevice> device_;
  const GuestMemory& memory_;

  std::mutex mutex_;  ///< the transport's lock; guards all that follows and the selectors, but not the interrupt
  u32 status_ = 0;
  u64 driver_features_ = 0;
  std::vector<Queue> queues_;
  std::string failure_;

  // The interrupt has its own lock, so that its handler never waits for a disk: causes and the line change together.
  std::mutex interrupt_mutex_;
  std::atomic<u32> interrupt_status_{0};
  IrqLine& irq_;
};

}  // namespace anykvm::vmm
