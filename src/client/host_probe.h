// Whether the host's /dev/kvm serves stock guests. That it can be opened says little: hosts without hardware
// virtualisation have a /dev/kvm that answers every query and then runs nothing, or only a part.
#pragma once

#include <chrono>
#include <string>

#include "anykvm/export.h"

namespace anykvm {

struct HostProbe {
  bool serves = false;
  std::string reason;  ///< one clause, as in "/dev/kvm: no such file or directory"
};

/// Runs a small guest on `path`, in a child process that is killed after `limit`: from protected mode it enables paging
/// and long mode, takes an interrupt of its local APIC and computes with SSE. Call it before the process has threads.
ANYKVM_API HostProbe probe_host_kvm(const std::string& path = "/dev/kvm",
                                    std::chrono::milliseconds limit = std::chrono::milliseconds(1500));

}  // namespace anykvm
