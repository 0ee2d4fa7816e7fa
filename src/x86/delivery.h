// One event on its way through the IDT or IVT; exceptions.cpp decides what is delivered, gates.cpp how.
#pragma once

#include "x86/cpu.h"

namespace anykvm::x86 {

struct Delivery {
  u8 vector = 0;
  bool has_error = false;
  u32 error = 0;
  bool software = false;     ///< INT n, INT3, INTO: the gate's DPL counts, error codes have EXT clear
  bool resume_flag = false;  ///< push RF set: the instruction starts again without its breakpoint
  u64 return_rip = 0;
};

/// INT n of virtual-8086 mode under CR4.VME: through the program's own vector table if the TSS's bitmap says so.
Result redirect_v86_interrupt(Cpu& cpu, u8 vector, u64 return_rip, bool& redirected);

/// Takes the event to its handler. fault: Cpu::fault is the one that delivery met; no register has changed.
Result deliver(Cpu& cpu, const Delivery& event);

}  // namespace anykvm::x86
