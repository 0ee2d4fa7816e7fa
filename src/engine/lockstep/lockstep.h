// Translator and reference engine side by side: every stretch of guest code runs in the reference engine first, is
// taken back, runs translated, and both results are compared. The first difference ends the guest with a report. See
// docs/lockstep.md.
#pragma once

#include <atomic>

#include "engine/interpret/reference.h"
#include "engine/lockstep/difference.h"
#include "engine/lockstep/store_log.h"
#include "engine/translate/translator.h"

namespace anykvm::engine::lockstep {

class Lockstep final : public Engine {
 public:
  /// tamper: a test's wrong translation, called with each new block's code.
  explicit Lockstep(void (*tamper)(u8* begin, u8* end) = nullptr);

  void run(x86::Cpu& cpu) override;
  void step(x86::Cpu& cpu) override;
  void abandon() override;
  const char* name() const override { return "lockstep"; }
  u64 translations() const override { return translator_.translations(); }

  struct Counts {
    u64 instructions = 0;  ///< compared
    u64 stretches = 0;
    u64 alone = 0;  ///< executed once, by the reference engine: what may not be repeated, and modes not translated
    u64 again = 0;  ///< stretches that differed once and then did not: somebody else wrote to memory meanwhile
    u64 flags = 0;  ///< stretches that left other values in flags that are dead
  };
  const Counts& counts() const { return counts_; }
  /// What was printed about the difference; empty: there was none.
  const char* report() const { return report_.c_str(); }

 private:
  /// A stretch ends behind the first backward jump after `enough` instructions.
  static constexpr u32 enough = 1024, most_instructions = 2048;
  /// How often a stretch must differ before it is believed.
  static constexpr unsigned attempts = 3;

  /// What instructions change beside memory.
  struct Registers {
    x86::CpuState state;
    x86::Privilege data_privilege, system_privilege;
    u64 instructions;
    void save(const x86::Cpu& cpu);
    void restore(x86::Cpu& cpu) const;
  };

  bool run_stretch();
  bool execute_alone();
  /// Executes a stretch in the reference engine and takes it back: one that ends where translated code leaves, or
  /// before an instruction that may not be repeated. expected_ is where it led. Returns its instructions.
  u32 rehearse_stretch();
  /// The same for at most `most` instructions.
  u32 rehearse(u32 most, u32 until_back = ~0u);
  /// Lets the translator execute the first `count` of the boundaries' instructions, entered at most so often. false: it
  /// went elsewhere, or not so far.
  bool perform(u32 count, u32 times = ~0u);
  bool compare();
  bool memory_is_same();
  /// What perform() has done is undone.
  void take_back_performance();
  bool try_stretch(u32 count);
  /// Which boundary behind position_ the translator has come to; position_ itself: none; -1: it is astray.
  int locate() const;
  bool may_step();
  void entry_marked(const u8* host);
  void page_written(const u8* host);
  u64 ignored_flags();
  void advance(u32 count);
  void explain(u32 count);
  void write_report(u32 count, u32 wrong);

  x86::Cpu* cpu_ = nullptr;
  std::unique_ptr<Reference> reference_;
  translate::Translator translator_;
  void (*tamper_)(u8*, u8*);
  const std::atomic<u32> always_{1};
  x86::CodeWatch translators_watch_;
  bool performing_ = false, has_turn_ = false;

  Registers start_, expected_;
  StoreLog log_;
  PageCopies pages_;
  Boundary boundaries_[most_instructions + 1];  ///< [0]: where the stretch begins
  u32 end_ = 0, position_ = 0;
  Counts counts_;
  Text report_;
};

}  // namespace anykvm::engine::lockstep
