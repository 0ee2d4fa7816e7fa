// What keeps a VM: it lives while any descriptor of it or of its vCPUs is open, and its vCPUs live as long as it does,
// also after their own descriptors are closed (their ids stay taken, their local APICs stay on the bus), as in the
// kernel.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "abi/statistics.h"
#include "os/memory_file.h"

namespace anykvm::vm {
class Vm;
}
namespace anykvm::vcpu {
class Vcpu;
}

namespace anykvm::abi {

struct VmFile {
  explicit VmFile(std::shared_ptr<vm::Vm> machine) : vm(std::move(machine)) { begin_statistics(*this); }
  ~VmFile() { end_statistics(*this); }
  VmFile(const VmFile&) = delete;
  VmFile& operator=(const VmFile&) = delete;

  /// The order of destruction: first the vCPU, then the kvm_run pages that it points to; after all of them the VM.
  struct VcpuFile {
    os::Mapping run;
    std::shared_ptr<vcpu::Vcpu> vcpu;
  };

  const std::shared_ptr<vm::Vm> vm;
  std::mutex mutex;  ///< vcpus
  std::vector<VcpuFile> vcpus;
};

}  // namespace anykvm::abi
