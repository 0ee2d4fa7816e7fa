#include "engine/lockstep/lockstep.h"

#include <unistd.h>

#include <cstring>

#include "engine/lockstep/turn.h"

namespace anykvm::engine {

std::unique_ptr<Engine> make_lockstep() { return std::make_unique<lockstep::Lockstep>(); }

namespace lockstep {

using x86::ExitKind;

namespace {
Turns turns;  // of all CPUs of the process: their machines may share memory
}

Lockstep::Lockstep(void (*tamper)(u8*, u8*)) : reference_(make_reference()), tamper_(tamper), log_(most_instructions) {}

void Lockstep::Registers::save(const x86::Cpu& cpu) {
  std::memcpy(static_cast<void*>(&state), &cpu.state, sizeof state);
  data_privilege = cpu.data_privilege;
  system_privilege = cpu.system_privilege;
  instructions = cpu.instructions;
}

void Lockstep::Registers::restore(x86::Cpu& cpu) const {
  std::memcpy(static_cast<void*>(&cpu.state), &state, sizeof state);
  cpu.data_privilege = data_privilege;
  cpu.system_privilege = system_privilege;
  cpu.instructions = instructions;
  cpu.exit = {};
}

void Lockstep::run(x86::Cpu& cpu) {
  cpu_ = &cpu;
  if (report_.size()) {
    cpu.exit = {.kind = ExitKind::engine_error, .reason = "lockstep has found a difference"};
    return;
  }
  const translate::Translator::Supervision supervision{
      .arg = this,
      .may_step = [](void* self) { return static_cast<Lockstep*>(self)->may_step(); },
      .made =
          [](void* self, u8* begin, u8* end) {
            if (const auto tamper = static_cast<Lockstep*>(self)->tamper_) tamper(begin, end);
          },
  };
  translator_.enter(
      cpu, always_,
      [](void* self) {
        auto& lockstep = *static_cast<Lockstep*>(self);
        lockstep.translators_watch_ = lockstep.cpu_->code_watch;
        lockstep.cpu_->code_watch = {
            [](void* self, const u8* host) { static_cast<Lockstep*>(self)->page_written(host); }, self};
        for (bool goes_on = true; goes_on;) {
          turns.take();
          lockstep.has_turn_ = true;
          goes_on = lockstep.run_stretch();
          lockstep.has_turn_ = false;
          turns.give();
        }
      },
      this, &supervision);
}

void Lockstep::step(x86::Cpu& cpu) {
  turns.take();
  has_turn_ = true;
  reference_->step(cpu);
  has_turn_ = false;
  turns.give();
}

void Lockstep::abandon() {
  translator_.abandon();
  if (cpu_) cpu_->rehearsal = {};
  performing_ = false;
  if (has_turn_) turns.give();
  has_turn_ = false;
}

bool Lockstep::execute_alone() {
  reference_->step(*cpu_);
  ++counts_.alone;
  return cpu_->exit.kind == ExitKind::none;
}

/// One stretch and, where it ends before an instruction that may not be repeated, that instruction.
bool Lockstep::run_stretch() {
  x86::Cpu& cpu = *cpu_;
  if (cpu.attention.load(std::memory_order_relaxed) || __atomic_load_n(cpu.immediate_exit, __ATOMIC_RELAXED)) {
    cpu.exit.kind = ExitKind::attention;
    return false;
  }
  if (!translator_.translatable() || cpu.debug_exit_pending || cpu.mmio.touched()) return execute_alone();

  start_.save(cpu);
  for (unsigned attempt = 0; attempt < attempts; ++attempt) {
    const u32 count = rehearse_stretch();
    if (!count) return execute_alone();
    if (try_stretch(count)) {
      counts_.instructions += count;
      ++counts_.stretches;
      counts_.again += attempt != 0;
      return count >= enough || execute_alone();
    }
    take_back_performance();
    if (attempt + 1 < attempts) continue;
    explain(count);
    (void)!write(STDERR_FILENO, report_.c_str(), report_.size());
  }
  cpu.exit = {.kind = ExitKind::engine_error, .reason = "lockstep has found a difference"};
  return false;
}

u32 Lockstep::rehearse_stretch() {
  const u32 count = rehearse(most_instructions, enough);
  if (count < most_instructions && !reference_->end_rehearsal) return count;
  // No backward jump came in time, or nothing at which translated code leaves: as far as the last one.
  for (u32 n = count; n > 0; --n)
    if (boundaries_[n].back) return rehearse(n);
  return 0;
}

u32 Lockstep::rehearse(u32 most, u32 until_back) {
  x86::Cpu& cpu = *cpu_;
  for (;;) {
    log_.clear();
    cpu.mmu.flush_all();
    reference_->end_rehearsal = false;
    cpu.rehearsal = {
        .store = [](void* self, u8* host, unsigned size,
                    Gva gva) { static_cast<Lockstep*>(self)->log_.note(host, size, gva); },
        .engine = this,
        .marked = [](void* self, const u8* host) { static_cast<Lockstep*>(self)->entry_marked(host); },
    };
    boundaries_[0] = boundary_of(cpu, false);
    const Reference::Rehearsed rehearsed = reference_->rehearse(cpu, {boundaries_ + 1, most}, until_back);
    cpu.rehearsal = {};
    expected_.save(cpu);
    log_.take_back();
    start_.restore(cpu);
    end_ = rehearsed.count;
    if (rehearsed.clean || !rehearsed.count) return rehearsed.clean ? rehearsed.count : 0;
    most = rehearsed.count;
  }
}

int Lockstep::locate() const {
  const u64 rip = cpu_->state.rip;
  if (position_ == end_) return rip == boundaries_[end_].rip ? int(end_) : -1;
  int found = rip == boundaries_[position_].rip ? int(position_) : -1;
  // Up to the first backward jump all are different, and translated code leaves there at the latest.
  u32 n = position_ + 1;
  for (; n < end_ && !boundaries_[n].back; ++n)
    if (boundaries_[n].rip == rip) found = int(n);
  const Boundary& last = boundaries_[n];
  if (last.rip != rip) return found;
  if (found < 0) return int(n);
  const Boundary here = boundary_of(*cpu_, true);
  if (!last.back || (last.sum == here.sum && (!last.top || !here.top || last.top == here.top))) return int(n);
  return found;
}

bool Lockstep::may_step() {
  if (!performing_) return true;
  const int at = locate();
  return at >= 0 && u32(at) < end_;
}

void Lockstep::page_written(const u8* host) {
  if (performing_) pages_.take(const_cast<u8*>(reinterpret_cast<const u8*>(u64(host) & page_mask)));
  translators_watch_.written(translators_watch_.engine, host);
}

/// A walk has marked an entry that the guest has stored in the same stretch. Walks are not repeated, so it must not
/// look at the entry again.
void Lockstep::entry_marked(const u8* host) {
  for (const StoreLog::Store& store : log_.stores())
    if (host + 8 > store.host && host < store.host + store.size) reference_->end_rehearsal = true;
}

bool Lockstep::perform(u32 count, u32 times) {
  x86::Cpu& cpu = *cpu_;
  pages_.clear();
  position_ = 0;
  end_ = count;
  performing_ = true;
  // A first store to a page would be a step of the reference engine; it is the translator's own that is to be tried.
  u64 page = ~0ull;
  for (const StoreLog::Store& store : log_.stores()) {
    if ((store.gva & page_mask) == page) continue;
    page = store.gva & page_mask;
    x86::Mmu::Translation translation;
    (void)cpu.mmu.translate(cpu, store.gva, x86::Access::write, cpu.data_privilege, translation);
  }
  u64 idle = 0;  // a REP may be interrupted behind each element
  while (position_ < count && idle < 2 * Reference::most_elements && times--) {
    cpu.exit = {};
    const bool goes_on = translator_.run_once();
    const int at = locate();
    if (at < 0 || (!goes_on && u32(at) != count)) break;
    idle = u32(at) == position_ ? idle + 1 : 0;
    position_ = u32(at);
  }
  performing_ = false;
  cpu.exit = {};
  return position_ == count;
}

u64 Lockstep::ignored_flags() {
  if (!((cpu_->state.rflags() ^ expected_.state.rflags()) & x86::flag::arithmetic)) return 0;
  ++counts_.flags;
  return dead_flags(*cpu_);
}

bool Lockstep::memory_is_same() {
  for (const StoreLog::Store& store : log_.stores()) {
    if (!std::memcmp(store.host, log_.left(store), store.size)) continue;
    // A page table entry that the rehearsal has marked after storing it?
    constexpr u64 present = 1, marks = 0x60;
    u64 here, left;
    if (store.size != 8) return false;
    std::memcpy(&here, store.host, 8);
    std::memcpy(&left, log_.left(store), 8);
    if (!(here & left & present) || (here ^ left) & ~marks) return false;
    std::memcpy(store.host, &left, 8);
  }
  // And nothing else was stored: each page is its copy with the reference engine's stores.
  for (u32 n = 0; n < pages_.count(); ++n) {
    if (!std::memcmp(pages_.page(n), pages_.copy(n), page_size)) continue;
    u8 page[page_size];
    std::memcpy(page, pages_.copy(n), page_size);
    for (const StoreLog::Store& store : log_.stores())
      if ((u64(store.host) & page_mask) == u64(pages_.page(n)))
        std::memcpy(page + (u64(store.host) & ~page_mask), log_.left(store), store.size);
    if (std::memcmp(pages_.page(n), page, page_size)) return false;
  }
  return true;
}

bool Lockstep::compare() {
  return same_state(expected_.state, cpu_->state, ignored_flags()) &&
         cpu_->data_privilege == expected_.data_privilege && memory_is_same();
}

bool Lockstep::try_stretch(u32 count) { return perform(count) && compare(); }

void Lockstep::take_back_performance() {
  for (u32 n = 0; n < pages_.count(); ++n) {
    u8 *page = pages_.page(n), *copy = pages_.copy(n);
    for (unsigned at = 0; at < page_size; ++at)
      if (page[at] != copy[at]) page[at] = copy[at];
  }
  log_.put_back();
  start_.restore(*cpu_);
}

/// Makes `count` instructions of the reference engine the beginning.
void Lockstep::advance(u32 count) {
  (void)rehearse(count);
  log_.store_again();
  expected_.restore(*cpu_);
  start_.save(*cpu_);
}

/// Narrows the difference down to one instruction where that is possible. The guest is at the start of the stretch.
void Lockstep::explain(u32 count) {
  // What is said if it does not come up in short blocks.
  (void)rehearse(count);
  (void)try_stretch(count);
  write_report(count, count);
  take_back_performance();
  // Between which two backward jumps does it come up?
  u32 good = 0, bad = count;
  for (u32 n = 1; n < count; ++n) {
    if (!boundaries_[n].back) continue;  // a rehearsal of less finds the same boundaries again
    const bool same = rehearse(n) == n && try_stretch(n);
    take_back_performance();
    if (!same) {
      bad = n;
      break;
    }
    good = n;
  }
  if (good) advance(good);
  // Then block by block, each growing from one instruction to all that it has.
  for (u32 left = bad - good; left;) {
    u32 length = 1, reached = 1;
    for (; length <= left && length <= translate::most_instructions; ++length) {
      translator_.limit_blocks(length);
      if (rehearse(length) != length) break;
      (void)perform(length, 1);
      reached = position_;
      if (reached < length) break;  // the block has no more, or is entered again with the vector registers
      if (!compare()) {
        write_report(length, length - 1);
        return;
      }
      take_back_performance();
    }
    take_back_performance();
    reached = reached && reached < length ? reached : length - 1;
    if (!reached) break;
    advance(reached);
    left -= reached;
  }
}

void Lockstep::write_report(u32 count, u32 wrong) {
  x86::Cpu& cpu = *cpu_;
  const x86::CpuState translated = cpu.state;
  const bool astray = position_ != count;
  u64 ignored = 0;
  if (!astray) ignored = ignored_flags();
  report_.clear();
  report_.add("anykvm: the translator differs from the reference engine (lockstep)\n");
  report_.add("%u-bit code, CPL %u, behind %s\n\n", start_.state.code_bits, start_.state.cpl,
              wrong < count ? "the instruction marked >" : "the instructions");
  constexpr u32 most_listed = 64;
  for (u32 n = count > most_listed ? count - most_listed : 0; n < count; ++n)
    list_instruction(report_, cpu, boundaries_[n].rip, n == wrong ? ">" : "");
  report_.add("\n");
  if (astray) report_.add("The translator has gone elsewhere.\n\n");
  list_registers(report_, start_.state, expected_.state, translated, ignored);

  bool memory = false;
  const auto bytes = [&](const char* name, const u8* at, u32 size) {
    report_.add("      %-10s ", name);
    for (u32 n = 0; n < size && n < 64; ++n) report_.add("%02x ", at[n]);
    report_.add("\n");
  };
  for (const StoreLog::Store& store : log_.stores()) {
    if (!std::memcmp(store.host, log_.left(store), store.size)) continue;
    memory = true;
    report_.add("  * %u bytes stored at %016llx\n", store.size, static_cast<unsigned long long>(store.gva));
    bytes("reference", log_.left(store), store.size);
    bytes("translator", store.host, store.size);
  }
  for (u32 n = 0; n < pages_.count() && !memory; ++n) {
    for (unsigned at = 0; at < page_size; ++at) {
      const u8* host = pages_.page(n) + at;
      if (*host == pages_.copy(n)[at]) continue;
      bool announced = false;
      for (const StoreLog::Store& store : log_.stores())
        announced = announced || (host >= store.host && host < store.host + store.size);
      if (announced) continue;
      report_.add("  * a byte at offset %03x of a page, which only the translator stored: %02x\n", at, *host);
    }
  }
  report_.add("\n%llu instructions were the same before.\n", static_cast<unsigned long long>(counts_.instructions));
}

}  // namespace lockstep
}  // namespace anykvm::engine
