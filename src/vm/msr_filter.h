// Which MSRs the guest may touch, as the client has said: an immutable list of ranges, each with a bitmap.
// Reference: api.rst 4.97 KVM_X86_SET_MSR_FILTER.
#pragma once

#include <memory>
#include <vector>

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::vm {

class MsrFilter {
 public:
  /// 0 with `out` made (nullptr: everything is allowed); -EINVAL, -EFAULT.
  static int create(const kvm_msr_filter& filter, std::unique_ptr<const MsrFilter>& out);

  /// access: KVM_MSR_FILTER_READ or _WRITE. The local APIC's MSRs are never filtered.
  bool allows(u32 index, u32 access) const;

 private:
  struct Range {
    u32 flags;
    u32 base, count;
    std::vector<u8> bitmap;  ///< 1: allowed
  };
  bool default_allow_ = true;
  std::vector<Range> ranges_;
};

}  // namespace anykvm::vm
