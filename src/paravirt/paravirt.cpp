// One vCPU's paravirtual MSRs, its clock page, wall clock and PV EOI flag. steal_time.cpp and hypercalls.cpp have the
// rest.
#include "paravirt/paravirt.h"

#include <asm/kvm_para.h>

#include <cerrno>
#include <cstring>

#include "os/clock.h"
#include "os/tsc.h"

namespace anykvm::paravirt {
namespace {

using MsrResult = x86::Machine::MsrResult;

constexpr u32 msr_tsc = 0x10, msr_tsc_adjust = 0x3b;

/// The guest's page; the kernel's pvclock ABI.
struct ClockPage {
  u32 version;
  u32 pad0;
  u64 tsc_timestamp;
  u64 system_time;
  u32 tsc_to_system_mul;
  s8 tsc_shift;
  u8 flags;
  u8 pad[2];
};
static_assert(sizeof(ClockPage) == 32);
constexpr u8 page_tsc_stable = 1, page_guest_stopped = 2;

struct WallClock {
  u32 version, seconds, nanoseconds;
};

/// x86 stores are seen in order; only the compiler must be kept from moving them.
void ordered() { __asm__ volatile("" ::: "memory"); }

}  // namespace

Paravirt::Paravirt(x86::Cpu& cpu, VmClock& clock, u32 tsc_khz) : cpu_(cpu), clock_(clock) {
  clock_.add_vcpu();
  if (set_tsc_khz(tsc_khz) != 0) (void)set_tsc_khz(0);
  set_tsc(0, false);
}

Paravirt::~Paravirt() { clock_.remove_vcpu(tsc_); }

void Paravirt::reset() {
  system_time_ = steal_time_ = pv_eoi_ = async_pf_ = async_pf_int_ = 0;
  poll_control_ = 1;
  clock_pending_ = wall_clock_pending_ = guest_stopped_ = preempted_shown_ = false;
  if (apic_) apic_->set_pv_eoi(nullptr);
}

bool Paravirt::has(unsigned feature) const {
  return !enforce_features_ || cpu_.cpuid.word(x86::CpuidWord::kvm_eax) >> feature & 1;
}

// --- guest memory ---------------------------------------------------------------------------------------------------

u8* Paravirt::guest_memory(Gpa gpa, unsigned size) {
  const u64 offset = gpa & ~page_mask;
  if (offset + size > page_size) return nullptr;
  const x86::HostPage page = cpu_.machine.page(gpa & page_mask, true);
  return page.host && page.writable ? page.host + offset : nullptr;
}

bool Paravirt::write_guest(Gpa gpa, const void* data, unsigned size) {
  const unsigned first = unsigned(page_size - (gpa & ~page_mask));
  const unsigned here = size < first ? size : first;
  u8* low = guest_memory(gpa, here);
  u8* high = here < size ? guest_memory(gpa + here, size - here) : low;
  if (!low || !high) return false;
  std::memcpy(low, data, here);
  if (here < size) std::memcpy(high, static_cast<const u8*>(data) + here, size - here);
  return true;
}

// --- MSRs -----------------------------------------------------------------------------------------------------------

MsrResult Paravirt::read_msr(u32 index, u64& value, x86::Initiator) {
  auto when = [&](unsigned feature, u64 content) {
    if (!has(feature)) return MsrResult::not_mine;
    value = content;
    return MsrResult::ok;
  };
  switch (index) {
    case MSR_KVM_SYSTEM_TIME: return when(KVM_FEATURE_CLOCKSOURCE, system_time_);
    case MSR_KVM_SYSTEM_TIME_NEW: return when(KVM_FEATURE_CLOCKSOURCE2, system_time_);
    case MSR_KVM_WALL_CLOCK: return when(KVM_FEATURE_CLOCKSOURCE, clock_.wall_clock_msr);
    case MSR_KVM_WALL_CLOCK_NEW: return when(KVM_FEATURE_CLOCKSOURCE2, clock_.wall_clock_msr);
    case MSR_KVM_STEAL_TIME: return when(KVM_FEATURE_STEAL_TIME, steal_time_);
    case MSR_KVM_ASYNC_PF_EN: return when(KVM_FEATURE_ASYNC_PF, async_pf_);
    case MSR_KVM_ASYNC_PF_INT: return when(KVM_FEATURE_ASYNC_PF_INT, async_pf_int_);
    case MSR_KVM_ASYNC_PF_ACK: return when(KVM_FEATURE_ASYNC_PF_INT, 0);
    case MSR_KVM_PV_EOI_EN: return when(KVM_FEATURE_PV_EOI, pv_eoi_);
    case MSR_KVM_POLL_CONTROL: return when(KVM_FEATURE_POLL_CONTROL, poll_control_);
  }
  return MsrResult::not_mine;
}

MsrResult Paravirt::write_msr(u32 index, u64 value, x86::Initiator initiator) {
  const bool host = initiator == x86::Initiator::host;
  switch (index) {
    case msr_tsc:
      if (host) return set_tsc(value, true), MsrResult::ok;
      [[fallthrough]];
    case msr_tsc_adjust:
      if (!x86::set_msr(cpu_, index, value, initiator)) return MsrResult::gp;
      tsc_changed();
      if (!host) update_clock_page();  // time must not jump for the guest's next look
      return MsrResult::ok;

    case MSR_KVM_SYSTEM_TIME:
    case MSR_KVM_SYSTEM_TIME_NEW:
      if (!has(index == MSR_KVM_SYSTEM_TIME ? KVM_FEATURE_CLOCKSOURCE : KVM_FEATURE_CLOCKSOURCE2)) break;
      system_time_ = value;
      clock_pending_ = true;
      if (!host) update_clock_page();
      return MsrResult::ok;

    case MSR_KVM_WALL_CLOCK:
    case MSR_KVM_WALL_CLOCK_NEW:
      if (!has(index == MSR_KVM_WALL_CLOCK ? KVM_FEATURE_CLOCKSOURCE : KVM_FEATURE_CLOCKSOURCE2)) break;
      clock_.wall_clock_msr = value;
      wall_clock_pending_ = true;
      if (!host) write_wall_clock();
      return MsrResult::ok;

    case MSR_KVM_STEAL_TIME:
      if (!has(KVM_FEATURE_STEAL_TIME)) break;
      if (value & KVM_STEAL_RESERVED_MASK) return MsrResult::gp;
      steal_time_ = value;
      preempted_shown_ = true;  // the field is cleared at the next entry
      return MsrResult::ok;

    case MSR_KVM_ASYNC_PF_EN:
      if (!has(KVM_FEATURE_ASYNC_PF)) break;
      return write_async_pf(value);
    case MSR_KVM_ASYNC_PF_INT:
      if (!has(KVM_FEATURE_ASYNC_PF_INT)) break;
      if (value >> 8 || !apic_) return MsrResult::gp;
      async_pf_int_ = value;
      return MsrResult::ok;
    case MSR_KVM_ASYNC_PF_ACK:
      if (!has(KVM_FEATURE_ASYNC_PF_INT)) break;
      return MsrResult::ok;

    case MSR_KVM_PV_EOI_EN: {
      if (!has(KVM_FEATURE_PV_EOI)) break;
      const Gpa flag = value & ~u64(KVM_MSR_ENABLED);
      if (flag & 3) return MsrResult::gp;
      if (value & KVM_MSR_ENABLED && !guest_memory(flag, 1)) return MsrResult::gp;
      if (apic_) apic_->set_pv_eoi(nullptr);  // withdraws what is offered at the old address
      pv_eoi_ = value;
      if (apic_ && value & KVM_MSR_ENABLED) apic_->set_pv_eoi(this);
      return MsrResult::ok;
    }

    case MSR_KVM_POLL_CONTROL:
      if (!has(KVM_FEATURE_POLL_CONTROL)) break;
      if (value & ~1ull) return MsrResult::gp;
      poll_control_ = value;
      return MsrResult::ok;
  }
  return MsrResult::not_mine;
}

MsrResult Paravirt::write_async_pf(u64 value) {
  constexpr u64 reserved = 3 << 4, delivers_by_interrupt = KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT;
  if (value & reserved) return MsrResult::gp;
  if (value & KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT && !has(KVM_FEATURE_ASYNC_PF_VMEXIT)) return MsrResult::gp;
  if (value & KVM_ASYNC_PF_DELIVERY_AS_INT && !has(KVM_FEATURE_ASYNC_PF_INT)) return MsrResult::gp;
  if (!apic_) return value ? MsrResult::gp : MsrResult::ok;
  async_pf_ = value;
  const bool enabled = (value & delivers_by_interrupt) == delivers_by_interrupt;
  return enabled && !guest_memory(value & ~u64{63}, 8) ? MsrResult::gp : MsrResult::ok;
}

// --- entry and leave ------------------------------------------------------------------------------------------------

void Paravirt::on_enter() {
  if (clock_pending_ || clock_generation_ != clock_.generation() || clock_.drifts()) update_clock_page();
  if (wall_clock_pending_) write_wall_clock();
  if (steal_time_ & KVM_MSR_ENABLED) enter_steal_time();
}

// --- kvmclock -------------------------------------------------------------------------------------------------------

void Paravirt::update_clock_page() {
  clock_pending_ = false;
  clock_generation_ = clock_.generation();
  if (!(system_time_ & KVM_MSR_ENABLED)) return;
  u8* const page = guest_memory(system_time_ & ~u64(KVM_MSR_ENABLED), sizeof(ClockPage));
  if (!page) return;

  const VmClock::Point point = clock_.reference();
  ClockPage next{};
  std::memcpy(&next, page, sizeof next);
  const u8 kept = next.flags & page_guest_stopped;  // until the guest has cleared it
  next.tsc_timestamp = x86::guest_tsc(cpu_.state, point.tsc);
  next.system_time = point.ns;
  next.tsc_to_system_mul = tsc_scale_.multiplier;
  next.tsc_shift = tsc_scale_.shift;
  next.flags = u8(kept | (guest_stopped_ ? page_guest_stopped : 0) | (clock_.stable() ? page_tsc_stable : 0));
  guest_stopped_ = false;

  // Odd while the rest changes. Other vCPUs may read this page too.
  next.version = (next.version + 1) | 1;
  std::memcpy(page, &next.version, sizeof next.version);
  ordered();
  std::memcpy(page + sizeof next.version, reinterpret_cast<u8*>(&next) + sizeof next.version,
              sizeof next - sizeof next.version);
  ordered();
  ++next.version;
  std::memcpy(page, &next.version, sizeof next.version);
}

void Paravirt::write_wall_clock() {
  wall_clock_pending_ = false;
  const Gpa gpa = clock_.wall_clock_msr;
  if (!gpa) return;
  u8* const page = guest_memory(gpa, sizeof(WallClock));
  if (!page) return;
  WallClock clock;
  std::memcpy(&clock, page, sizeof clock);
  const u64 boot_ns = clock_.wall_clock_base_ns();
  clock.version = (clock.version + 1) | 1;
  clock.seconds = u32(boot_ns / 1'000'000'000);
  clock.nanoseconds = u32(boot_ns % 1'000'000'000);
  std::memcpy(page, &clock.version, sizeof clock.version);
  ordered();
  std::memcpy(page, &clock, sizeof clock);
  ordered();
  ++clock.version;
  std::memcpy(page, &clock.version, sizeof clock.version);
}

int Paravirt::kvmclock_ctrl() {
  if (!(system_time_ & KVM_MSR_ENABLED)) return -EINVAL;
  guest_stopped_ = true;
  clock_pending_ = true;
  return 0;
}

// --- the guest's TSC ------------------------------------------------------------------------------------------------

int Paravirt::set_tsc_khz(u32 khz) {
  const u32 host_khz = os::host_tsc_khz();
  if (khz == 0) khz = host_khz;
  const u64 ratio = u64((u128(khz) << x86::tsc_ratio_bits) / host_khz);
  if (khz / 256 >= host_khz || ratio == 0) return -EINVAL;
  // Rates within 250 ppm count as the host's, as in KVM: nobody knows a rate better than that.
  const u32 tolerance = host_khz / 4000;
  const bool close = khz + u64(tolerance) >= host_khz && khz <= u64(host_khz) + tolerance;
  tsc_khz_ = khz;
  cpu_.state.tsc_ratio = close ? 0 : ratio;
  tsc_changed();
  return 0;
}

void Paravirt::tsc_changed() {
  const u64 host_hz = u64(os::host_tsc_khz()) * 1000, ratio = cpu_.state.tsc_ratio;
  tsc_scale_ = tsc_scale(ratio ? u64(u128(host_hz) * ratio >> x86::tsc_ratio_bits) : host_hz);
  clock_pending_ = true;
  if (apic_) apic_->tsc_changed();
}

void Paravirt::set_tsc(u64 value, bool by_client) {
  x86::CpuState& state = cpu_.state;
  const u64 scaled = x86::guest_tsc(state, os::host_tsc()) - state.tsc_offset;
  state.tsc_offset = clock_.synchronize_tsc(tsc_, value, scaled, tsc_khz_, by_client);
  tsc_changed();
}

void Paravirt::set_tsc_offset(u64 offset) {
  cpu_.state.tsc_offset = offset;
  clock_.adopt_tsc_offset(tsc_, offset, cpu_.tsc(), tsc_khz_);
  tsc_changed();
}

u64 Paravirt::monotonic_ns_of_tsc(u64 guest_tsc) const {
  const u64 tsc_now = cpu_.tsc(), now = os::monotonic_ns();
  if (guest_tsc <= tsc_now) return now;
  constexpr u64 far = 1ull << 58;  // years
  const u64 cycles = guest_tsc - tsc_now;
  return now + tsc_scale_.ns(cycles < far ? cycles : far);
}

// --- PV EOI ---------------------------------------------------------------------------------------------------------

bool Paravirt::offer() {
  u8* const flag = guest_memory(pv_eoi_ & ~u64(KVM_MSR_ENABLED), 1);
  if (!flag) return false;
  __atomic_store_n(flag, u8(KVM_PV_EOI_ENABLED), __ATOMIC_RELEASE);
  return true;
}

bool Paravirt::withdraw() {
  u8* const flag = guest_memory(pv_eoi_ & ~u64(KVM_MSR_ENABLED), 1);
  if (!flag) return true;
  return __atomic_exchange_n(flag, u8(KVM_PV_EOI_DISABLED), __ATOMIC_ACQ_REL) & KVM_PV_EOI_MASK;
}

}  // namespace anykvm::paravirt
