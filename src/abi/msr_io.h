// KVM_GET_MSRS and KVM_SET_MSRS: a counted list in and, for the former, out again; the result is how many were done.
// Reference: Documentation/virt/kvm/api.rst 4.18, 4.19.
#pragma once

#include <array>
#include <cerrno>
#include <span>

#include "abi/limits.h"
#include "anykvm/kvm.h"
#include "os/user_memory.h"

namespace anykvm::abi {

/// access: int(std::span<kvm_msr_entry>), the number done or -errno.
template <class Access>
long msr_io(u64 user, bool write_back, Access access) {
  kvm_msrs header;
  if (!os::get_user(header, user)) return -EFAULT;
  if (header.nmsrs >= max_io_msrs) return -E2BIG;
  std::array<kvm_msr_entry, max_io_msrs> buffer;
  const std::span entries(buffer.data(), header.nmsrs);
  const auto user_entries = reinterpret_cast<void*>(user + offsetof(kvm_msrs, entries));
  if (!os::copy_from_user(entries.data(), user_entries, entries.size_bytes())) return -EFAULT;
  const int done = access(entries);
  if (done < 0) return done;
  if (write_back && !os::copy_to_user(user_entries, entries.data(), entries.size_bytes())) return -EFAULT;
  return done;
}

}  // namespace anykvm::abi
