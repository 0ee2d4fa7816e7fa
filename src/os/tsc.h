// The host's time stamp counter: its value, its frequency, and whether time can be kept by it.
#pragma once

#include "x86/types.h"

namespace anykvm::os {

inline u64 host_tsc() { return __builtin_ia32_rdtsc(); }

/// In kHz, found once a process at the first call: CPUID leaf 0x15 or the hypervisor's leaf 0x40000010 where they are
/// there, else measured against CLOCK_MONOTONIC_RAW for some 20 ms (to about 5 ppm). Never 0. Any thread.
u32 host_tsc_khz();

/// CPUID says that the TSC runs at one rate in all power states: guests may keep time by it.
bool host_tsc_is_invariant();

/// A TSC value and the clock at the same instant, to about 20 ns.
struct ClockPair {
  u64 tsc;
  u64 ns;
};
ClockPair read_tsc_and_clock(int clock_id);

}  // namespace anykvm::os
