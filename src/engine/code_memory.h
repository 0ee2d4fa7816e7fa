// How much host memory the vCPUs of one virtual machine may keep translations in: they share it, and each takes of it
// as it needs.
#pragma once

#include <atomic>
#include <cstddef>

#include "x86/types.h"

namespace anykvm::engine {

/// Counts units; the memory itself is each vCPU's own. Any thread; lock-free.
class CodeMemory {
 public:
  static constexpr std::size_t unit_bytes = 64u << 10;
  static constexpr std::size_t default_bytes = 64u << 20, least_bytes = 4u << 20, most_bytes = 1u << 30;
  /// What each vCPU may have even where all is taken.
  static constexpr u32 guaranteed = 23;

  /// bytes: brought to what is possible. Without: as many MiB as the environment variable ANYKVM_CODE_CACHE says.
  explicit CodeMemory(std::size_t bytes = wanted_bytes());
  CodeMemory(const CodeMemory&) = delete;
  CodeMemory& operator=(const CodeMemory&) = delete;

  void join() { members_.fetch_add(1, std::memory_order_relaxed); }
  /// What it has is free again.
  void leave(u32 held);

  /// So many more for a vCPU that has `held`. false: there are not enough; those who have more than their share are
  /// asked.
  bool take(u32 held, u32 units);
  /// Whether a vCPU that has `held` is to give some back.
  bool is_asked(u32 held) const { return taken() + wanted_.load(std::memory_order_relaxed) > units_ && held > share(); }
  void give_back(u32 units);

  u32 units() const { return units_; }  ///< in all
  u32 taken() const { return taken_.load(std::memory_order_relaxed); }

 private:
  static std::size_t wanted_bytes();
  u32 share() const;

  const u32 units_;
  std::atomic<u32> taken_{0}, members_{0};
  std::atomic<u32> wanted_{0};  ///< by somebody who has less than a share: nobody who has one takes more
};

}  // namespace anykvm::engine
