#include "vmm/virtio/queue.h"

#include <linux/virtio_config.h>
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

namespace anykvm::vmm {

namespace {

// Offsets of vring_avail and vring_used; the flexible arrays of the kernel's structures are addressed by hand, because
// the driver on another thread writes them at any time: each field is one atomic access.
constexpr size_t flags_offset = 0;
constexpr size_t index_offset = 2;
constexpr size_t ring_offset = 4;
constexpr size_t available_entry = sizeof(u16);
constexpr size_t used_entry = sizeof(vring_used_elem);

u16 load(const u8* address, std::memory_order order = std::memory_order_relaxed) {
  return std::atomic_ref(*reinterpret_cast<u16*>(const_cast<u8*>(address))).load(order);
}

void store(u8* address, u16 value, std::memory_order order = std::memory_order_relaxed) {
  std::atomic_ref(*reinterpret_cast<u16*>(address)).store(value, order);
}

}  // namespace

struct VirtQueue::Descriptor : vring_desc {};

void Buffers::append(std::span<u8> piece) {
  pieces_.push_back({piece.data(), piece.size()});
  bytes_ += piece.size();
}

size_t Buffers::copy_out(u64 offset, std::span<u8> to) const {
  size_t done = 0;
  for (const iovec& piece : pieces_) {
    if (done == to.size()) break;
    if (offset >= piece.iov_len) {
      offset -= piece.iov_len;
      continue;
    }
    const size_t count = std::min<u64>(piece.iov_len - offset, to.size() - done);
    std::memcpy(to.data() + done, static_cast<const u8*>(piece.iov_base) + offset, count);
    done += count;
    offset = 0;
  }
  return done;
}

size_t Buffers::copy_in(u64 offset, std::span<const u8> from) const {
  size_t done = 0;
  for (const iovec& piece : pieces_) {
    if (done == from.size()) break;
    if (offset >= piece.iov_len) {
      offset -= piece.iov_len;
      continue;
    }
    const size_t count = std::min<u64>(piece.iov_len - offset, from.size() - done);
    std::memcpy(static_cast<u8*>(piece.iov_base) + offset, from.data() + done, count);
    done += count;
    offset = 0;
  }
  return done;
}

void Buffers::drop_front(u64 count) {
  bytes_ -= count;
  size_t whole = 0;
  while (whole < pieces_.size() && count >= pieces_[whole].iov_len) count -= pieces_[whole++].iov_len;
  pieces_.erase(pieces_.begin(), pieces_.begin() + static_cast<std::ptrdiff_t>(whole));
  if (count == 0) return;
  pieces_.front().iov_base = static_cast<u8*>(pieces_.front().iov_base) + count;
  pieces_.front().iov_len -= count;
}

void Buffers::drop_back(u64 count) {
  bytes_ -= count;
  while (!pieces_.empty() && count >= pieces_.back().iov_len) {
    count -= pieces_.back().iov_len;
    pieces_.pop_back();
  }
  if (count != 0) pieces_.back().iov_len -= count;
}

VirtQueue::VirtQueue(const GuestMemory& memory, u32 size, u64 features)
    : memory_(&memory),
      size_(size),
      event_index_((features >> VIRTIO_RING_F_EVENT_IDX) & 1),
      indirect_descriptors_((features >> VIRTIO_RING_F_INDIRECT_DESC) & 1) {}

std::expected<VirtQueue, const char*> VirtQueue::make(const GuestMemory& memory, const QueueLayout& layout,
                                                      u64 features) {
  if (!std::has_single_bit(layout.size) || layout.size > max_size) {
    return std::unexpected("queue size is not a power of two within the limit");
  }
  if (layout.descriptors % VRING_DESC_ALIGN_SIZE != 0 || layout.available % VRING_AVAIL_ALIGN_SIZE != 0 ||
      layout.used % VRING_USED_ALIGN_SIZE != 0) {
    return std::unexpected("queue address is not aligned");
  }
  // Each ring ends with one u16 for the event index, negotiated or not.
  const auto descriptors = memory.at(layout.descriptors, layout.size * sizeof(vring_desc));
  const auto available = memory.at(layout.available, ring_offset + layout.size * available_entry + sizeof(u16));
  const auto used = memory.at(layout.used, ring_offset + layout.size * used_entry + sizeof(u16));
  if (descriptors.empty() || available.empty() || used.empty()) {
    return std::unexpected("queue address is outside guest memory");
  }
  VirtQueue queue(memory, layout.size, features);
  queue.descriptors_ = descriptors.data();
  queue.available_ = available.data();
  queue.used_ = used.data();
  return queue;
}

u16 VirtQueue::available_index() const { return load(available_ + index_offset, std::memory_order_acquire); }

VirtQueue::Take VirtQueue::broken(const char* reason) {
  error_ = reason;
  return Take::broken;
}

VirtQueue::Take VirtQueue::take(Chain& chain) {
  if (error_ != nullptr) return Take::broken;
  // Acquire: the ring entry and the descriptors were written before the index that announces them.
  const u16 waiting = static_cast<u16>(available_index() - next_available_);
  if (waiting == 0) return Take::empty;
  if (waiting > size_) return broken("available index runs ahead of the ring");
  chain.head = load(available_ + ring_offset + (next_available_ & (size_ - 1)) * available_entry);
  chain.readable.clear();
  chain.writable.clear();
  if (!walk(chain, {descriptors_, size_ * sizeof(vring_desc)}, size_, chain.head, false)) return Take::broken;
  ++next_available_;
  return Take::chain;
}

// Follows one table from `index`. A chain that visits more descriptors than the table has is a loop.
bool VirtQueue::walk(Chain& chain, std::span<const u8> table, u32 table_size, u32 index, bool indirect) {
  for (u32 visited = 0; visited < table_size; ++visited) {
    if (index >= table_size) {
      error_ = "descriptor index is outside its table";
      return false;
    }
    Descriptor descriptor;  // a copy: the driver may change the original under our feet
    std::memcpy(&descriptor, table.data() + index * sizeof(vring_desc), sizeof(vring_desc));
    if (descriptor.flags & VRING_DESC_F_INDIRECT) {
      if (indirect || !indirect_descriptors_ || (descriptor.flags & VRING_DESC_F_NEXT)) {
        error_ = "indirect descriptor where none may be";
        return false;
      }
      const u32 entries = descriptor.len / sizeof(vring_desc);
      if (entries == 0 || entries > max_size || descriptor.len % sizeof(vring_desc) != 0) {
        error_ = "indirect table has an impossible size";
        return false;
      }
      const auto inner = memory_->at(descriptor.addr, descriptor.len);
      if (inner.empty()) {
        error_ = "indirect table is outside guest memory";
        return false;
      }
      return walk(chain, inner, entries, 0, true);
    }
    if (!append(chain, descriptor)) return false;
    if (!(descriptor.flags & VRING_DESC_F_NEXT)) return true;
    index = descriptor.next;
  }
  error_ = "descriptor chain is a loop";
  return false;
}

bool VirtQueue::append(Chain& chain, const Descriptor& descriptor) {
  const bool writable = descriptor.flags & VRING_DESC_F_WRITE;
  if (!writable && !chain.writable.pieces().empty()) {
    error_ = "readable descriptor behind a writable one";
    return false;
  }
  if (descriptor.len == 0) return true;
  const auto piece = memory_->at(descriptor.addr, descriptor.len);
  if (piece.empty()) {
    error_ = "descriptor points outside guest memory";
    return false;
  }
  (writable ? chain.writable : chain.readable).append(piece);
  if (chain.readable.bytes() + chain.writable.bytes() > max_chain_bytes) {
    error_ = "descriptor chain is longer than 4 GiB";
    return false;
  }
  return true;
}

void VirtQueue::give_back(const Chain& chain, u32 written) {
  const vring_used_elem element{.id = chain.head, .len = written};
  std::memcpy(used_ + ring_offset + (next_used_ & (size_ - 1)) * used_entry, &element, sizeof(element));
  ++next_used_;
  // Release: the buffers and the entry are complete when the driver sees the index.
  store(used_ + index_offset, next_used_, std::memory_order_release);
}

bool VirtQueue::needs_interrupt() {
  if (announced_used_ == next_used_) return false;
  // The driver writes its wish and then looks at the used index; we wrote the index and now look at its wish. Both need
  // a full barrier in between, or both could miss the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const u16 before = announced_used_;
  announced_used_ = next_used_;
  if (!event_index_) return !(load(available_ + flags_offset) & VRING_AVAIL_F_NO_INTERRUPT);
  const u16 wanted = load(available_ + ring_offset + size_ * available_entry);
  return static_cast<u16>(next_used_ - wanted - 1) < static_cast<u16>(next_used_ - before);
}

bool VirtQueue::ask_for_notification() {
  if (error_ != nullptr) return false;
  if (event_index_) {
    store(used_ + ring_offset + size_ * used_entry, next_available_);
  } else {
    store(used_ + flags_offset, 0);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return available_index() != next_available_;
}

void VirtQueue::suppress_notification() {
  // With the event index an old value already suppresses: it lies behind all that the driver will announce.
  if (!event_index_) store(used_ + flags_offset, VRING_USED_F_NO_NOTIFY);
}

}  // namespace anykvm::vmm
