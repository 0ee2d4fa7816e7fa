// See pit.h.
#include "irqchip/pit.h"

#include <algorithm>

#include "os/clock.h"

namespace anykvm::irqchip {

namespace {
constexpr u64 second_ns = 1'000'000'000;
constexpr unsigned irq_channel = 0, speaker_channel = 2;
constexpr u16 first_port = 0x40, control_port = 0x43, speaker_port = 0x61;
constexpr u8 unprogrammed = 0xff;
/// After so many periods without an answer the next tick is given anyway: the CPU that owed it may have been reset.
constexpr u32 patience_periods = 8;

u64 ticks_of(u64 ns) { return static_cast<u64>(static_cast<u128>(ns) * Pit::frequency_hz / second_ns); }
u64 ns_of(u64 ticks) { return static_cast<u64>(static_cast<u128>(ticks) * second_ns / Pit::frequency_hz); }

bool is_periodic(u8 mode) { return mode == 2 || mode == 3; }
bool starts_by_gate(u8 mode) { return mode == 1 || mode == 5; }

u32 binary_of_bcd(u32 bcd) {
  return (bcd >> 12 & 15) * 1000 + (bcd >> 8 & 15) * 100 + (bcd >> 4 & 15) * 10 + (bcd & 15);
}
u32 bcd_of_binary(u32 n) { return n / 1000 % 10 << 12 | n / 100 % 10 << 8 | n / 10 % 10 << 4 | n % 10; }
}  // namespace

Pit::Pit(os::TimerQueue& timers, PitOutput& output, bool speaker)
    : output_(output),
      speaker_(speaker),
      timer_(timers, &Pit::timer_expired, this),
      reinjection_(timers, &Pit::reinjection_due, this) {
  channels_[speaker_channel].gate = false;
  const u64 now = os::monotonic_ns();
  for (Channel& channel : channels_) channel.start_ns = now;
}

Pit::~Pit() {
  // In this order: a tick may arm the reinjection, but not the other way round.
  timer_.cancel();
  reinjection_.cancel();
}

// --- counting --------------------------------------------------------------------------------------------------------

/// Clock ticks since the count was loaded, without those while the gate was down.
u64 Pit::ticks(const Channel& channel) const {
  return channel.running ? ticks_of(os::monotonic_ns() - channel.start_ns) : channel.frozen_ticks;
}

u32 Pit::current_count(const Channel& channel) const {
  const u64 elapsed = ticks(channel);
  const u32 wrap = channel.bcd ? 10000 : 0x10000;
  u32 count;
  switch (channel.mode) {
    case 2: count = channel.count - static_cast<u32>(elapsed % channel.count); break;
    case 3: count = channel.count - static_cast<u32>(2 * elapsed % channel.count); break;
    default: count = static_cast<u32>((channel.count + wrap - elapsed % wrap) % wrap); break;  // goes on below 0
  }
  return channel.bcd ? bcd_of_binary(count) : count & 0xffff;
}

bool Pit::out(const Channel& channel) const {
  if (channel.null_count || !channel.running) {
    if (channel.mode == 0) return !channel.null_count && channel.frozen_ticks >= channel.count;
    return true;
  }
  const u64 elapsed = ticks(channel);
  switch (channel.mode) {
    case 0:
    case 1: return elapsed >= channel.count;
    case 2: return elapsed % channel.count != channel.count - 1;
    case 3: return elapsed % channel.count < (channel.count + 1) / 2;
    case 4:
    case 5: return elapsed != channel.count;  // a strobe of one tick
    default: return true;
  }
}

void Pit::set_gate(Channel& channel, bool gate) {
  const bool rises = gate && !channel.gate, falls = !gate && channel.gate;
  channel.gate = gate;
  if (channel.null_count || channel.mode == unprogrammed) return;
  if (starts_by_gate(channel.mode)) {
    if (!rises) return;
    channel.start_ns = os::monotonic_ns();
    channel.running = true;
  } else if (falls) {
    channel.frozen_ticks = is_periodic(channel.mode) ? 0 : ticks(channel);
    channel.running = false;
  } else if (rises) {
    channel.start_ns = os::monotonic_ns() - ns_of(channel.frozen_ticks);
    channel.running = true;
  }
}

// --- ports -----------------------------------------------------------------------------------------------------------

u8 Pit::read(u16 port) {
  std::lock_guard lock(mutex_);
  if (port == speaker_port) {
    const Channel& channel = channels_[speaker_channel];
    const bool refresh = os::monotonic_ns() / 15085 & 1;  // the DRAM refresh of old, which some use as a clock
    return static_cast<u8>(channel.gate | (flags_ & KVM_PIT_FLAGS_SPEAKER_DATA_ON ? 2 : 0) | refresh << 4 |
                           out(channel) << 5);
  }
  if (port < first_port || port >= control_port) return 0;
  Channel& channel = channels_[port - first_port];
  if (channel.status_latched) {
    channel.status_latched = false;
    return channel.status;
  }
  if (channel.count_latched) {
    const u8 access = channel.count_latched;
    channel.count_latched = access == low_then_high ? u8{high_byte} : u8{0};
    return static_cast<u8>(channel.latched_count >> (access == high_byte ? 8 : 0));
  }
  return read_count(channel);
}

u8 Pit::read_count(Channel& channel) {
  const u32 count = current_count(channel);
  switch (channel.read_state) {
    case high_byte: return static_cast<u8>(count >> 8);
    case low_then_high: channel.read_state = high_of_pair; return static_cast<u8>(count);
    case high_of_pair: channel.read_state = low_then_high; return static_cast<u8>(count >> 8);
    default: return static_cast<u8>(count);
  }
}

void Pit::write(u16 port, u8 value) {
  std::lock_guard lock(mutex_);
  if (port == speaker_port) {
    flags_ = (flags_ & ~KVM_PIT_FLAGS_SPEAKER_DATA_ON) | (value & 2 ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0);
    set_gate(channels_[speaker_channel], value & 1);
  } else if (port == control_port) {
    write_control(value);
  } else if (port >= first_port && port < control_port) {
    write_count(port - first_port, value);
  }
}

void Pit::latch_count(Channel& channel) {
  if (channel.count_latched) return;
  channel.latched_count = static_cast<u16>(current_count(channel));
  channel.count_latched = channel.access;
}

void Pit::latch_status(Channel& channel) {
  if (channel.status_latched) return;
  channel.status = static_cast<u8>(out(channel) << 7 | channel.null_count << 6 | (channel.access & 3) << 4 |
                                   (channel.mode & 7) << 1 | channel.bcd);
  channel.status_latched = true;
}

void Pit::write_control(u8 value) {
  if (value >> 6 == 3) {  // read-back
    for (unsigned i = 0; i < 3; ++i) {
      if (!(value >> (i + 1) & 1)) continue;
      if (!(value & 0x20)) latch_count(channels_[i]);
      if (!(value & 0x10)) latch_status(channels_[i]);
    }
    return;
  }
  Channel& channel = channels_[value >> 6];
  const u8 access = value >> 4 & 3;
  if (access == 0) return latch_count(channel);
  channel.access = channel.read_state = channel.write_state = access;
  channel.mode = value >> 1 & 7;
  if (channel.mode > 5) channel.mode -= 4;  // 6 and 7 are 2 and 3
  channel.bcd = value & 1;
  channel.count_latched = 0;
  channel.status_latched = false;
  channel.frozen_ticks = ticks(channel);
  channel.running = false;
  channel.null_count = true;
  if (&channel == &channels_[irq_channel]) start_irq_timer();  // stops: no count yet
}

void Pit::write_count(unsigned index, u8 value) {
  Channel& channel = channels_[index];
  switch (channel.write_state) {
    case high_byte: return load_count(index, u32{value} << 8);
    case low_then_high:
      channel.write_latch = value;
      channel.write_state = high_of_pair;
      return;
    case high_of_pair:
      channel.write_state = low_then_high;
      return load_count(index, u32{value} << 8 | channel.write_latch);
    default: return load_count(index, value);
  }
}

void Pit::load_count(unsigned index, u32 count) {
  Channel& channel = channels_[index];
  if (channel.bcd) count = binary_of_bcd(count);
  if (count == 0) count = channel.bcd ? 10000 : 0x10000;
  channel.count = count;
  channel.null_count = false;
  channel.frozen_ticks = 0;
  channel.start_ns = os::monotonic_ns();
  // Modes 1 and 5 wait for the gate to rise; channel 0's never does, and there KVM starts mode 1 at once.
  channel.running = channel.gate && (!starts_by_gate(channel.mode) || (channel.mode == 1 && index == irq_channel));
  if (index == irq_channel) start_irq_timer();
}

// --- IRQ 0 -----------------------------------------------------------------------------------------------------------

void Pit::start_irq_timer() {
  const Channel& channel = channels_[irq_channel];
  timer_.cancel_without_waiting();
  reinjection_.cancel_without_waiting();
  timer_armed_ = false;
  reset_ticks();
  const bool interrupts = channel.mode <= 4 && channel.running && !channel.null_count;
  if (!interrupts || flags_ & KVM_PIT_FLAGS_HPET_LEGACY) return;
  periodic_ = is_periodic(channel.mode);
  period_ns_ = ns_of(channel.count);
  if (periodic_) period_ns_ = std::max(period_ns_, min_period_ns);
  next_ns_ = channel.start_ns + period_ns_;
  timer_armed_ = true;
  timer_.arm(next_ns_);
}

void Pit::reset_ticks() {
  owed_ticks_ = 0;
  unanswered_periods_ = 0;
  last_end_ns_ = 0;
  tick_answered_ = true;
}

void Pit::timer_expired(void* argument) {
  Pit& pit = *static_cast<Pit*>(argument);
  bool fire;
  {
    std::lock_guard lock(pit.mutex_);
    const u64 now = os::monotonic_ns();
    if (!pit.timer_armed_ || now < pit.next_ns_) return;  // programmed anew while this was on its way
    u64 elapsed_periods = 1;
    if (pit.periodic_) {
      elapsed_periods += (now - pit.next_ns_) / pit.period_ns_;
      pit.next_ns_ += elapsed_periods * pit.period_ns_;
      pit.timer_.arm(pit.next_ns_);
    } else {
      pit.timer_armed_ = false;
    }
    if (pit.reinject_) {
      const u64 most = std::max<u64>(1, second_ns / std::max<u64>(1, pit.period_ns_));
      pit.owed_ticks_ = static_cast<u32>(std::min(pit.owed_ticks_ + elapsed_periods, most));
      if (!pit.tick_answered_ && (pit.unanswered_periods_ += elapsed_periods) >= patience_periods)
        pit.tick_answered_ = true;
      fire = pit.tick_due(now);
    } else {
      fire = true;
    }
  }
  if (fire) pit.pulse();
}

void Pit::reinjection_due(void* argument) {
  Pit& pit = *static_cast<Pit*>(argument);
  bool fire;
  {
    std::lock_guard lock(pit.mutex_);
    fire = pit.tick_due(os::monotonic_ns());
  }
  if (fire) pit.pulse();
}

/// Takes one of the owed ticks if it may be given now; if only it is too early, sees to it that it is given later.
bool Pit::tick_due(u64 now) {
  if (owed_ticks_ == 0 || !tick_answered_) return false;
  if (const u64 earliest = last_end_ns_ + period_ns_ / 4; now < earliest) {
    reinjection_.arm(earliest);
    return false;
  }
  --owed_ticks_;
  tick_answered_ = false;
  unanswered_periods_ = 0;
  return true;
}

void Pit::pulse() {
  if (output_.pulse_irq0()) return;
  std::lock_guard lock(mutex_);
  reset_ticks();
}

void Pit::tick_ended() {
  std::lock_guard lock(mutex_);
  if (!reinject_) return;
  tick_answered_ = true;
  if (owed_ticks_ == 0 && !timer_armed_) return;
  last_end_ns_ = os::monotonic_ns();
  tick_due(last_end_ns_);
}

void Pit::irq0_unmasked() {
  std::lock_guard lock(mutex_);
  reset_ticks();
}

void Pit::set_reinject(bool reinject) {
  std::lock_guard lock(mutex_);
  if (reinject_ == reinject) return;
  reset_ticks();
  reinject_ = reinject;
}

// --- state -----------------------------------------------------------------------------------------------------------

void Pit::get_state(kvm_pit_state2& state) {
  std::lock_guard lock(mutex_);
  state = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Channel& from = channels_[i];
    kvm_pit_channel_state& to = state.channels[i];
    to.count = from.count;
    to.latched_count = from.latched_count;
    to.count_latched = from.count_latched;
    to.status_latched = from.status_latched;
    to.status = from.status;
    to.read_state = from.read_state;
    to.write_state = from.write_state;
    to.write_latch = from.write_latch;
    to.rw_mode = from.access;
    to.mode = from.mode;
    to.bcd = from.bcd;
    to.gate = from.gate;
    to.count_load_time = static_cast<__s64>(from.start_ns);
  }
  state.flags = flags_;
}

void Pit::set_state(const kvm_pit_state2& state) {
  std::lock_guard lock(mutex_);
  flags_ = state.flags;
  for (unsigned i = 0; i < 3; ++i) {
    const kvm_pit_channel_state& from = state.channels[i];
    Channel& to = channels_[i];
    to.latched_count = from.latched_count;
    to.count_latched = from.count_latched;
    to.status_latched = from.status_latched;
    to.status = from.status;
    to.read_state = from.read_state;
    to.write_state = from.write_state;
    to.write_latch = from.write_latch;
    to.access = from.rw_mode;
    to.mode = from.mode;
    to.gate = from.gate;
    to.bcd = false;  // the state's count is binary
    load_count(i, from.count);
    to.bcd = from.bcd;
  }
}

}  // namespace anykvm::irqchip
