#include "vm/msr_filter.h"

#include <algorithm>
#include <cerrno>

#include "os/user_memory.h"

namespace anykvm::vm {

int MsrFilter::create(const kvm_msr_filter& filter, std::unique_ptr<const MsrFilter>& out) {
  constexpr u64 max_bitmap_bytes = 0x600;
  if (filter.flags & ~KVM_MSR_FILTER_DEFAULT_DENY) return -EINVAL;
  const bool empty = std::ranges::all_of(filter.ranges, [](const auto& range) { return range.nmsrs == 0; });
  const bool deny = filter.flags & KVM_MSR_FILTER_DEFAULT_DENY;
  if (empty && deny) return -EINVAL;

  auto made = std::make_unique<MsrFilter>();
  made->default_allow_ = !deny;
  for (const kvm_msr_filter_range& range : filter.ranges) {
    if (range.nmsrs == 0) continue;
    if (range.flags & ~(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE) || range.flags == 0) return -EINVAL;
    const u64 bytes = (u64{range.nmsrs} + 63) / 64 * 8;
    if (bytes > max_bitmap_bytes) return -EINVAL;
    Range added{range.flags, range.base, range.nmsrs, std::vector<u8>(bytes)};
    if (!os::copy_from_user(added.bitmap.data(), range.bitmap, bytes)) return -EFAULT;
    made->ranges_.push_back(std::move(added));
  }
  out = empty ? nullptr : std::move(made);
  return 0;
}

bool MsrFilter::allows(u32 index, u32 access) const {
  if (index >= 0x800 && index <= 0x8ff) return true;
  for (const Range& range : ranges_) {
    const u32 offset = index - range.base;
    if (offset < range.count && range.flags & access) return range.bitmap[offset / 8] >> offset % 8 & 1;
  }
  return default_allow_;
}

}  // namespace anykvm::vm
