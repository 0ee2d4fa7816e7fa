// Random tests of 16- and 32-bit protected mode and virtual-8086 mode for the monitor: an image of guest memory.
#pragma once

#include <string>
#include <vector>

#include "x86/types.h"

namespace anykvm::oracle {

inline constexpr u64 guest_ram = 8 << 20;

/// The memory of a guest with `count` tests, ready to start at MONITOR_BOOT in real mode.
std::vector<u8> legacy_guest(u64 seed, unsigned count);

/// How many tests have ended.
unsigned tests_done(const std::vector<u8>& memory);

/// The first test whose log entries differ, -1: none.
int first_difference(const std::vector<u8>& left, const std::vector<u8>& right, unsigned count);

/// The test's input and both log entries, for people.
std::string describe(const std::vector<u8>& image, const std::vector<u8>& ours, const std::vector<u8>& theirs,
                     unsigned test);

}  // namespace anykvm::oracle
