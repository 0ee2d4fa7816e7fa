#include "vm/ioeventfd.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

namespace anykvm::vm {

int IoEventFds::ioctl(const kvm_ioeventfd& args) {
  const Bus bus = args.flags & KVM_IOEVENTFD_FLAG_PIO                 ? Bus::pio
                  : args.flags & KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY ? Bus::ccw
                                                                      : Bus::mmio;
  return args.flags & KVM_IOEVENTFD_FLAG_DEASSIGN ? deassign(args, bus) : assign(args, bus);
}

int IoEventFds::assign(const kvm_ioeventfd& args, Bus bus) {
  if (args.len > 8 || (args.len & (args.len - 1))) return -EINVAL;
  if (args.addr + args.len < args.addr) return -EINVAL;
  if (args.flags & ~KVM_IOEVENTFD_VALID_FLAG_MASK) return -EINVAL;
  const bool wildcard = !(args.flags & KVM_IOEVENTFD_FLAG_DATAMATCH);
  if (args.len == 0 && !wildcard) return -EINVAL;

  Entry entry{bus, args.addr, args.len, wildcard, wildcard ? 0 : args.datamatch, {}};
  if (const int error = EventFd::open(args.fd, entry.event)) return error;

  std::lock_guard lock(mutex_);
  for (const Entry& other : entries_) {
    if (other.bus != bus || other.address != entry.address) continue;
    const bool any_length = other.length == 0 || entry.length == 0;
    const bool same_data = other.wildcard || wildcard || other.match == entry.match;
    if (any_length || (other.length == entry.length && same_data)) return -EEXIST;
  }
  const auto position = std::ranges::upper_bound(entries_, entry.address, {}, &Entry::address);
  entries_.insert(position, std::move(entry));
  count_.store(static_cast<u32>(entries_.size()), std::memory_order_relaxed);
  return 0;
}

int IoEventFds::deassign(const kvm_ioeventfd& args, Bus bus) {
  u64 identity;
  if (const int error = EventFd::identify(args.fd, identity)) return error;
  const bool wildcard = !(args.flags & KVM_IOEVENTFD_FLAG_DATAMATCH);

  std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(entries_, [&](const Entry& entry) {
    return entry.bus == bus && entry.event.identity() == identity && entry.address == args.addr &&
           entry.length == args.len && entry.wildcard == wildcard && (wildcard || entry.match == args.datamatch);
  });
  if (found == entries_.end()) return -ENOENT;
  entries_.erase(found);
  count_.store(static_cast<u32>(entries_.size()), std::memory_order_relaxed);
  return 0;
}

bool IoEventFds::write_slow(Bus bus, u64 address, const void* data, unsigned length) const {
  u64 value = 0;
  std::memcpy(&value, data, length);
  std::shared_lock lock(mutex_);
  for (auto entry = std::ranges::lower_bound(entries_, address, {}, &Entry::address);
       entry != entries_.end() && entry->address == address; ++entry) {
    if (entry->bus != bus) continue;
    if (entry->length != 0 && (entry->length != length || (!entry->wildcard && entry->match != value))) continue;
    entry->event.signal();
    return true;
  }
  return false;
}

}  // namespace anykvm::vm
