// Whether the host's /dev/kvm serves stock guests. That it can be opened says little: hosts without hardware
// virtualisation have a /dev/kvm that answers every query and then runs nothing, or only a part.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "anykvm/kvm_device.h"

namespace anykvm {

struct HostProbe {
  bool serves = false;
  std::string reason;  ///< one clause, as in "/dev/kvm: no such file or directory"
};

/// Runs a small guest on `path`, in a child process that is killed after `limit`: from protected mode it enables paging
/// and long mode, takes an interrupt of its local APIC and computes with SSE. Call it before the process has threads.
HostProbe probe_host_kvm(const std::string& path = "/dev/kvm",
                         std::chrono::milliseconds limit = std::chrono::milliseconds(1500));

/// The probe's guest on any KVM, in this process and without a limit. `progress` is told each stage that the guest
/// reaches; false ends the run. Returns what went wrong, empty when nothing did. Throws KvmError.
std::string run_probe_guest(std::shared_ptr<KvmDevice> device, const std::function<bool(char stage)>& progress);

}  // namespace anykvm
