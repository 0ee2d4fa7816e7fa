// Random tests of 64-bit and compatibility mode for the monitor of long_monitor.h: transfers of control, system
// registers and instructions, paging, breakpoints, faults of delivery, NMIs.
#pragma once

#include "oracle/guest.h"

namespace anykvm::oracle {

/// What a guest's tests are mostly about.
enum class Subject : u8 { transfers, registers, paging, debugging, exceptions, nmis };

class LongGuest final : public Guest {
 public:
  /// The seed's low bits choose 5-level paging and Intel's processor.
  LongGuest(u64 seed, unsigned count, Subject subject);
  u64 offset_in_code(u64 cs, u64 rip) const override;
  u64 descriptor(const Memory& memory, unsigned test, u64 selector) const override;
  std::string describe(unsigned test) const override;
};

}  // namespace anykvm::oracle
