// The ioctls of the system descriptor. Reference: Documentation/virt/kvm/api.rst, "system ioctls".
#include <unistd.h>

#include <algorithm>
#include <new>
#include <vector>

#include "abi/capabilities.h"
#include "abi/descriptor_file.h"
#include "abi/limits.h"
#include "abi/msr_io.h"
#include "abi/variable_calls.h"
#include "abi/vm_file.h"
#include "anykvm/kvm.h"
#include "os/fault_guard.h"
#include "os/user_memory.h"
#include "vm/vm.h"
#include "x86/cpuid.h"
#include "x86/msr.h"

namespace anykvm::abi {

long get_api_version(const Call& call) { return call.arg ? -EINVAL : KVM_API_VERSION; }

long get_vcpu_mmap_size(const Call& call) { return call.arg ? -EINVAL : static_cast<long>(vcpu_mmap_size); }

long check_system_extension(const Call& call) { return capability_value(call.arg); }

long create_vm(const Call& call) {
  os::install_fault_handlers();
  // The descriptor first: without one there is no VM to take back.
  const int fd = create_descriptor_file("kvm-vm", FdKind::vm, stats_page_size);
  if (fd < 0) return fd;
  os::Mapping stats(fd, stats_page_size);
  std::shared_ptr<vm::Vm> machine;
  int error = stats.data() ? vm::Vm::create(call.arg, machine) : -ENOMEM;
  if (error >= 0) {
    vm::Vm* const vm = machine.get();
    vm->publish_stats(std::move(stats));
    error = install_descriptor(fd, {FdKind::vm, vm, nullptr, std::make_shared<VmFile>(std::move(machine))});
  }
  if (error < 0) {
    os::close_file(fd);
    return error;
  }
  return fd;
}

namespace {

/// A list of MSR numbers: the header tells the room and gets the number of entries, whether they fit or not.
long copy_msr_list(u64 user, std::span<const u32> indices) {
  kvm_msr_list header;
  if (!os::get_user(header, user)) return -EFAULT;
  const u32 room = header.nmsrs;
  header.nmsrs = static_cast<u32>(indices.size());
  if (!os::put_user(user, header)) return -EFAULT;
  if (room < header.nmsrs) return -E2BIG;
  const auto target = reinterpret_cast<void*>(user + offsetof(kvm_msr_list, indices));
  return os::copy_to_user(target, indices.data(), indices.size_bytes()) ? 0 : -EFAULT;
}

/// Entries for a buffer that has room for header.nent, which becomes their number; it stays as it is on failure.
long copy_cpuid(u64 user, kvm_cpuid2 header, std::span<const kvm_cpuid_entry2> entries) {
  if (header.nent < std::max<std::size_t>(entries.size(), 1)) return -E2BIG;
  header.nent = static_cast<u32>(entries.size());
  const auto target = reinterpret_cast<void*>(user + offsetof(kvm_cpuid2, entries));
  if (!os::copy_to_user(target, entries.data(), entries.size_bytes())) return -EFAULT;
  return os::put_user(user, header) ? 0 : -EFAULT;
}

}  // namespace

long get_msr_index_list(const Call& call) { return copy_msr_list(call.arg, x86::msr_index_list()); }

long get_msr_feature_index_list(const Call& call) { return copy_msr_list(call.arg, x86::msr_feature_index_list()); }

long get_supported_cpuid(const Call& call) {
  kvm_cpuid2 header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  return copy_cpuid(call.arg, header, x86::supported_cpuid());
}

long get_emulated_cpuid(const Call& call) {
  kvm_cpuid2 header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  if (header.nent < 1) return -E2BIG;
  // This one call insists on clean padding in the entries it is going to fill.
  for (u32 i = 0; i < std::min(header.nent, max_cpuid_entries); ++i) {
    kvm_cpuid_entry2 entry;
    if (!os::get_user(entry, call.arg + offsetof(kvm_cpuid2, entries) + i * sizeof entry)) return -EINVAL;
    if (entry.padding[0] | entry.padding[1] | entry.padding[2]) return -EINVAL;
  }
  return copy_cpuid(call.arg, header, x86::emulated_cpuid());
}

long get_feature_msrs(const Call& call) {
  return msr_io(call.arg, /*write_back=*/true, [](std::span<kvm_msr_entry> entries) {
    u32 done = 0;
    for (kvm_msr_entry& entry : entries) {
      u64 value = 0;
      if (!x86::get_feature_msr(entry.index, value)) break;
      entry.data = value;
      ++done;
    }
    return static_cast<int>(done);
  });
}

long get_mce_cap_supported(const Call& call) { return os::put_user(call.arg, x86::mce_cap_supported) ? 0 : -EFAULT; }

// --- KVM_X86_GRP_SYSTEM's attributes of KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR
// ---------------------------------------

namespace {

int system_attr(const Call& call, kvm_device_attr& attr, u64& value) {
  if (!os::get_user(attr, call.arg)) return -EFAULT;
  if (attr.group != 0 || attr.attr != KVM_X86_XCOMP_GUEST_SUPP) return -ENXIO;
  value = x86::supported_xcr0();
  return 0;
}

}  // namespace

long has_system_attr(const Call& call) {
  kvm_device_attr attr;
  u64 value;
  return system_attr(call, attr, value);
}

long get_system_attr(const Call& call) {
  kvm_device_attr attr;
  u64 value;
  if (const int error = system_attr(call, attr, value)) return error;
  return os::put_user(attr.addr, value) ? 0 : -EFAULT;
}

}  // namespace anykvm::abi
