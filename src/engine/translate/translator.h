// The fast engine: same-ISA dynamic binary translation of 64-bit code and of 32-bit code on flat segments; everything
// else goes to the reference engine.
// See docs/translator.md.
#pragma once

#include <Zydis/Zydis.h>

#include <memory>

#include "engine/direct/direct.h"
#include "engine/engine.h"
#include "engine/interpret/reference.h"
#include "engine/translate/block.h"
#include "engine/translate/code_cache.h"
#include "engine/translate/shared_code.h"
#include "engine/translate/stubs.h"

namespace anykvm::engine::translate {

class Translator final : public Engine {
 public:
  /// memory: what it shares with other vCPUs, and outlives it; nullptr: it has its own.
  explicit Translator(bool exact = false, bool direct = false, CodeMemory* memory = nullptr);
  ~Translator() override;
  Translator(const Translator&) = delete;
  Translator& operator=(const Translator&) = delete;

  void run(x86::Cpu& cpu) override;
  void keep_code() override { keep_code_ = true; }
  void step(x86::Cpu& cpu) override { reference_->step(cpu); }
  const char* name() const override { return direct_ ? "direct" : exact_ ? "translate-exact" : "translate"; }

  void abandon() override;
  u64 translations() const override { return translations_; }
  u64 native_stretches() const override;
  void for_each_step(void (*f)(void* arg, const char* mnemonic, u64 count), void* arg) const override;

  Next step_in_block(u64 request);
  bool fill(Gva address, unsigned size, u32 request);
  bool find(u64 rip, u32 request, u64 rsp);
  bool find(u64 rip);
  bool load_x87();
  bool system_call(SavedRegisters& registers, u32 request);

  // --- for tests and the lockstep engine
  // --------------------------------------------------------------------------------------
  struct Supervision {
    void* arg;
    /// Asked before the reference engine executes the instruction at RIP; false: the translator leaves instead.
    bool (*may_step)(void* arg);
    /// Told of new code, which a test may change.
    void (*made)(void* arg, u8* begin, u8* end);
  };
  /// Calls body(arg) with everything in place that run_once() needs. Code that runs leaves at the first backward or
  /// indirect jump while `attention` is not 0.
  void enter(x86::Cpu& cpu, const std::atomic<u32>& attention, void (*body)(void*), void* arg,
             const Supervision* supervision = nullptr);
  /// Runs from RIP until translated code leaves, or one step of the reference engine. false: cpu.exit says why.
  bool run_once();
  /// Whether the code at RIP is in a mode that is translated.
  bool translatable() const;
  /// Forgets all code; blocks that are made from now on have at most so many instructions.
  void limit_blocks(unsigned instructions);
  /// Translates pages however often they are rewritten.
  void translate_always() { cache_.be_patient(); }

