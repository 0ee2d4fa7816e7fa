// How fast the host's TSC runs. A userspace process cannot ask the kernel, so it asks CPUID and measures; what CPUID
// says is taken only where the measurement agrees, since a hypervisor below may scale the TSC and still show the CPU's
// leaf.
#include "os/tsc.h"

#include <cpuid.h>

#include <ctime>
#include <initializer_list>

namespace anykvm::os {
namespace {

constexpr u64 measured_ns = 10'000'000;

u64 clock_ns(int clock_id) {
  timespec t;
  clock_gettime(clock_id, &t);
  return u64(t.tv_sec) * 1'000'000'000 + u64(t.tv_nsec);
}

u64 measure_hz() {
  const ClockPair begin = read_tsc_and_clock(CLOCK_MONOTONIC_RAW);
  const timespec pause = {0, long(measured_ns)};
  nanosleep(&pause, nullptr);
  ClockPair end = read_tsc_and_clock(CLOCK_MONOTONIC_RAW);
  while (end.ns - begin.ns < measured_ns) end = read_tsc_and_clock(CLOCK_MONOTONIC_RAW);
  return u64(u128(end.tsc - begin.tsc) * 1'000'000'000 / (end.ns - begin.ns));
}

/// CPUID's opinion in Hz, 0 for none.
u64 hypervisor_leaf_hz() {
  u32 a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 31)) return 0;
  __cpuid(0x40000000, a, b, c, d);
  if (a < 0x40000010 || a > 0x400000ff) return 0;
  __cpuid(0x40000010, a, b, c, d);
  return u64(a) * 1000;
}

u64 crystal_leaf_hz() {
  u32 denominator, numerator, crystal_hz, d;
  if (!__get_cpuid(0x15, &denominator, &numerator, &crystal_hz, &d) || !denominator) return 0;
  return u64(crystal_hz) * numerator / denominator;
}

u32 find_khz() {
  const u64 measured = measure_hz();
  for (const u64 said : {hypervisor_leaf_hz(), crystal_leaf_hz()}) {
    const u64 difference = said > measured ? said - measured : measured - said;
    if (said && difference < measured / 10'000) return u32((said + 500) / 1000);
  }
  return u32((measured + 500) / 1000);
}

}  // namespace

ClockPair read_tsc_and_clock(int clock_id) {
  ClockPair best{};
  u64 best_width = ~0ull;
  // The narrowest of some reads: whatever interrupts one makes it wide.
  for (int i = 0; i < 8; ++i) {
    const u64 before = host_tsc(), ns = clock_ns(clock_id), after = host_tsc();
    if (after - before < best_width) {
      best_width = after - before;
      best = {before + best_width / 2, ns};
    }
  }
  return best;
}

u32 host_tsc_khz() {
  static const u32 khz = find_khz();
  return khz;
}

bool host_tsc_is_invariant() {
  static const bool invariant = [] {
    u32 a, b, c, d;
    return __get_cpuid(0x80000007, &a, &b, &c, &d) && d >> 8 & 1;
  }();
  return invariant;
}

}  // namespace anykvm::os
