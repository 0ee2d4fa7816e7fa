// What a virtio device is to its transport, and the transport to its device (Virtual I/O Device 1.2, sections 2 and 3).
//
// Threads. Registers are read and written on vCPU threads; a device works on a thread of its own choice (the event
// loop, a worker), never on a vCPU's. The transport's lock stands between them: a device holds it while it touches its
// queues, and the transport holds it while it resets or activates the device, so neither happens in the middle of a
// chain.
#pragma once

#include <mutex>
#include <span>
#include <string>

#include "vmm/virtio/queue.h"
#include "x86/types.h"

namespace anykvm::vmm {

class VirtioTransport {
 public:
  virtual ~VirtioTransport() = default;

  /// To be held for queue() and everything done with its result.
  [[nodiscard]] virtual std::unique_lock<std::mutex> lock() = 0;
  /// Queue `index`, or nullptr unless the driver is running (DRIVER_OK) and has set this queue up.
  virtual VirtQueue* queue(unsigned index) = 0;
  /// Tells the driver about chains given back, if it wants to be told.
  virtual void announce(VirtQueue& queue) = 0;
  /// The driver has done what cannot be answered: DEVICE_NEEDS_RESET, and no queue until it resets the device.
  virtual void fail(const std::string& reason) = 0;
};

class VirtioDevice {
 public:
  virtual ~VirtioDevice() = default;

  /// VIRTIO_ID_*.
  [[nodiscard]] virtual u32 id() const = 0;
  /// The device's own feature bits; the transport adds those of the ring and VIRTIO_F_VERSION_1.
  [[nodiscard]] virtual u64 features() const = 0;
  /// Largest size of each queue.
  [[nodiscard]] virtual std::span<const u16> queue_sizes() const = 0;
  /// The device's configuration space, which never changes; reads past its end give zeroes.
  [[nodiscard]] virtual std::span<const u8> config() const = 0;

  /// Called once, before anything else.
  void attach(VirtioTransport& transport) { transport_ = &transport; }
  /// The driver is running with these features. With the lock held, on a vCPU's thread.
  virtual void activate(u64 /*features*/) {}
  /// Forget everything about the driver. With the lock held, on a vCPU's thread; no chain is in flight.
  virtual void reset() {}
  /// The driver has made chains available in `queue`. On a vCPU's thread, with or without the lock, which it must not
  /// take: it only hands the work on.
  virtual void notify(unsigned queue) = 0;

 protected:
  enum class Served { all, more };

  /// Takes at most `limit` chains off queue `index` and has `handle(Chain&) -> u32 written` answer each. The lock is
  /// held for one chain at a time, so that a vCPU never waits for more than one. Returns `more` when the limit ended
  /// it: call again.
  template <typename Handle>
  Served serve(unsigned index, Chain& chain, unsigned limit, Handle&& handle) {
    for (unsigned done = 0;; ++done) {
      const auto lock = transport_->lock();
      VirtQueue* queue = transport_->queue(index);
      if (queue == nullptr) return Served::all;
      if (done == limit) return Served::more;
      queue->suppress_notification();
      switch (queue->take(chain)) {
        case VirtQueue::Take::broken: transport_->fail(queue->error()); return Served::all;
        case VirtQueue::Take::empty:
          if (queue->ask_for_notification()) continue;
          return Served::all;
        case VirtQueue::Take::chain: queue->give_back(chain, handle(chain)); transport_->announce(*queue);
      }
    }
  }

  VirtioTransport* transport_ = nullptr;
};

}  // namespace anykvm::vmm
