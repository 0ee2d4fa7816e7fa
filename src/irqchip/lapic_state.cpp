// KVM_GET_LAPIC and KVM_SET_LAPIC: the register page as it would be read, with the 64-bit ICR of x2APIC mode in the two
// xAPIC registers.
// Reference: api.rst 4.57 and 4.58; 7.8 KVM_CAP_X2APIC_API for the format of the ID.
#include <cerrno>
#include <cstring>

#include "irqchip/apic_bus.h"
#include "irqchip/lapic.h"

namespace anykvm::irqchip {

void LocalApic::get_state(kvm_lapic_state& state) {
  sync_pv_eoi();
  if (events_.load(std::memory_order_acquire) & timer_event) take_timer_event();
  std::memset(&state, 0, sizeof state);
  const auto put = [&](u32 offset, u32 value) { std::memcpy(state.regs + offset, &value, sizeof value); };
  for (u32 i = 0; i < 64; ++i) put(i << 4, registers_[i].load(std::memory_order_relaxed));
  put(static_cast<u32>(Register::current_count), current_count());
  if (x2apic_mode() && !bus_.x2apic_format()) put(static_cast<u32>(Register::id), id_ << 24);
}

int LocalApic::set_state(const kvm_lapic_state& state) {
  const auto field = [&](u32 offset) {
    u32 value;
    std::memcpy(&value, state.regs + offset, sizeof value);
    return value;
  };
  const u32 id = field(static_cast<u32>(Register::id));
  if (x2apic_mode() && bus_.x2apic_format() && id != id_) return -EINVAL;

  sync_pv_eoi();
  timer_.cancel();
  const TimerMode mode_before = timer_mode();
  const u64 deadline = tsc_deadline_;
  for (u32 i = 0; i < 64; ++i) registers_[i].store(field(i << 4), std::memory_order_relaxed);
  set_features(features_);  // the version register
  if (x2apic_mode()) {
    set_id_register(id_);
    set(Register::ldr, x2apic_ldr(id_));
  } else {
    set_id_register(id);
  }
  u32 words = 0;
  for (unsigned word = 0; word < 8; ++word) words |= get(Register::irr, word) ? 1u << word : 0;
  events_.store(words);
  update_ppr();

  const u32 initial = get(Register::initial_count), current = get(Register::current_count);
  set(Register::current_count, 0);
  if (timer_mode() == TimerMode::tsc_deadline) {
    // The client sets the deadline's MSR by itself, before or after this.
    start_tsc_deadline(mode_before == TimerMode::tsc_deadline ? deadline : 0);
  } else if (timer_mode() == TimerMode::one_shot && current == 0) {
    stop_timer();  // it has expired before the state was taken
  } else {
    start_count(initial, current ? current : initial);
  }
  client_.wake();
  return 0;
}

}  // namespace anykvm::irqchip
