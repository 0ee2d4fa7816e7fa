// Which engine runs a guest here, and why.
#pragma once

#include <memory>
#include <string>

#include "anykvm/kvm_device.h"

namespace anykvm::tools {

struct EngineChoice {
  bool host = false;     ///< the host's /dev/kvm rather than this library's CPU engine
  std::string name;      ///< "host", or an engine of our own
  std::string reason;    ///< one clause
  std::string host_kvm;  ///< what the probe of /dev/kvm found; empty when it was not asked
};

/// `wish` is auto, host or an engine's name (engine/engine.h). Only auto asks the host. maps_files: guest RAM will be
/// what the engine `direct` needs.
EngineChoice choose_engine(const std::string& wish, bool maps_files = false);
std::shared_ptr<KvmDevice> open_engine(const EngineChoice& choice);

}  // namespace anykvm::tools
