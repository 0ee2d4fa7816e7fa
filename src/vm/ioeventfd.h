// Guest writes that become eventfd signals without an exit.
// Reference: api.rst 4.59 KVM_IOEVENTFD.
#pragma once

#include <atomic>
#include <shared_mutex>
#include <vector>

#include "anykvm/kvm.h"
#include "vm/event_fd.h"
#include "x86/types.h"

namespace anykvm::vm {

class IoEventFds {
 public:
  enum class Bus : u8 { mmio, pio, ccw };

  /// KVM_IOEVENTFD.
  int ioctl(const kvm_ioeventfd& args);

  /// A guest write of length bytes (1, 2, 4, 8); true: an eventfd took it. Any vCPU thread; a load when there are none.
  bool write(Bus bus, u64 address, const void* data, unsigned length) const {
    return count_.load(std::memory_order_relaxed) != 0 && write_slow(bus, address, data, length);
  }

 private:
  struct Entry {
    Bus bus;
    u64 address;
    u32 length;  ///< 0: any
    bool wildcard;
    u64 match;
    EventFd event;
  };

  int assign(const kvm_ioeventfd& args, Bus bus);
  int deassign(const kvm_ioeventfd& args, Bus bus);
  bool write_slow(Bus bus, u64 address, const void* data, unsigned length) const;

  mutable std::shared_mutex mutex_;
  std::vector<Entry> entries_;  ///< sorted by address
  std::atomic<u32> count_{0};
};

}  // namespace anykvm::vm
