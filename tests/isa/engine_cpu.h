// The same cases in an engine: a guest in long mode whose user code has what the worker process has.
#pragma once

#include <memory>
#include <span>

#include "engine/engine.h"
#include "isa/state.h"
#include "x86/fake_machine.h"

namespace anykvm::isa {

class EngineCpu {
 public:
  /// cpu_limit: Worker::cpu_limit().
  EngineCpu(std::unique_ptr<engine::Engine> engine, u64 features, std::span<const u8, data_total> pattern,
            unsigned cpu_limit);

  /// Runs the case to its end or its exception.
  void run(const Case& c, Outcome& out);
  /// Instructions executed so far, those that ended in an exception not counted; of an engine that counts them.
  u64 instructions() const { return cpu_.instructions; }
  bool counts_instructions() const { return name() == std::string_view(engine::name_of(engine::Kind::interpret)); }
  /// Ends an endless case. From a signal handler.
  void interrupt() { cpu_.attention.store(1, std::memory_order_relaxed); }
  u64 cases() const { return cases_; }
  const char* name() const { return engine_->name(); }

 private:
  static constexpr u64 tables_gpa = 0x1000, system_gpa = 0x10000, handlers_gpa = 0x20000, stack_gpa = 0x30000,
                       exit_gpa = 0x31000, code_gpa = 0x40000, data_gpa = 0x50000, ram = 0x100000;
  /// GDT, IDT, TSS, LDT; handlers and stack behind it. In the kernel's half, as Linux' own are.
  static constexpr u64 system_address = 0xffff800012340000;

  void map(u64 gva, u64 gpa, u64 rights);
  void load(const Case& c);
  x86::Segment segment(u16 selector) const;

  x86::FakeMachine machine_;
  x86::Cpu cpu_;
  std::unique_ptr<engine::Engine> engine_;
  u64 next_table_ = tables_gpa + page_size;
  u64 features_;
  bool drops_dead_flags_;
  u64 cases_ = 0;
  u8 pattern_[data_total];
};

}  // namespace anykvm::isa