 private:
  bool may_step() const { return !supervision_ || supervision_->may_step(supervision_->arg); }
  /// Where to go on, with the state complete, without a way through the run loop if possible.
  Next go_on();
  u8 vectors_allowed() const;
  Mode next_mode(u8 wants_vectors);
  /// User code natively, if that is wanted. false: it is not.
  bool run_natively();
  void step_outside();
  static bool known_instructions(void* self, const u8* host, u64 (&begins)[page_size / 64]);
  void follow_flushes();
  void flush_tlb(bool global);
  void flush_jumps();
  void flush_listed_jumps(bool global);
  void flush_page(Gva page);
  /// A page of the host's, and those that SharedCode takes for the same: the next store to them is told.
  void forbid_stores(u64 page);
  void drop(CodePage& page);
  static constexpr unsigned jump_page_bits = 1u << 16;
  static constexpr unsigned jump_page_bit(Gva page) { return unsigned(page >> 12 ^ page >> 24) % jump_page_bits; }
  /// Whether the page, which has blocks, is watched and as they found it; once in an epoch.
  bool verify(CodePage& page);
  /// Aims the jump that Context::link_site names at the block.
  void aim_link(const Block& block);
  void note_jump(u64 rip, CodePage& page, const Block& block);
  /// Code of the page is going to run at rip.
  void note_place(u64 rip, CodePage& page);
  bool is_global(u64 rip) const {
    return mode_.privilege != x86::Privilege::user && cpu_->mmu.is_global(rip, cpu_->system_privilege);
  }
  /// Between two of them the jump cache has been emptied, as far as it had jumps to global pages or to others.
  u64 era(bool global) const { return eras_[global] * 2 + global; }
  /// Has the chain of a jump in the page at `from` go to the block, which find() has found at rip.
  void link_chain(Chain& chain, Gva from, u64 rip);
  void unlink_chains(bool global);
  void refresh_segments();
  /// The block for RIP, made when there is none; nullptr where only the reference engine can go on.
  Block* block_at_rip(bool single_checks);
  /// rest, behind: see BlockRequest.
  Block* make_block(CodePage& page, u64 address, bool single_checks, const u8* rest = nullptr,
                    const u8* behind = nullptr);
  /// What the code cache calls a block of the current mode.
  unsigned block_mode(bool single_checks) const { return mode_.number() + (single_checks ? Mode::count : 0); }
  void page_written(const u8* host);
  // crossing.cpp
  /// The reference engine has executed an instruction at rip that lies in two pages: has it translated, if it can be.
  void translate_crossing(u64 rip);
  // quick_steps.cpp
  /// Executes one of the few instructions that is_quick() names, without the reference engine. false: it has not.
  bool quick_step(u64 request);
  template <unsigned bytes, bool moves>
  bool store_string(u64 next, bool repeats);
  // system_calls.cpp
  /// SYSCALL or SYSRET has just been executed, and go_on() has found a block behind it.
  void learn_system_call(u32 request);
  void forget_system_calls() { system_calls_[0].known = system_calls_[1].known = false; }
  // x87_state.cpp
  /// The guest's x87 registers back into the state, if the host's unit has them.
  void save_x87();
  /// The pointers to the unit's last instruction alone: selectors are about to change, perhaps.
  void settle_x87_pointers();
  void note_x87_pointers(bool exception_waits);
  /// x87: the control, status and tag words and the registers of an FXSAVE image.
  void take_x87(const u8* image);
  bool x87_allowed() const { return !(cpu_->state.cr0 & (x86::cr0::em | x86::cr0::ts)); }
  /// In a signal handler that ends what the thread was doing: the unit's registers are in the signal frame.
  void rescue_x87(const void* ucontext);
  /// In a signal handler: the thread goes on at the way out, with the state that the instruction found.
  bool recover(void* ucontext);

  const bool exact_;
  x86::Cpu* cpu_ = nullptr;
  std::unique_ptr<Reference> reference_;
  std::unique_ptr<direct::Direct> direct_;        ///< nullptr: all code is translated
  const std::unique_ptr<CodeMemory> own_memory_;  ///< where nobody shares its
  CodeCache cache_;
  Decoder decoder_;
  Context* context_;
  Stubs stubs_;
  Mode mode_{};
  u64 epoch_ = 1;  ///< grows whenever somebody may have written code and told the guest
  u64 flushes_seen_ = 0;
  u64 callers_gs_base_ = 0;
  u16 callers_x87_control_ = 0;
  bool x87_used_ = false;  ///< the unit has held guest values since the caller entered
  const Supervision* supervision_ = nullptr;
  unsigned block_limit_ = most_instructions;
  bool in_run_ = false;
  u64 translations_ = 0;
  bool keep_code_ = false;
  SharedCode shared_;
  const bool host_has_all_vectors_ = x86::supports(x86::Feature::avx512bw);
  bool tries_without_ = false;    ///< user code runs without the vector registers that it had
  u32 trial_after_ = 64;          ///< how many entries to user code with them come before a trial
  u32 entries_with_vectors_ = 0;  ///< since the last
  u8 user_vectors_ = no_vectors;  ///< user code had the vector registers when it was left
  struct SystemCall {
    bool known = false;
    x86::Privilege privilege{};
    x86::Segment code, stack;
    u64 time_is_refused = 0;
  } system_calls_[2];                             ///< what SYSCALL did, and SYSRET
  bool serialized_ = false;                       ///< the guest has executed an instruction that serializes, perhaps
  bool code_dropped_ = false;                     ///< the block that runs may be gone
  u64 steps_[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {};  ///< of the reference engine, by mnemonic
  // What is in use, so that a flush touches only that.
  struct TlbUse {
    u32 count = 0;      ///< more than there is room for: any may be
    u16 entries[2048];  ///< some more than once
  };
  TlbUse tlb_used_[2];  ///< [1]: of global pages
  u32 jumps_used_count_[2] = {}, chains_used_count_[2] = {};
  u64 eras_[2] = {1, 1};
  u64 jump_pages_[jump_page_bits / 64] = {};  ///< of which pages the jump cache may have targets: one hashed bit each
  u32 jump_modes_ = 0;                        ///< and in which modes
  u32 jumps_used_[2][Mode::count * jump_entries];  ///< [1]: whose pages are global
  struct LinkedChain {
    Chain* chain;
    Gva page;                   ///< of its target
  } chains_used_[2][1u << 15];  ///< [1]: from global pages to global pages
};

}  // namespace anykvm::engine::translate
