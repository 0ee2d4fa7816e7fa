// The VM's ioctls that are more than one typed call. Reference: Documentation/virt/kvm/api.rst, "vm ioctls".
#include <cstdio>
#include <vector>

#include "abi/capabilities.h"
#include "abi/descriptor_file.h"
#include "abi/limits.h"
#include "abi/variable_calls.h"
#include "abi/vm_file.h"
#include "anykvm/kvm.h"
#include "os/user_memory.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::abi {

long check_vm_extension(const Call& call) { return capability_value(call.arg); }

long create_vcpu(const Call& call) {
  // The kernel keeps ids in an int and refuses larger ones rather than cut them.
  if (call.arg >= vm::Vm::max_vcpu_ids) return -EINVAL;
  const u32 id = static_cast<u32>(call.arg);
  char name[32];
  std::snprintf(name, sizeof name, "kvm-vcpu:%u", id);
  const int fd = create_descriptor_file(name, FdKind::vcpu, vcpu_mmap_size + stats_page_size);
  if (fd < 0) return fd;

  VmFile::VcpuFile file;
  file.run = os::Mapping(fd, vcpu_mmap_size);
  os::Mapping stats(fd, stats_page_size, vcpu_mmap_size);
  // Published under the lock, so that the vCPU is kept from the moment its number means something.
  const std::lock_guard lock(call.file->mutex);
  call.file->vcpus.reserve(call.file->vcpus.size() + 1);  // the last thing that can fail
  int error = file.run.data() && stats.data()
                  ? call.vm->create_vcpu(id, static_cast<kvm_run*>(file.run.data()), file.vcpu)
                  : -ENOMEM;
  if (error >= 0) file.vcpu->publish_stats(std::move(stats));
  if (error >= 0) error = install_descriptor(fd, {FdKind::vcpu, call.vm, file.vcpu.get(), call.file});
  if (error < 0) {
    os::close_file(fd);
    return error;
  }
  call.file->vcpus.push_back(std::move(file));
  return fd;
}

long set_identity_map_addr(const Call& call) {
  u64 address;
  if (os::get_user(address, call.arg)) return call.vm->set_identity_map_addr(address);
  return call.vm->vcpus().empty() ? -EFAULT : -EINVAL;  // what is wrong anyway comes first
}

long set_gsi_routing(const Call& call) {
  kvm_irq_routing header;
  if (!os::get_user(header, call.arg)) return -EFAULT;
  if (header.nr > max_irq_routes || header.flags) return -EINVAL;
  std::vector<kvm_irq_routing_entry> entries(header.nr);
  const auto user_entries = reinterpret_cast<void*>(call.arg + offsetof(kvm_irq_routing, entries));
  if (!os::copy_from_user(entries.data(), user_entries, entries.size() * sizeof entries[0])) return -EFAULT;
  return call.vm->set_gsi_routing(header.flags, entries);
}

}  // namespace anykvm::abi
