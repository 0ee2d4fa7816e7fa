// The vCPU's ioctls that are more than one typed call. Reference: Documentation/virt/kvm/api.rst, "vcpu ioctls".
#include <algorithm>
#include <vector>

#include "abi/capabilities.h"
#include "abi/limits.h"
#include "abi/msr_io.h"
#include "abi/variable_calls.h"
#include "anykvm/kvm.h"
#include "os/user_memory.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::abi {

long run(const Call& call) { return call.arg ? -EINVAL : call.vcpu->run(); }

long set_cpuid2(const Call& call) {
  kvm_cpuid2 header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  if (header.nent > max_cpuid_entries) return -E2BIG;
  std::vector<kvm_cpuid_entry2> entries(header.nent);
  const auto user_entries = reinterpret_cast<void*>(call.arg + offsetof(kvm_cpuid2, entries));
  if (!os::copy_from_user(entries.data(), user_entries, entries.size() * sizeof entries[0])) return -EFAULT;
  return call.vcpu->set_cpuid2(entries);
}

long get_cpuid2(const Call& call) {
  kvm_cpuid2 header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  std::vector<kvm_cpuid_entry2> entries(std::min(header.nent, max_cpuid_entries));
  u32 count = 0;
  // The header stays as it is when the entries do not fit.
  if (const int error = call.vcpu->get_cpuid2(entries, count); error < 0) return error;
  const auto user_entries = reinterpret_cast<void*>(call.arg + offsetof(kvm_cpuid2, entries));
  if (!os::copy_to_user(user_entries, entries.data(), count * sizeof entries[0])) return -EFAULT;
  header.nent = count;
  return os::put_user(call.arg, header) ? 0 : -EFAULT;
}

long get_msrs(const Call& call) {
  return msr_io(call.arg, /*write_back=*/true,
                [&](std::span<kvm_msr_entry> entries) { return call.vcpu->get_msrs(entries); });
}

long set_msrs(const Call& call) {
  return msr_io(call.arg, /*write_back=*/false,
                [&](std::span<kvm_msr_entry> entries) { return call.vcpu->set_msrs(entries); });
}

long set_lapic(const Call& call) {
  kvm_lapic_state state;
  if (os::get_user(state, call.arg)) return call.vcpu->set_lapic(state);
  return call.vcpu->vm().chips() ? -EFAULT : -EINVAL;  // what is wrong anyway comes first
}

long set_signal_mask(const Call& call) {
  if (!call.arg) return call.vcpu->set_signal_mask(nullptr);
  kvm_signal_mask header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  if (header.len != signal_mask_bytes) return -EINVAL;
  u64 mask;
  if (!os::get_user(mask, call.arg + offsetof(kvm_signal_mask, sigset))) return -EFAULT;
  return call.vcpu->set_signal_mask(&mask);
}

// --- XSAVE: one page, or what KVM_CAP_XSAVE2 reports when the components need more
// --------------------------------------

long get_xsave(const Call& call) {
  if (xsave2_size() > sizeof(kvm_xsave)) return -EINVAL;
  kvm_xsave area{};
  if (const int error = call.vcpu->get_xsave(area); error < 0) return error;
  return os::put_user(call.arg, area) ? 0 : -EFAULT;
}

long get_xsave2(const Call& call) {
  std::vector<u8> area(xsave2_size());
  if (const int error = call.vcpu->get_xsave2(area); error < 0) return error;
  return os::copy_to_user(reinterpret_cast<void*>(call.arg), area.data(), area.size()) ? 0 : -EFAULT;
}

long set_xsave(const Call& call) {
  std::vector<u8> area(xsave2_size());
  if (!os::copy_from_user(area.data(), reinterpret_cast<void*>(call.arg), area.size())) return -EFAULT;
  return call.vcpu->set_xsave(std::span<const u8>(area));
}

}  // namespace anykvm::abi
