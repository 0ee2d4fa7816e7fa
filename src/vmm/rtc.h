// The PC's real-time clock and its battery-backed memory (Motorola MC146818): the host's time in UTC, and the size of
// memory where the PC's firmware leaves it. It has no interrupts: the guest's drivers use their other timers.
#pragma once

#include <array>
#include <mutex>

#include "vmm/bus.h"

namespace anykvm::vmm {

class Rtc final : public IoDevice {
 public:
  static constexpr u64 base_port = 0x70;
  static constexpr u64 port_count = 2;
  static constexpr u8 century_register = 0x32;

  /// Bytes of RAM below and above 4 GiB.
  Rtc(u64 low_memory, u64 high_memory);
  /// Sets a byte of the memory that is not the clock's, before the guest runs.
  void preset(u8 index, u8 value) { ram_[index] = value; }

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  u8 read_register(u8 index);
  void write_register(u8 index, u8 value);
  u8 encode(int value) const;
  int decode(u8 value) const;
  bool time_field(u8 index, int& value) const;
  void set_time_field(u8 index, int value);
  s64 guest_time_us() const;

  std::mutex mutex_;
  std::array<u8, 128> ram_{};
  u8 index_ = 0;
  s64 offset_us_ = 0;   ///< guest time - host time
  s64 stopped_us_ = 0;  ///< the time while register B's SET bit holds the clock
};

}  // namespace anykvm::vmm
