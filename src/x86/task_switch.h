// Task switches of 16- and 32-bit protected mode.
#pragma once

#include "x86/cpu.h"

namespace anykvm::x86 {

struct TaskSwitch {
  enum class Cause : u8 { jump, call, event, iret };
  Cause cause;
  u16 selector = 0;          ///< of the TSS
  u64 return_rip = 0;        ///< what the old task goes on with
  u32 ext = 0;               ///< EXT of error codes
  bool resume_flag = false;  ///< the old task's saved flags have RF set
  bool has_error = false;    ///< an error code goes onto the new task's stack
  u32 error = 0;
};

/// fault: before the switch, or in the new task (RIP is its own then), as the processor reports them.
Result switch_task(Cpu& cpu, const TaskSwitch& request);

/// Follows a task gate that has passed its own checks.
inline u16 task_of_gate(u64 gate) { return u16(gate >> 16); }

}  // namespace anykvm::x86
