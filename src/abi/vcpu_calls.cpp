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

/// The form of 2006, without subleaves.
long set_cpuid(const Call& call) {
  kvm_cpuid header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  if (header.nent > max_cpuid_entries) return -E2BIG;
  std::vector<kvm_cpuid_entry> entries(header.nent);
  const auto user_entries = reinterpret_cast<void*>(call.arg + offsetof(kvm_cpuid, entries));
  if (!os::copy_from_user(entries.data(), user_entries, entries.size() * sizeof entries[0])) return -EFAULT;
  std::vector<kvm_cpuid_entry2> entries2;
  entries2.reserve(entries.size());
  for (const kvm_cpuid_entry& e : entries)
    entries2.push_back({.function = e.function, .eax = e.eax, .ebx = e.ebx, .ecx = e.ecx, .edx = e.edx});
  return call.vcpu->set_cpuid2(entries2);
}

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
  return call.vcpu->vm().has_local_apics() ? -EFAULT : -EINVAL;  // what is wrong anyway comes first
}

long set_vapic_addr(const Call& call) {
  if (!call.vm->has_local_apics()) return -EINVAL;
  kvm_vapic_addr address;
  return os::get_user(address, call.arg) ? call.vcpu->set_vapic_addr(address.vapic_addr) : -EFAULT;
}

/// What is left to do is told even when it fails.
long pre_fault_memory(const Call& call) {
  kvm_pre_fault_memory range;
  if (!os::get_user(range, call.arg)) return -EFAULT;
  const int result = call.vm->pre_fault_memory(range);
  return os::put_user(call.arg, range) ? result : -EFAULT;
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

// --- KVM_VCPU_TSC_CTRL's attribute of KVM_HAS/GET/SET_DEVICE_ATTR
// -----------------------------------------------------------

namespace {

int vcpu_attr(const Call& call, kvm_device_attr& attr) {
  if (!os::get_user(attr, call.arg)) return -EFAULT;
  return attr.group == KVM_VCPU_TSC_CTRL && attr.attr == KVM_VCPU_TSC_OFFSET ? 0 : -ENXIO;
}

}  // namespace

long has_vcpu_attr(const Call& call) {
  kvm_device_attr attr;
  return vcpu_attr(call, attr);
}

long get_vcpu_attr(const Call& call) {
  kvm_device_attr attr;
  if (const int error = vcpu_attr(call, attr)) return error;
  return os::put_user(attr.addr, call.vcpu->tsc_offset()) ? 0 : -EFAULT;
}

long set_vcpu_attr(const Call& call) {
  kvm_device_attr attr;
  if (const int error = vcpu_attr(call, attr)) return error;
  u64 offset;
  if (!os::get_user(offset, attr.addr)) return -EFAULT;
  call.vcpu->set_tsc_offset(offset);
  return 0;
}

}  // namespace anykvm::abi
