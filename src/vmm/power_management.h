// ACPI's fixed hardware: PM1 event and control blocks and the power-management timer. (ACPI 6.4, section 4.8.)
#pragma once

#include <functional>
#include <mutex>

#include "vmm/bus.h"

namespace anykvm::vmm {

class PowerManagement final : public IoDevice {
 public:
  static constexpr u64 base_port = 0x600;
  static constexpr u64 port_count = 12;
  static constexpr u64 event_block = 0, control_block = 4, timer_block = 8;  ///< offsets from base_port
  /// What \_S5 says to write into SLP_TYP for power-off.
  static constexpr u8 sleep_type_off = 5;

  explicit PowerManagement(std::function<void()> power_off) : power_off_(std::move(power_off)) {}

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  u8 read_byte(u64 offset, u32 timer) const;

  std::function<void()> power_off_;
  std::mutex mutex_;
  u16 enable_ = 0;
  u16 control_ = 0;
};

}  // namespace anykvm::vmm
