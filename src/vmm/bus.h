// The two address spaces through which a guest reaches devices of the VMM: ports and memory-mapped registers.
#pragma once

#include <span>
#include <vector>

#include "x86/types.h"

namespace anykvm::vmm {

/// A device's registers as a vCPU sees them. Called on the vCPUs' threads, also by several at once: a device that has
/// state guards it with its own mutex.
class IoDevice {
 public:
  virtual ~IoDevice() = default;

  /// `offset` is relative to the base the device was added at; `data` has the size of the access: 1, 2, 4 or 8 bytes.
  /// A read that a device does not answer leaves `data` as it is: all ones, as on an empty bus.
  virtual void read(u64 offset, std::span<u8> data) = 0;
  virtual void write(u64 offset, std::span<const u8> data) = 0;
};

/// Address ranges to devices. Ranges are added before the vCPUs run; from then on the bus is read only and needs no
/// lock.
class Bus {
 public:
  /// Throws std::logic_error when the range overlaps one that is there: an error in how the machine is put together.
  /// The device must outlive the bus.
  void add(u64 base, u64 size, IoDevice& device);

  /// Both return false when nothing is at `addr`; a read then gives all ones. An access that begins in a device's range
  /// is the device's, even when it reaches beyond the end.
  bool read(u64 addr, std::span<u8> data) const;
  bool write(u64 addr, std::span<const u8> data) const;

 private:
  struct Range {
    u64 base;
    u64 size;
    IoDevice* device;
  };
  const Range* find(u64 addr) const;

  std::vector<Range> ranges_;  ///< sorted by base
};

}  // namespace anykvm::vmm
