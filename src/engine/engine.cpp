// Which engine runs: by name, by the environment, by the program.
#include "engine/engine.h"

#include <atomic>
#include <cstdlib>

#include "x86/cpuid.h"

namespace anykvm::engine {

namespace {
constexpr int unset = -1;
std::atomic<int> chosen{unset};
}  // namespace

bool runs_here(Kind kind) { return kind == Kind::interpret || x86::supports(x86::Feature::bmi2); }

bool parse_kind(std::string_view name, Kind& kind) {
  if (name == "auto" || name.empty()) {
    kind = runs_here(Kind::translate) ? Kind::translate : Kind::interpret;
    return true;
  }
  for (const Kind each : every_kind) {
    if (name != name_of(each)) continue;
    kind = each;
    return runs_here(kind);
  }
  return false;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::translate: return "translate";
    case Kind::translate_exact: return "translate-exact";
    case Kind::direct: return "direct";
    case Kind::lockstep: return "lockstep";
    default: return "interpret";
  }
}

bool default_kind(Kind& kind, const char** invalid) {
  if (const int set = chosen.load(std::memory_order_relaxed); set != unset) {
    kind = Kind(set);
    return true;
  }
  const char* wish = std::getenv("ANYKVM_ENGINE");
  if (parse_kind(wish ? wish : "auto", kind)) return true;
  if (invalid) *invalid = wish;
  return false;
}

void set_default_kind(Kind kind) { chosen.store(int(kind), std::memory_order_relaxed); }

std::unique_ptr<Engine> make(Kind kind, CodeMemory* memory) {
  switch (kind) {
    case Kind::translate: return make_translator(false, memory);
    case Kind::translate_exact: return make_translator(true, memory);
    case Kind::direct: return make_direct(memory);
    case Kind::lockstep: return make_lockstep();
    default: return make_interpreter();
  }
}

}  // namespace anykvm::engine
