// A split virtqueue as its device sees it (Virtual I/O Device 1.2, section 2.7): takes descriptor chains off the
// available ring, gives them back on the used ring, and says when the driver wants an interrupt. All that the guest
// wrote (addresses, lengths, indices, flags) is read once and checked against guest RAM before it is used: a bad ring
// makes the queue broken, and a broken queue yields nothing until the device is reset.
#pragma once

#include <sys/uio.h>

#include <expected>
#include <span>
#include <vector>

#include "vmm/guest_memory.h"
#include "x86/types.h"

namespace anykvm::vmm {

/// A list of host pieces of guest RAM, read or written as if it were one buffer.
class Buffers {
 public:
  [[nodiscard]] u64 bytes() const { return bytes_; }
  [[nodiscard]] std::span<const iovec> pieces() const { return pieces_; }

  void clear() { pieces_.clear(), bytes_ = 0; }
  void append(std::span<u8> piece);
  /// Copies from (to) the bytes that begin at `offset`; returns the number copied, less than asked for at the end.
  size_t copy_out(u64 offset, std::span<u8> to) const;
  size_t copy_in(u64 offset, std::span<const u8> from) const;
  /// Forgets the first (last) `count` bytes; `count` must not exceed bytes().
  void drop_front(u64 count);
  void drop_back(u64 count);

 private:
  std::vector<iovec> pieces_;
  u64 bytes_ = 0;
};

/// One descriptor chain. Reuse one object for all chains of a queue: its lists then stop allocating.
struct Chain {
  u16 head = 0;
  Buffers readable;  ///< from the driver to the device; always first in the chain
  Buffers writable;  ///< from the device to the driver
};

/// Where the driver has put a queue, as written to the transport's registers.
struct QueueLayout {
  u32 size = 0;  ///< number of descriptors
  Gpa descriptors = 0;
  Gpa available = 0;
  Gpa used = 0;
};

class VirtQueue {
 public:
  static constexpr u32 max_size = 1024;  ///< of a queue, and of a chain through an indirect table
  static constexpr u64 max_chain_bytes = u64{1} << 32;

  enum class Take { chain, empty, broken };

  /// `features` are those negotiated; the error is a sentence for people.
  static std::expected<VirtQueue, const char*> make(const GuestMemory& memory, const QueueLayout& layout, u64 features);

  /// The next chain that the driver has made available.
  Take take(Chain& chain);
  /// Gives a chain back; `written` is the number of bytes that were stored from the front of its writable part.
  void give_back(const Chain& chain, u32 written);
  /// Leaves the last taken chain on the available ring, to be taken again (not enough room in it yet).
  void put_back() { --next_available_; }

  /// Whether the chains given back since the last call must be announced by an interrupt.
  bool needs_interrupt();

  /// Asks the driver for a notification at the next chain. Returns true when one has come in the meantime: take it,
  /// since its notification may have been suppressed.
  bool ask_for_notification();
  /// While the device is looking at the queue anyway, notifications are a waste.
  void suppress_notification();

  /// Why take() said broken, or nullptr.
  [[nodiscard]] const char* error() const { return error_; }
  [[nodiscard]] u32 size() const { return size_; }

 private:
  struct Descriptor;

  VirtQueue(const GuestMemory& memory, u32 size, u64 features);
  Take broken(const char* reason);
  bool walk(Chain& chain, std::span<const u8> table, u32 table_size, u32 index, bool indirect);
  bool append(Chain& chain, const Descriptor& descriptor);
  [[nodiscard]] u16 available_index() const;

  const GuestMemory* memory_;
  u32 size_;
  bool event_index_;
  bool indirect_descriptors_;
  u8* descriptors_ = nullptr;
  u8* available_ = nullptr;
  u8* used_ = nullptr;
  u16 next_available_ = 0;
  u16 next_used_ = 0;
  u16 announced_used_ = 0;
  const char* error_ = nullptr;
};

}  // namespace anykvm::vmm
