#include "engine/translate/translator.h"

#include <asm/prctl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <utility>

#include "engine/translate/block.h"
#include "os/fault_guard.h"
#include "x86/cpuid.h"

namespace anykvm::engine {

std::unique_ptr<Engine> make_translator(bool exact, CodeMemory* memory) {
  return std::make_unique<translate::Translator>(exact, false, memory);
}
std::unique_ptr<Engine> make_direct(CodeMemory* memory) {
  return std::make_unique<translate::Translator>(false, true, memory);
}
const char* direct_obstacle() { return direct::Direct::obstacle(); }

namespace translate {

using x86::ExitKind;

namespace {

// The thread's GS base: free in 64-bit user programs, and a system call only on old kernels.
bool has_fsgsbase() {
  static const bool has = getauxval(AT_HWCAP2) & 2;
  return has;
}
u64 gs_base() {
  u64 base = 0;
  if (has_fsgsbase())
    __asm__ volatile("rdgsbase %0" : "=r"(base));
  else
    syscall(SYS_arch_prctl, ARCH_GET_GS, &base);
  return base;
}
void set_gs_base(u64 base) {
  if (has_fsgsbase())
    __asm__ volatile("wrgsbase %0" ::"r"(base));
  else
    syscall(SYS_arch_prctl, ARCH_SET_GS, base);
}

}  // namespace

Next step_function(Context* context, u64 request) {
  return static_cast<Translator*>(context->translator)->step_in_block(request);
}

Translator::Translator(bool exact, bool direct, CodeMemory* memory)
    : exact_(exact),
      reference_(make_reference()),
      direct_(direct ? std::make_unique<direct::Direct>(direct::KnownCode{known_instructions, this}) : nullptr),
      own_memory_(memory ? nullptr : std::make_unique<CodeMemory>()),
      cache_(memory ? *memory : *own_memory_) {
  void* at = mmap(nullptr, sizeof(Context), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  context_ = new (at) Context;
  context_->translator = this;
  context_->self = context_;
  context_->x87_missing = 1;
  context_->tlb_index_bits = u64(tlb_entries - 1) << 12;
  context_->page_number_bits = page_mask;
  context_->jump_index_bits = u64(jump_entries - 1) << 1;
  context_->cleared[0] = ~x86::flag::if_;
  context_->cleared[1] = ~x86::flag::df;
  context_->cleared[2] = ~x86::flag::ac;
  static_assert(offsetof(Mode, privilege) == 0 && sizeof(Mode::privilege) == 1);
  context_->mode = reinterpret_cast<u8*>(&mode_);
  context_->arithmetic_flags = x86::flag::arithmetic;
  context_->interrupt_flag = x86::flag::if_;
  context_->direction_flag = x86::flag::df;
  for (unsigned n = 0; n < 2; ++n) context_->low_bits[n] = (32u << n) - 1;
  // Zeroed memory is an empty table but for the slots that page 0 and RIP 0 and their neighbours would match.
  for (auto& table : context_->tlb)
    for (unsigned slot : {tlb_entries - 1, 0u, 1u})
      table[slot].minus_read = table[slot].minus_write = minus_other_page(slot);
  for (auto& jumps : context_->jumps) jumps[0].minus_rip = jumps[0].never_minus_rip = 1;
  Assembler a(cache_.room().hot, cache_.room_end().hot);
  stubs_ = emit_stubs(a, x86::supports(x86::Feature::avx512f));
  cache_.keep_code(a.here());
}

Translator::~Translator() { munmap(context_, sizeof(Context)); }

/// The VectorLevel that CR0, CR4 and XCR0 let a block have.
u8 Translator::vectors_allowed() const {
  const x86::CpuState& s = cpu_->state;
  namespace xf = x86::xfeature;
  constexpr u64 needed = xf::sse | xf::avx, needed_for_all = needed | xf::opmask | xf::zmm_hi256 | xf::hi16_zmm;
  if (s.cr0 & (x86::cr0::em | x86::cr0::ts) || !(s.cr4 & x86::cr4::osfxsr) || !(s.cr4 & x86::cr4::osxsave) ||
      (s.xcr0 & needed) != needed)
    return no_vectors;
  return (s.xcr0 & needed_for_all) == needed_for_all && host_has_all_vectors_ ? all_vectors : first_vectors;
}

namespace {

/// Neither its limit nor its type forbids an access.
bool reaches_all(const x86::Segment& segment) {
  constexpr u8 code = 8, expands_down = 4, writable = 2;
  return !segment.unusable && segment.present && segment.limit == ~0u &&
         (segment.type & (code | expands_down | writable)) == writable;
}

/// 32-bit code that Mode::narrow means.
bool is_flat(const x86::CpuState& s) {
  const x86::Segment& code = s.segment[x86::cs];
  if (code.base || code.limit != ~0u || !s.segment[x86::ss].db) return false;
  for (const x86::SegmentName name : {x86::ss, x86::ds, x86::es})
    if (s.segment[name].base || !reaches_all(s.segment[name])) return false;
  u64 all = s.rip;
  for (unsigned reg = 0; reg < 8; ++reg) all |= s.gpr[reg];
  return !(all >> 32);
}

bool is_narrow(const x86::CpuState& s) { return s.code_bits == 32; }

}  // namespace

bool Translator::translatable() const {
  const x86::CpuState& s = cpu_->state;
  return (s.code_bits == 64 || (s.code_bits == 32 && is_flat(s))) && (s.cpl == 0 || s.cpl == 3) &&
         !(s.other_flags & x86::flag::tf) && !s.event.shadow && !cpu_->debug_watch &&
         cpu_->data_privilege != x86::Privilege::user_aligned;
}

/// global: what lies in global pages; else what does not.
void Translator::flush_tlb(bool global) {
  TlbUse& used = tlb_used_[global];
  if (used.count <= std::size(used.entries)) {
    for (u32 n = 0; n < used.count; ++n) {
      TlbEntry& entry = context_->tlb[used.entries[n] / tlb_entries][used.entries[n] % tlb_entries];
      entry.minus_read = entry.minus_write = minus_other_page(used.entries[n] % tlb_entries);
    }
  } else {
    for (auto& table : context_->tlb)
      for (unsigned slot = 0; slot < tlb_entries; ++slot)
        table[slot].minus_read = table[slot].minus_write = minus_other_page(slot);
    tlb_used_[!global].count = 0;
  }
  used.count = 0;
}

void Translator::flush_listed_jumps(bool global) {
  for (u32 n = 0; n < jumps_used_count_[global]; ++n) {
    const unsigned slot = jumps_used_[global][n] % jump_entries;
    Jump& jump = context_->jumps[jumps_used_[global][n] / jump_entries][slot];
    jump.minus_rip = slot == 0;
    jump.never_minus_rip &= ~Jump::listed(global);
  }
  jumps_used_count_[global] = 0;
  ++eras_[global];
  unlink_chains(global);
  context_->link_site = 0;
}

void Translator::unlink_chains(bool global) {
  for (u32 n = 0; n < chains_used_count_[global]; ++n) {
    Chain& chain = *chains_used_[global][n].chain;
    chain.code = chain.unlinked;
  }
  chains_used_count_[global] = 0;
}

void Translator::flush_jumps() {
  // Each return from a client comes here, when few have been used. A page whose last jump has given its slot to another
  // page's is noted until the next time that there were many.
  constexpr u32 few = 32;
  if (jumps_used_count_[0] + jumps_used_count_[1] < few) {
    for (unsigned global : {0, 1})
      for (u32 n = 0; n < jumps_used_count_[global]; ++n) {
        const u32 used = jumps_used_[global][n];
        jump_pages_[jump_page_bit(context_->jumps[used / jump_entries][used % jump_entries].page_base) / 64] = 0;
      }
  } else {
    std::memset(jump_pages_, 0, sizeof jump_pages_);
  }
  flush_listed_jumps(false);
  flush_listed_jumps(true);
  jump_modes_ = 0;
}

void Translator::follow_flushes() {
  const u64 now = cpu_->mmu.flush_count();
  if (now == flushes_seen_) return;
  Gva pages[x86::Mmu::most_pages_told];
  const u64 seen = std::exchange(flushes_seen_, now);
  const int count = cpu_->mmu.pages_flushed_since(seen, pages);
  if (count < 0) {
    flush_tlb(false);
    flush_listed_jumps(false);
    if (cpu_->mmu.global_pages_flushed_since(seen)) {
      flush_tlb(true);
      flush_jumps();
    }
  }
  for (int n = 0; n < count; ++n) flush_page(pages[n]);
}

void Translator::flush_page(Gva page) {
  const unsigned slot = page >> 12 & (tlb_entries - 1);
  for (auto& table : context_->tlb)
    if (table[slot].minus_read == -page || table[slot].minus_write == -page)
      table[slot].minus_read = table[slot].minus_write = minus_other_page(slot);
  if (!(jump_pages_[jump_page_bit(page) / 64] >> jump_page_bit(page) % 64 & 1)) return;
  // A page's targets have a slot for each two bytes, one behind the other.
  static_assert(jump_entries >= page_size / 2);
  for (unsigned modes = jump_modes_; modes; modes &= modes - 1) {
    Jump* const jumps = context_->jumps[std::countr_zero(modes)];
    for (unsigned slot = jump_slot(page), end = slot + page_size / 2; slot < end; ++slot)
      if (jumps[slot].page_base == page) jumps[slot].minus_rip = slot == 0;
  }
  for (unsigned global : {0, 1})
    for (u32 n = 0; n < chains_used_count_[global]; ++n) {
      const auto [chain, target] = chains_used_[global][n];
      if (target == page) chain->code = chain->unlinked;
    }
}

/// Of all TLBs: the reference engine's, too.
void Translator::forbid_stores(u64 page) {
  cpu_->mmu.forbid_stores(page, SharedCode::address_bits);
  for (auto& table : context_->tlb)
    for (unsigned slot = 0; slot < tlb_entries; ++slot)
      if (!((table[slot].host ^ page) & SharedCode::address_bits)) table[slot].minus_write = minus_other_page(slot);
  if (direct_) direct_->forbid_stores(page);
}

/// Its blocks go, and every way to them: others jump to them through the jump cache alone.
void Translator::drop(CodePage& page) {
  cache_.for_each_block(page, [this](const Block& block) {
    if (block.mode >= Mode::count) return;
    // The slots of all guest pages that it may lie in.
    for (unsigned slot = jump_slot(block.address & ~page_mask); slot < jump_entries; slot += page_size / 2) {
      Jump& jump = context_->jumps[block.mode][slot];
      if (jump.code == u64(block.code)) jump.minus_rip = slot == 0;
    }
  });
  cache_.drop(page);
  context_->link_site = 0;
}

void Translator::refresh_segments() {
  context_->fs_base = cpu_->state.segment[x86::fs].base;
  context_->gs_base = cpu_->state.segment[x86::gs].base;
  if (mode_.narrow) {
    constexpr u64 out_of_reach = 1ull << 63;
    context_->fs_refused = reaches_all(cpu_->state.segment[x86::fs]) ? 0 : out_of_reach;
    context_->gs_refused = reaches_all(cpu_->state.segment[x86::gs]) ? 0 : out_of_reach;
  }
  context_->access_check_is_refused = !(cpu_->state.cr4 & x86::cr4::smap) || !cpu_->cpuid.has(x86::Feature::smap);
  context_->time_is_refused = cpu_->state.tsc_ratio || (cpu_->state.cpl && cpu_->state.cr4 & x86::cr4::tsd) ||
                              !cpu_->cpuid.has(x86::Feature::rdtscp);
}

void Translator::page_written(const u8* host) {
  shared_.written(u64(host) & page_mask);
  CodePage* page = cache_.find_page(u64(host) & page_mask);
  if (!page || !page->first_block) return;
  drop(*page);
  code_dropped_ = true;
}

Block* Translator::make_block(CodePage& page, u64 address, bool single_checks, const u8* rest, const u8* behind) {
  const BlockRequest request{.page = cache_.copy_of(page),
                             .address = page.address,
                             .offset = unsigned(address & ~page_mask),
                             .mode = mode_,
                             .stubs = &stubs_,
                             .decoder = &decoder_,
                             .cache = &cache_,
                             .limit = block_limit_,
                             .rest = rest,
                             .behind = behind,
                             .single_checks = single_checks,
                             .exact_flags = exact_,
                             .supervised = supervision_ != nullptr};
  u8* const code = cache_.room().hot;
  const BlockCode made = translate_block(request, cache_.room(), cache_.room_end());
  if (!made.end.hot) return nullptr;
  ++translations_;
  if (supervision_) supervision_->made(supervision_->arg, code, code + made.code_bytes);
  return cache_.add(page, address, block_mode(single_checks && !rest), made.end, made.code_bytes, made.places,
                    made.instructions, made.lines);
}

Block* Translator::block_at_rip(bool single_checks) {
  x86::CpuState& s = cpu_->state;
  x86::Mmu::Translation where;
  const u64 walks = cpu_->mmu.walks;
  if (cpu_->mmu.translate(*cpu_, s.rip, x86::Access::fetch, cpu_->fetch_privilege(), where) != x86::Result::ok ||
      !where.host)
    return nullptr;
  const bool newly_mapped = cpu_->mmu.walks != walks;
  const u64 address = reinterpret_cast<u64>(where.host);
  for (unsigned attempt = 0; attempt < 2; ++attempt) {
    CodePage* page = cache_.page_for(address & page_mask);
    if (page && cache_.is_too_lively(*page)) return nullptr;
    if (page && newly_mapped) page->verified = page->copied = 0;
    // From now on a store into the page must be noticed: no TLB entry may let one through.
    if (page && (!page->first_block || page->verified != epoch_) && shared_.watch(page->address))
      forbid_stores(page->address);
    if (page && page->first_block && page->verified != epoch_) {
      if (!cache_.is_unchanged(*page)) drop(*page);
      page->verified = epoch_;
    }
    Block* block = page ? cache_.find(address, block_mode(single_checks)) : nullptr;
    if (page && !block) {
      cache_.take_copy(*page, epoch_);
      if (!page->first_block) page->verified = epoch_;
      block = make_block(*page, address, single_checks);
    }
    if (block) {
      if (!single_checks)
        note_jump(s.rip, *page, *block);
      else
        note_place(s.rip, *page);
      return block;
    }
    cache_.evict();
    flush_jumps();
  }
  return nullptr;
}

Next Translator::step_in_block(u64 request) {
  x86::CpuState& s = cpu_->state;
  s.rip = context_->page_base + StepRequest::offset(request);
  if (!may_step()) return Next::leave;
  if (StepRequest::sees_x87(request)) save_x87();
  settle_x87_pointers();
  const u32 x87_missing = context_->x87_missing;
  const bool quick = StepRequest::quick(request) && quick_step(request);
  if (!quick) {
    ++steps_[StepRequest::mnemonic(request)];
    reference_->step(*cpu_);
  }
  if (!x87_allowed()) save_x87();
  if (StepRequest::ends(request)) {
    serialized_ = true;
    const bool is_call = quick && (StepRequest::mnemonic(request) == ZYDIS_MNEMONIC_SYSCALL ||
                                   StepRequest::mnemonic(request) == ZYDIS_MNEMONIC_SYSRET);
    if (!quick) forget_system_calls();
    if (StepRequest::mnemonic(request) == ZYDIS_MNEMONIC_INVALID)
      translate_crossing(context_->page_base + StepRequest::offset(request));
    const Next next = go_on();
    if (is_call && next != Next::leave) learn_system_call(u32(request));
    return next;
  }
  refresh_segments();
  const bool same = cpu_->exit.kind == ExitKind::none && s.rip == context_->page_base + StepRequest::next(request) &&
                    translatable() && is_narrow(s) == mode_.narrow && cpu_->data_privilege == mode_.privilege &&
                    context_->x87_missing == x87_missing && !code_dropped_ &&
                    cpu_->mmu.flush_count() == flushes_seen_ && mode_.vectors <= vectors_allowed();
  return same ? Next::same_block : go_on();
}

Next Translator::go_on() {
  x86::Cpu& cpu = *cpu_;
  if (cpu.exit.kind != ExitKind::none || context_->attention->load(std::memory_order_relaxed) || !translatable() ||
      !shared_.is_quiet())
    return Next::leave;
  follow_flushes();
  const Mode mode = next_mode(false);
  mode_ = mode;
  if (direct_ && mode.privilege == x86::Privilege::user && !mode.narrow && direct_->wants(cpu)) return Next::leave;
  const Jump& jump = context_->jumps[mode.number()][jump_slot(cpu.state.rip)];
  if (jump.minus_rip + cpu.state.rip == 0) {
    context_->enter_at = jump.code;
    context_->page_base = jump.page_base;
  } else if (!find(cpu.state.rip)) {
    return Next::leave;
  }
  code_dropped_ = false;
  cpu.state.other_flags &= ~x86::flag::rf;
  refresh_segments();
  return Next(unsigned(Next::enter) + mode.vectors);
}

/// Kernels hardly use the vector registers: their code begins without. User code has them if it had them last; but to
/// move them all at each entry to the kernel costs more than a small system call, so that now and then it is tried
/// without, less often when that was no use.
Mode Translator::next_mode(u8 wants_vectors) {
  constexpr u32 first_trial = 64, last_trial = 1u << 16;
  Mode mode = mode_;
  if (mode.privilege != cpu_->data_privilege) {
    if (mode.privilege == x86::Privilege::user) {
      user_vectors_ = mode.vectors;
      if (user_vectors_) forget_system_calls();
      if (std::exchange(tries_without_, false)) trial_after_ = first_trial;
    }
    mode = {cpu_->data_privilege, no_vectors};
    if (direct_ && mode.privilege == x86::Privilege::user) direct_->entered_user();
    if (mode.privilege == x86::Privilege::user && user_vectors_) {
      tries_without_ = ++entries_with_vectors_ >= trial_after_;
      if (tries_without_)
        entries_with_vectors_ = 0;
      else
        mode.vectors = user_vectors_;
    }
  }
  if (wants_vectors && std::exchange(tries_without_, false)) trial_after_ = std::min(2 * trial_after_, last_trial);
  mode.vectors = std::min(std::max(mode.vectors, wants_vectors), vectors_allowed());
  mode.narrow = is_narrow(cpu_->state);
  return mode;
}

bool Translator::recover(void* ucontext) {
  greg_t* const registers = static_cast<ucontext_t*>(ucontext)->uc_mcontext.gregs;
  const auto at = reinterpret_cast<const u8*>(registers[REG_RIP]);
  if (!cache_.is_code(at)) return false;
  const Block* block = cache_.block_with(at);
  const int offset = block ? CodeCache::instruction_at(*block, at) : -1;
  if (offset < 0) return false;
  static_assert(address_scratch == 14);
  registers[REG_R14] = greg_t(context_->page_base + unsigned(offset));
  registers[REG_RIP] = reinterpret_cast<greg_t>(stubs_.leave[Mode::vectors_of(block->mode)]);
  context_->faulted = 1;
  return true;
}

void Translator::abandon() {
  if (!std::exchange(in_run_, false)) return;
  save_x87();
  if (direct_) direct_->abandon(*cpu_);
  if (std::exchange(x87_used_, false)) __asm__ volatile("fninit\n\tfldcw %0" ::"m"(callers_x87_control_));
  set_gs_base(callers_gs_base_);
  shared_.leave();
}

void Translator::for_each_step(void (*f)(void* arg, const char* mnemonic, u64 count), void* arg) const {
  for (unsigned mnemonic = 0; mnemonic < std::size(steps_); ++mnemonic) {
    const u64 count = __atomic_load_n(&steps_[mnemonic], __ATOMIC_RELAXED);
    if (!count) continue;
    const char* name = mnemonic == ZYDIS_MNEMONIC_INVALID ? "" : ZydisMnemonicGetString(ZydisMnemonic(mnemonic));
    f(arg, name, count);
  }
}

void Translator::enter(x86::Cpu& cpu, const std::atomic<u32>& attention, void (*body)(void*), void* arg,
                       const Supervision* supervision) {
  const os::FaultRecovery recovery(
      [](void* self, void* ucontext) { return static_cast<Translator*>(self)->recover(ucontext); }, this,
      [](void* self, const void* ucontext) { static_cast<Translator*>(self)->rescue_x87(ucontext); });
  cpu_ = &cpu;
  supervision_ = supervision;
  cpu.exit.kind = ExitKind::none;
  if (cpu.code_watch.engine != this) {
    cpu.code_watch = {[](void* engine, const u8* host) { static_cast<Translator*>(engine)->page_written(host); }, this};
    cpu.mmu.flush_all();  // of what was let through before anybody watched
  }
  context_->state = &cpu.state;
  context_->attention = &attention;
  context_->window_wanted = &cpu.window_wanted;
  context_->data_privilege = reinterpret_cast<u8*>(&cpu.data_privilege);
  context_->link_site = 0;
  context_->wants_checks = 0;
  forget_system_calls();
  if (cache_.is_asked()) [[unlikely]] {
    flush_jumps();
    cache_.give_back();
  }
  if (!std::exchange(keep_code_, false)) {
    ++epoch_;
    flush_jumps();
  }
  callers_gs_base_ = gs_base();
  __asm__ volatile("fnstcw %0" : "=m"(callers_x87_control_));
  in_run_ = true;
  shared_.enter(cpu.attention);
  set_gs_base(u64(context_));
  body(arg);
  abandon();
}

void Translator::run(x86::Cpu& cpu) {
  enter(
      cpu, cpu.attention,
      [](void* self) {
        auto& translator = *static_cast<Translator*>(self);
        x86::Cpu& cpu = *translator.cpu_;
        do {
          if (cpu.attention.load(std::memory_order_relaxed) || __atomic_load_n(cpu.immediate_exit, __ATOMIC_RELAXED)) {
            cpu.exit.kind = ExitKind::attention;
            return;
          }
        } while (translator.run_once());
      },
      this);
  if (!direct_) return;
  if (cpu.exit.kind != ExitKind::attention)
    direct_->rest();
  else if (cpu.state.cpl == 3)
    direct_->interrupted(cpu);
}

/// direct::KnownCode's.
bool Translator::known_instructions(void* self, const u8* host, u64 (&begins)[page_size / 64]) {
  auto& cache = static_cast<Translator*>(self)->cache_;
  const CodePage* page = cache.find_page(u64(host));
  if (!page || !page->first_block || !SharedCode::is_watched(page->address) || !cache.is_unchanged(*page)) return false;
  cache.mark_instructions(*page, begins);
  return true;
}

u64 Translator::native_stretches() const { return direct_ ? direct_->stretches() : 0; }

bool Translator::run_natively() {
  if (!direct_ || mode_.privilege != x86::Privilege::user || mode_.narrow || !translatable() || !direct_->wants(*cpu_))
    return false;
  save_x87();
  context_->link_site = 0;
  switch (direct_->run(*cpu_)) {
    case direct::Direct::Next::translate: return false;
    case direct::Direct::Next::decide: break;
    case direct::Direct::Next::step: step_outside(); break;
  }
  serialized_ = true;
  return true;
}

/// The reference engine executes one instruction that no block has; a stretch of code that is not translated at all.
void Translator::step_outside() {
  forget_system_calls();
  save_x87();
  u64 count = 1;
  if (cpu_->state.code_bits == 64 || translatable() || supervision_)
    reference_->step(*cpu_);
  else
    count = std::max<u64>(reference_->run_stretch(*cpu_), 1);
  steps_[ZYDIS_MNEMONIC_INVALID] += count;
}

void Translator::limit_blocks(unsigned instructions) {
  block_limit_ = instructions;
  cache_.clear();
  flush_jumps();
}

bool Translator::run_once() {
  code_dropped_ = false;
  u64 watched[SharedCode::few];
  const unsigned watched_count = shared_.newly_watched(watched);
  if (watched_count > std::size(watched))
    cpu_->mmu.flush_all();
  else
    for (unsigned n = 0; n < watched_count; ++n) forbid_stores(watched[n]);
  if (shared_.is_stale(std::exchange(serialized_, false))) {
    ++epoch_;
    flush_jumps();
  }
  follow_flushes();
  const unsigned mode_before = mode_.number();
  const u8 wants_vectors = u8(std::exchange(context_->wants_vectors, 0));
  mode_ = next_mode(wants_vectors);
  const bool single_checks = std::exchange(context_->wants_checks, 0);
  if (mode_.number() != mode_before) context_->link_site = 0;
  // An instruction in which the host raised an exception: the reference engine finds out why, and what the guest
  // gets.
  const bool faulted = std::exchange(context_->faulted, 0);
  if (!faulted && run_natively()) return cpu_->exit.kind == ExitKind::none;
  Block* block = translatable() && mode_.vectors >= wants_vectors && !faulted ? block_at_rip(single_checks) : nullptr;
  if (!block) {
    context_->link_site = 0;
    if (may_step()) step_outside();
    serialized_ = true;
    return cpu_->exit.kind == ExitKind::none;
  }
  aim_link(*block);
  context_->page_base = cpu_->state.rip & page_mask;
  context_->enter_at = u64(block->code);
  cpu_->state.other_flags &= ~x86::flag::rf;  // no breakpoint is armed
  refresh_segments();
  stubs_.enter[mode_.vectors](context_);
  if (cpu_->state.code_bits != 64) cpu_->state.rip = u32(cpu_->state.rip);
  if (supervision_) save_x87();
  return cpu_->exit.kind == ExitKind::none;
}

}  // namespace translate
}  // namespace anykvm::engine
