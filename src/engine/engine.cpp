// Which engine runs: by name, by the environment, by the program.
#include "engine/engine.h"

#include <atomic>
#include <cstdlib>

namespace anykvm::engine {

namespace {
constexpr int unset = -1;
std::atomic<int> chosen{unset};
}  // namespace

bool parse_kind(std::string_view name, Kind& kind) {
  if (name == "interpret" || name == "auto" || name.empty()) {
    kind = Kind::interpret;
    return true;
  }
  if (name != "translate") return false;
  kind = Kind::translate;
  return true;
}

const char* name_of(Kind kind) { return kind == Kind::translate ? "translate" : "interpret"; }

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

std::unique_ptr<Engine> make(Kind kind) { return kind == Kind::translate ? make_translator() : make_interpreter(); }

}  // namespace anykvm::engine
