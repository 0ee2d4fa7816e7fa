// The table of extensions: what KVM_CHECK_EXTENSION answers, `anykvm info` prints and docs/ioctls.md lists. It reports
// exactly what works.
#pragma once

#include <span>
#include <string_view>

#include "x86/types.h"

namespace anykvm::abi {

struct Capability {
  u32 number;
  std::string_view name;
  int (*value)();
};

/// Sorted by number.
std::span<const Capability> capabilities();

/// KVM_CHECK_EXTENSION on the system and on a VM: 0 for what is not there.
int capability_value(u64 number);

/// KVM_CAP_XSAVE2: bytes of KVM_GET_XSAVE2 and KVM_SET_XSAVE.
u32 xsave2_size();

}  // namespace anykvm::abi
