// The 8254 interval timer of a PC, and port 0x61, through which its channel 2 drives the speaker.
// Reference: Intel 8254 data sheet; api.rst 4.71 KVM_CREATE_PIT2, 4.72 KVM_GET_PIT2, 4.100 KVM_REINJECT_CONTROL.
//
// Counters do not count: what they hold follows from the host's monotonic clock whenever the guest asks. Only channel 0
// has a host timer, for IRQ 0.
//
// Ticks. By default (KVM's reinject mode) a tick is a pulse on IRQ 0 once the guest has ended the last one; ticks that
// come before are counted and given later, so that a guest that counts ticks does not lose time. Two limits keep a
// slow guest alive: the next owed tick comes a quarter of the period after the end of the last one at the earliest, and
// no more than a second's worth is owed. Without reinjection every tick is pulsed and the chips coalesce.
//
// Thread-safety: everything may be called from any thread. The PIT's lock is never held while it pulses.
#pragma once

#include <mutex>

#include "anykvm/kvm.h"
#include "os/timer_queue.h"
#include "x86/types.h"

namespace anykvm::irqchip {

/// Where IRQ 0 goes.
class PitOutput {
 public:
  /// Raises and lowers GSI 0. Whether somebody may answer it with Pit::tick_ended(): false when it is masked
  /// everywhere.
  virtual bool pulse_irq0() = 0;

 protected:
  ~PitOutput() = default;
};

class Pit {
 public:
  static constexpr u64 frequency_hz = 1193182;
  /// Guests cannot ask for a shorter period on channel 0 (the default of kvm.min_timer_period_us).
  static constexpr u64 min_period_ns = 200'000;

  /// speaker: KVM_PIT_SPEAKER_DUMMY, whether port 0x61 is answered too.
  Pit(os::TimerQueue& timers, PitOutput& output, bool speaker);

  ~Pit();
  Pit(const Pit&) = delete;
  Pit& operator=(const Pit&) = delete;

  bool covers(u16 port, unsigned size) const {
    return (port >= 0x40 && port + size <= 0x44) || (speaker_ && port == 0x61 && size <= 4);
  }
  u8 read(u16 port);
  void write(u16 port, u8 value);

  /// The guest has ended IRQ 0.
  void tick_ended();
  /// IRQ 0 was unmasked: nothing is owed from before.
  void irq0_unmasked();
  void set_reinject(bool reinject);

  void get_state(kvm_pit_state2& state);
  /// Counting starts anew with the counts given.
  void set_state(const kvm_pit_state2& state);

 private:
  /// How a 16-bit count goes through the 8-bit port: KVM's numbers, seen in kvm_pit_channel_state.
  enum Access : u8 { low_byte = 1, high_byte = 2, low_then_high = 3, high_of_pair = 4 };

  struct Channel {
    u32 count = 0x10000;  ///< 1 .. 65536, binary whatever bcd says
    u16 latched_count = 0;
    u8 count_latched = 0;  ///< Access still to be read, 0: none
    bool status_latched = false;
    u8 status = 0;
    u8 read_state = 0, write_state = 0, write_latch = 0, access = 0;
    u8 mode = 0xff;  ///< 0xff: not programmed since power-on
    bool bcd = false;
    bool gate = true;
    bool null_count = false;  ///< a count is still to come
    bool running = false;     ///< counting; false: stopped at frozen_ticks
    u64 start_ns = 0;
    u64 frozen_ticks = 0;
  };

  // With mutex_ held.
  u64 ticks(const Channel& channel) const;
  u32 current_count(const Channel& channel) const;
  bool out(const Channel& channel) const;
  void latch_count(Channel& channel);
  void latch_status(Channel& channel);
  void write_control(u8 value);
  void write_count(unsigned index, u8 value);
  void load_count(unsigned index, u32 count);
  void set_gate(Channel& channel, bool gate);
  void start_irq_timer();
  u8 read_count(Channel& channel);
  bool tick_due(u64 now);
  void reset_ticks();

  static void timer_expired(void* pit);
  static void reinjection_due(void* pit);
  void pulse();

  PitOutput& output_;
  const bool speaker_;
  std::mutex mutex_;
  Channel channels_[3];
  u32 flags_ = 0;  ///< KVM_PIT_FLAGS_*

  bool reinject_ = true;
  bool tick_answered_ = true;   ///< the guest has ended the last tick
  u32 owed_ticks_ = 0;          ///< in reinject mode, the one being serviced excluded
  u32 unanswered_periods_ = 0;  ///< periods since a tick that was not ended
  u64 period_ns_ = 0, next_ns_ = 0;
  u64 last_end_ns_ = 0;  ///< of the last tick
  bool periodic_ = false, timer_armed_ = false;
  os::Timer timer_, reinjection_;
};

}  // namespace anykvm::irqchip
