// An interrupt on its way over the APIC bus: what an MSI, an I/O APIC redirection entry or an ICR write says.
// Reference: SDM volume 3, 11.6.1 "Interrupt Command Register" and 11.11 "Message Signalled Interrupts".
#pragma once

#include "x86/types.h"

namespace anykvm::irqchip {

/// The values are those of the ICR's, the LVT's and the redirection entry's delivery mode field.
enum class DeliveryMode : u8 {
  fixed = 0,
  lowest_priority = 1,
  smi = 2,
  remote_read = 3,  ///< reserved in today's manuals; KVM uses it to end a paravirtual halt
  nmi = 4,
  init = 5,
  start_up = 6,
  ext_int = 7,
};

enum class Shorthand : u8 { none = 0, self = 1, all = 2, others = 3 };

struct InterruptMessage {
  u32 destination = 0;  ///< 8 bits from xAPIC, I/O APIC and MSI, 32 bits from x2APIC
  u8 vector = 0;
  DeliveryMode mode = DeliveryMode::fixed;
  Shorthand shorthand = Shorthand::none;
  bool logical = false;
  bool level_triggered = false;
  bool assert = true;          ///< false: the INIT level de-assert, which nobody acts on
  bool redirect_hint = false;  ///< MSI: one of the destinations, as with lowest_priority
};

}  // namespace anykvm::irqchip
