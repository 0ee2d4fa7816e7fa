// `anykvm top`: what the virtual CPUs of this user's processes do, from their counters.
#pragma once

#include <chrono>

namespace anykvm::tools {

struct TopOptions {
  std::chrono::nanoseconds interval = std::chrono::seconds(1);
  unsigned tables = 0;  ///< 0: until somebody ends it
  bool each_vcpu = false;
};

int top(const TopOptions& options);

}  // namespace anykvm::tools
