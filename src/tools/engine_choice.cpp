// The host's KVM when it serves, this library's engine otherwise.
#include "tools/engine_choice.h"

#include "client/host_probe.h"
#include "engine/engine.h"

namespace anykvm::tools {

EngineChoice choose_engine(const std::string& wish, bool maps_files) {
  if (wish == "host") return {.host = true, .name = "host", .reason = "asked for", .host_kvm = {}};
  if (wish != "auto") return {.host = false, .name = wish, .reason = "asked for", .host_kvm = {}};
  const HostProbe probe = probe_host_kvm();
  engine::Kind kind = engine::Kind::interpret;
  engine::parse_kind("auto", kind);
  if (maps_files && kind == engine::Kind::translate) kind = engine::Kind::direct;
  return {.host = probe.serves,
          .name = probe.serves ? "host" : engine::name_of(kind),
          .reason = probe.reason,
          .host_kvm = probe.reason};
}

std::shared_ptr<KvmDevice> open_engine(const EngineChoice& choice) {
  return choice.host ? KvmDevice::host() : KvmDevice::software(choice.name);
}

}  // namespace anykvm::tools
