// kvmclock's VM-wide half.
#include "paravirt/clock.h"

#include <cerrno>
#include <ctime>

#include "os/clock.h"
#include "os/tsc.h"

namespace anykvm::paravirt {
namespace {

constexpr u64 second = 1'000'000'000;

}  // namespace

TscScale tsc_scale(u64 tsc_hz) {
  // The multiplier is a 32-bit fraction with its top bit set: 2^31 <= multiplier < 2^32.
  TscScale scale;
  u128 ratio = (u128(second) << 64) / tsc_hz;  // ns per cycle, 64 fraction bits
  while (ratio >> 64) ratio >>= 1, ++scale.shift;
  while (!(ratio >> 63)) ratio <<= 1, --scale.shift;
  scale.multiplier = u32(ratio >> 32);
  return scale;
}

VmClock::VmClock()
    : invariant_(os::host_tsc_is_invariant()),
      scale_(tsc_scale(u64(os::host_tsc_khz()) * 1000)),
      base_count_(count()) {}

u64 VmClock::count() const {
  if (invariant_) return os::host_tsc();
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_RAW, &t);
  return u64(t.tv_sec) * second + u64(t.tv_nsec);
}

VmClock::Point VmClock::reference() const {
  u32 before, after;
  u64 base, ns;
  do {
    before = sequence_.load(std::memory_order_acquire);
    base = base_count_.load(std::memory_order_acquire);
    ns = base_ns_.load(std::memory_order_acquire);
    after = sequence_.load(std::memory_order_relaxed);
  } while (before != after || before & 1);
  if (invariant_) return {base, ns};
  return {os::host_tsc(), ns + (count() - base)};
}

u64 VmClock::now_ns() const {
  const Point p = reference();
  return invariant_ ? p.ns + scale_.ns(os::host_tsc() - p.tsc) : p.ns;
}

u32 VmClock::clock_flags() { return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC; }

int VmClock::get_clock(kvm_clock_data& data) const {
  data = {};
  if (!stable()) {
    data.clock = now_ns();
    return 0;
  }
  const os::ClockPair pair = os::read_tsc_and_clock(CLOCK_REALTIME);
  const Point p = reference();
  data.clock = p.ns + (pair.tsc > p.tsc ? scale_.ns(pair.tsc - p.tsc) : 0);
  data.realtime = pair.ns;
  data.host_tsc = pair.tsc;
  data.flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
  return 0;
}

int VmClock::set_clock(const kvm_clock_data& data) {
  if (data.flags & ~clock_flags()) return -EINVAL;
  u64 ns = data.clock;
  if (data.flags & KVM_CLOCK_REALTIME) {
    timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    const u64 now = u64(t.tv_sec) * second + u64(t.tv_nsec);
    if (now > data.realtime) ns += now - data.realtime;  // never backwards, whatever the host's clock did
  }
  const std::lock_guard lock(mutex_);
  sequence_.fetch_add(1, std::memory_order_acq_rel);
  base_count_.store(count(), std::memory_order_release);
  base_ns_.store(ns, std::memory_order_release);
  sequence_.fetch_add(1, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  return 0;
}

u64 VmClock::wall_clock_base_ns() const {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return u64(t.tv_sec) * second + u64(t.tv_nsec) - now_ns();
}

void VmClock::add_vcpu() {
  const std::lock_guard lock(mutex_);
  ++vcpus_;
}

void VmClock::remove_vcpu(const VcpuTsc& vcpu) {
  const std::lock_guard lock(mutex_);
  --vcpus_;
  if (vcpu.generation == tsc_generation_) --matched_;
  update_synchronized();
}

u64 VmClock::synchronize_tsc(VcpuTsc& vcpu, u64 value, u64 scaled_host_tsc, u32 guest_khz, bool by_client) {
  const std::lock_guard lock(mutex_);
  const u64 now = os::monotonic_ns();
  bool same = value == 0;
  if (!same && set_by_client_) {
    const u64 hz = u64(guest_khz) * 1000;
    const u64 expected = last_value_ + u64(u128(now - last_ns_) * guest_khz / 1'000'000);
    same = value < expected + hz && value + hz > expected;
  }
  if (by_client) set_by_client_ = true;
  same = same && guest_khz == last_khz_;
  const u64 offset = same ? offset_ : value - scaled_host_tsc;
  join(vcpu, same, offset, value, guest_khz, now);
  return offset;
}

void VmClock::adopt_tsc_offset(VcpuTsc& vcpu, u64 offset, u64 value, u32 guest_khz) {
  const std::lock_guard lock(mutex_);
  set_by_client_ = true;
  join(vcpu, guest_khz == last_khz_ && offset == offset_, offset, value, guest_khz, os::monotonic_ns());
}

void VmClock::join(VcpuTsc& vcpu, bool same, u64 offset, u64 value, u32 guest_khz, u64 now) {
  if (same) {
    if (vcpu.generation != tsc_generation_) ++matched_;
  } else {
    // A new generation; the others are out of step until they are written too.
    if (++tsc_generation_ == 0) ++tsc_generation_;
    matched_ = 1;
    offset_ = offset;
  }
  vcpu.generation = tsc_generation_;
  last_khz_ = guest_khz;
  last_value_ = value;
  last_ns_ = now;
  update_synchronized();
}

void VmClock::update_synchronized() {
  const bool all = matched_ >= vcpus_;
  if (synchronized_.exchange(all, std::memory_order_acq_rel) != all)
    generation_.fetch_add(1, std::memory_order_release);
}

}  // namespace anykvm::paravirt
