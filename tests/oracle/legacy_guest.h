// Random tests of 16- and 32-bit protected mode and virtual-8086 mode for the monitor.
#pragma once

#include "oracle/guest.h"

namespace anykvm::oracle {

enum class LegacySubject : u8 { segments, paging };

/// Starts at MONITOR_BOOT in real mode.
class LegacyGuest final : public Guest {
 public:
  LegacyGuest(u64 seed, unsigned count, LegacySubject subject);
  u64 offset_in_code(u64 cs, u64 rip) const override;
  std::string describe(unsigned test) const override;
};

}  // namespace anykvm::oracle
