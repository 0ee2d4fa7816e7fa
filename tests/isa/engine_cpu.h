// One instruction in an engine, in 64-bit user mode, with code and data where the host has them.
#pragma once

#include <memory>

#include "engine/engine.h"
#include "isa/host_cpu.h"
#include "x86/fake_machine.h"

namespace anykvm::isa {

class EngineCpu {
 public:
  explicit EngineCpu(std::unique_ptr<engine::Engine> engine);

  u8* code() { return machine_.base + code_gpa; }
  u8* data() { return machine_.base + data_gpa; }
  x86::Cpu& cpu() { return cpu_; }

  void load(const HostState& state);
  /// Executes one instruction (all of a REP). Exception vector, or no_trap; the registers at the exception are in
  /// `out`.
  u64 step(HostState& out);

 private:
  static constexpr u64 tables_gpa = 0x1000, system_gpa = 0x10000, handlers_gpa = 0x20000, stack_gpa = 0x30000,
                       code_gpa = 0x40000, data_gpa = 0x50000, ram = 0x100000;
  static constexpr u64 system_address = 0x30000000;  ///< GDT, IDT, TSS; handlers and stack behind it

  void map(u64 gva, u64 gpa, bool user);

  x86::FakeMachine machine_;
  x86::Cpu cpu_;
  std::unique_ptr<engine::Engine> engine_;
  u64 next_table_ = tables_gpa + page_size;
};

}  // namespace anykvm::isa
