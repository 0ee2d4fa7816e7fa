// The local APIC's timer: one-shot and periodic counts of a 1 GHz clock, and TSC deadlines.
// Reference: SDM volume 3, 11.5.4 "APIC Timer".
//
// The timer thread runs on_timer() alone; the vCPU's thread cancels the timer, which waits for that, before it changes
// what on_timer() reads together.
#include <algorithm>

#include "irqchip/apic_bus.h"
#include "irqchip/lapic.h"

namespace anykvm::irqchip {

namespace {
/// What KVM's min_timer_period_us allows a periodic timer: a guest must not keep the host busy with ticks.
constexpr u64 min_period_ns = 200'000;
}  // namespace

u32 LocalApic::divisor(u32 divide_register) {
  const u32 code = (divide_register & 3) | (divide_register >> 1 & 4);
  return 1u << ((code + 1) & 7);
}

u64 LocalApic::count_ns(u32 count) const {
  constexpr u64 never = 1ull << 62;
  return std::min(u64{count} * bus_.bus_cycle_ns() * divisor(get(Register::divide)), never);
}

void LocalApic::timer_expired(void* apic) { static_cast<LocalApic*>(apic)->on_timer(); }

/// Timer thread.
void LocalApic::on_timer() {
  const u64 period = period_ns_.load(std::memory_order_relaxed);
  if (timer_mode() == TimerMode::periodic && period != 0) {
    // A guest that is slower than its timer would get the next tick at the end of each, and nothing else done. So a
    // tick waits until its predecessor is over, and then a quarter of the period more; the ticks in between are lost.
    const u64 now = os::monotonic_ns();
    const bool in_service = test_vector(Register::isr, static_cast<u8>(get(Register::lvt_timer)));
    const u64 earliest = in_service ? now + period / 4 : last_eoi_ns_.load(std::memory_order_relaxed) + period / 4;
    if (now < earliest) return timer_.arm(earliest);
    const u64 due = expires_ns_.load(std::memory_order_relaxed);
    const u64 next = due + (now < due ? 0 : ((now - due) / period + 1) * period);
    expires_ns_.store(next, std::memory_order_relaxed);
    timer_.arm(next);
  }
  events_.fetch_or(timer_event);
  client_.wake();
}

/// vCPU's thread: what on_timer() announced.
void LocalApic::take_timer_event() {
  events_.fetch_and(~timer_event);
  deliver_lvt(Register::lvt_timer);
  switch (timer_mode()) {
    case TimerMode::tsc_deadline: tsc_deadline_ = 0; break;
    case TimerMode::one_shot: period_ns_.store(0, std::memory_order_relaxed); break;
    default: break;
  }
}

void LocalApic::stop_timer() {
  timer_.cancel();
  events_.fetch_and(~timer_event);
  period_ns_.store(0, std::memory_order_relaxed);
  last_eoi_ns_.store(0, std::memory_order_relaxed);
}

/// Counts from current down to 0, and in periodic mode from initial again.
void LocalApic::start_count(u32 initial, u32 current) {
  stop_timer();
  set(Register::initial_count, initial);
  const TimerMode mode = timer_mode();
  if (initial == 0 || (mode != TimerMode::one_shot && mode != TimerMode::periodic)) return;
  u64 period = count_ns(initial);
  if (mode == TimerMode::periodic) period = std::max(period, min_period_ns);
  const u64 expires = os::monotonic_ns() + std::min(period, count_ns(current));
  period_ns_.store(period, std::memory_order_relaxed);
  expires_ns_.store(expires, std::memory_order_relaxed);
  timer_.arm(expires);
}

u32 LocalApic::current_count() const {
  const u64 period = period_ns_.load(std::memory_order_relaxed);
  if (period == 0) return 0;
  const u64 now = os::monotonic_ns(), expires = expires_ns_.load(std::memory_order_relaxed);
  u64 remaining = now < expires ? expires - now : 0;
  if (remaining == 0 && timer_mode() == TimerMode::periodic) remaining = period - (now - expires) % period;
  return static_cast<u32>(std::min(remaining, period) / (bus_.bus_cycle_ns() * divisor(get(Register::divide))));
}

void LocalApic::timer_mode_changed(TimerMode before) {
  const TimerMode after = timer_mode();
  if ((before == TimerMode::tsc_deadline) == (after == TimerMode::tsc_deadline)) return;
  stop_timer();
  set(Register::initial_count, 0);
  tsc_deadline_ = 0;
}

/// The count goes on from where it is, at another pace.
void LocalApic::write_divide(u32 value) {
  const u32 current = current_count();
  const bool counting = period_ns_.load(std::memory_order_relaxed) != 0;
  const bool changes = divisor(value) != divisor(get(Register::divide));
  set(Register::divide, value);
  if (counting && changes) start_count(get(Register::initial_count), current);
}

void LocalApic::start_tsc_deadline(u64 deadline) {
  stop_timer();
  tsc_deadline_ = deadline;
  if (deadline == 0) return;
  const u64 expires = client_.tsc_deadline_ns(deadline);
  if (expires > os::monotonic_ns()) return timer_.arm(expires);
  events_.fetch_or(timer_event);
  client_.wake();
}

void LocalApic::tsc_changed() {
  if (timer_mode() == TimerMode::tsc_deadline && tsc_deadline_ != 0) start_tsc_deadline(tsc_deadline_);
}

}  // namespace anykvm::irqchip
