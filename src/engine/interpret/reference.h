// The reference engine as other engines use it: instructions that are executed to be taken back, and stretches of what
// those do not execute themselves.
#pragma once

#include <cstring>
#include <memory>
#include <span>

#include "engine/engine.h"

namespace anykvm::engine {

/// The boundary behind an instruction.
struct Boundary {
  u64 rip;
  bool back;  ///< RIP did not grow
  // Where `back`, to tell two passes from each other:
  u64 sum;  ///< of the general registers
  u64 top;  ///< the quadword on the stack, or 0 where the TLB does not have it
};

class Reference : public Engine {
 public:
  /// A REP over more elements than this is not rehearsed.
  static constexpr u64 most_elements = 64;

  struct Rehearsed {
    u32 count;   ///< instructions retired
    bool clean;  ///< false: the one behind them has left traces though it did not retire
  };
  /// Executes at most boundaries.size() instructions, an interrupted REP being none, and notes where each has led; once
  /// there are `enough`, stops behind a backward jump.
  /// Stops before an instruction that faults, leaves for the machine, is watched by a debugger or may not be executed
  /// twice (`Instruction::repeatable`). Nothing is delivered, attention is not looked at, cpu.exit means nothing
  /// afterwards. Cpu::rehearsal is the caller's.
  virtual Rehearsed rehearse(x86::Cpu& cpu, std::span<Boundary> boundaries, u32 enough) = 0;

  /// Executes instructions as run() does, but only a few, and none behind a change of CpuState::code_bits. Attention
  /// ends it, too; exit.kind is none then. Returns how many it has retired.
  virtual u64 run_stretch(x86::Cpu& cpu) = 0;

  bool end_rehearsal = false;  ///< set from Cpu::rehearsal: it stops behind the instruction
};

std::unique_ptr<Reference> make_reference();

/// The boundary at which a CPU stands.
inline Boundary boundary_of(const x86::Cpu& cpu, bool back) {
  Boundary boundary{.rip = cpu.state.rip, .back = back, .sum = 0, .top = 0};
  if (!back) return boundary;
  for (const u64 value : cpu.state.gpr) boundary.sum = (boundary.sum << 7 | boundary.sum >> 57) + value;
  if (const u8* top = cpu.mmu.lookup(cpu.state.gpr[x86::rsp], 8, x86::Access::read, cpu.data_privilege))
    std::memcpy(&boundary.top, top, sizeof boundary.top);
  return boundary;
}

}  // namespace anykvm::engine
