// The guest's RAM as the VMM's devices and loaders reach it: checked spans of host memory by guest-physical address.
#pragma once

#include <span>
#include <vector>

#include "x86/types.h"

namespace anykvm::vmm {

/// RAM begins at 0; what does not fit below the hole for devices (3 GiB to 4 GiB) goes on at 4 GiB. Immutable after
/// construction: any thread may ask for spans. The bytes are shared with the running guest, so a device reads what it
/// decides on once, and copies what it validates.
class GuestMemory {
 public:
  static constexpr Gpa hole_begin = 0xc000'0000;
  static constexpr Gpa hole_end = 0x1'0000'0000;

  struct Region {
    Gpa base;
    u64 size;
    u8* host;
  };

  enum class Backing : u8 {
    anonymous,  ///< the host may use large pages
    file,       ///< of memory: other processes can map it
  };

  /// `size` in bytes, rounded up to a page; throws std::system_error when the host does not give that much.
  explicit GuestMemory(u64 size, Backing backing = Backing::anonymous);
  ~GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;

  /// The `size` bytes at `gpa`; empty when any of them is not RAM, and when `size` is 0.
  std::span<u8> at(Gpa gpa, u64 size) const;

  /// Copies to and from RAM; false, and nothing copied, when the range is not all RAM.
  bool write(Gpa gpa, std::span<const u8> bytes) const;
  bool read(Gpa gpa, std::span<u8> bytes) const;

  std::span<const Region> regions() const { return regions_; }
  u64 size() const { return size_; }
  /// Bytes below the device hole.
  u64 low_size() const { return regions_.front().size; }
  u64 high_size() const { return regions_.size() > 1 ? regions_.back().size : 0; }

 private:
  u64 size_;
  u8* host_ = nullptr;
  int file_ = -1;
  std::vector<Region> regions_;
};

}  // namespace anykvm::vmm
