// The parts of the command line that are more than a number or a word. Each throws CLI::ValidationError with one
// clause.
#pragma once

#include <chrono>
#include <string>

#include "vmm/machine.h"
#include "x86/types.h"

namespace anykvm::tools {

/// "512M", "2G", "65536K"; a bare number is MiB. In bytes.
u64 parse_memory(const std::string& text);
/// "30", "1.5", "30s", "5m". More than zero.
std::chrono::nanoseconds parse_duration(const std::string& option, const std::string& text);
/// "FILE" or "FILE,ro".
vmm::DiskOption parse_disk(const std::string& text);

}  // namespace anykvm::tools
