#include "engine/code_memory.h"

#include <algorithm>
#include <cstdlib>

namespace anykvm::engine {

std::size_t CodeMemory::wanted_bytes() {
  const char* wish = std::getenv("ANYKVM_CODE_CACHE");
  const unsigned long mib = wish ? std::strtoul(wish, nullptr, 10) : 0;
  return mib ? std::min(mib, most_bytes >> 20) << 20 : default_bytes;
}

CodeMemory::CodeMemory(std::size_t bytes) : units_(u32(std::clamp(bytes, least_bytes, most_bytes) / unit_bytes)) {}

u32 CodeMemory::share() const {
  return std::max(guaranteed, units_ / std::max(1u, members_.load(std::memory_order_relaxed)));
}

bool CodeMemory::take(u32 held, u32 units) {
  if (held + units <= guaranteed) {
    taken_.fetch_add(units, std::memory_order_relaxed);
    return true;
  }
  const bool has_its_share = held + units > share();
  u32 taken = taken_.load(std::memory_order_relaxed);
  while (taken + units <= units_ && !(has_its_share && wanted_.load(std::memory_order_relaxed))) {
    if (!taken_.compare_exchange_weak(taken, taken + units, std::memory_order_relaxed)) continue;
    if (!has_its_share) wanted_.store(0, std::memory_order_relaxed);
    return true;
  }
  if (!has_its_share) wanted_.store(units, std::memory_order_relaxed);
  return false;
}

void CodeMemory::give_back(u32 units) { taken_.fetch_sub(units, std::memory_order_relaxed); }

void CodeMemory::leave(u32 held) {
  taken_.fetch_sub(held, std::memory_order_relaxed);
  members_.fetch_sub(1, std::memory_order_relaxed);
  wanted_.store(0, std::memory_order_relaxed);  // who still wants some asks again
}

}  // namespace anykvm::engine
