// `anykvm run`: a KVM client that is not ours, with this library's KVM in the place of the host's.
#pragma once

#include <string>
#include <vector>

namespace anykvm::tools {

struct RunOptions {
  std::string engine = "auto";       ///< as choose_engine() takes it
  bool quiet = false;                ///< no announcement
  bool statistics = false;           ///< abi/statistics.h
  std::string trace;                 ///< file of vcpu/trace.h; empty: none
  std::vector<std::string> program;  ///< and its arguments; not empty
};

/// Becomes the program. Returns only when that fails, having said why on stderr: 126 and 127 as shells do, 69
/// (EX_UNAVAILABLE) when the interposer cannot be loaded into it.
int run_program(const RunOptions& options);

}  // namespace anykvm::tools
