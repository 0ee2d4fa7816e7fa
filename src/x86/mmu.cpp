// The software TLB: a table per privilege of 4096 entries, direct-mapped by page number.
//
// Tags carry a generation, and each address space (PCID) that is kept has its own: MOV CR3 chooses the generation and
// touches no memory, a flush takes a new one, and the tables are only cleared when the numbers wrap. Entries of global
// pages are valid in every generation: the first miss under another one finds them and gives them its number.
#include "x86/mmu.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "x86/cpu.h"
#include "x86/debug.h"
#include "x86/paging.h"

namespace anykvm::x86 {

namespace {

constexpr unsigned privileges = 4;
constexpr std::size_t table_bytes = privileges * Mmu::entries * sizeof(TlbEntry);
constexpr std::size_t global_bytes = privileges * Mmu::entries * sizeof(u16);
constexpr u64 last_generation = page_size - 1;

u64& tag_of(TlbEntry& entry, Access access) {
  return access == Access::read ? entry.read : access == Access::write ? entry.write : entry.fetch;
}

template <unsigned shift>
unsigned region_bit(Gva gva) {
  return unsigned(gva >> shift ^ gva >> (shift + 12)) % 4096;
}
void set_bit(u64* map, unsigned bit) { map[bit / 64] |= 1ull << (bit % 64); }
bool has_bit(const u64* map, unsigned bit) { return map[bit / 64] >> (bit % 64) & 1; }

u64 key_of(u16 pcid, u32 pkru) { return u64(pkru) << 16 | pcid; }

}  // namespace

Mmu::Mmu() {
  void* memory = mmap(nullptr, table_bytes + global_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  table_ = static_cast<Table*>(memory);
  global_ = reinterpret_cast<GlobalTable*>(static_cast<u8*>(memory) + table_bytes);
}

Mmu::~Mmu() { munmap(table_, table_bytes + global_bytes); }

Result Mmu::translate(Cpu& cpu, Gva gva, Access access, Privilege privilege, Translation& out, bool is_stack) {
  if (privilege == Privilege::user_aligned) privilege = Privilege::user;
  if (u8* known = find(gva, 1, access, privilege)) {
    // The physical address is of no use to whoever gets a host pointer; only MMIO needs it, and is never in the TLB.
    out = {0, known};
    return Result::ok;
  }
  const CpuState& s = cpu.state;
  if (s.long_mode()) {
    if (!cpu.canonical(gva)) return cpu.raise(is_stack ? exception::ss : exception::gp, 0);
  } else {
    gva = u32(gva);
  }
  PageWalk walk;
  if (!s.paging()) {
    walk.page = gva & page_mask;
  } else if (++walks; !walk_page(cpu, gva, access, privilege, walk)) {
    return cpu.raise_page_fault(gva, walk.error);
  }

  out = {walk.page | (gva & ~page_mask), nullptr};
  const HostPage page = cpu.machine.page(walk.page, access == Access::write);
  const bool is_ram = page.host && (access != Access::write || page.writable);
  if (cpu.rehearsal) [[unlikely]] {
    if (!is_ram) {
      cpu.exit.kind = ExitKind::attention;
      return Result::exit;
    }
    out.host = page.host + (gva & ~page_mask);
    if (access == Access::write) return Result::ok;
  }
  if (!is_ram) return Result::ok;
  out.host = page.host + (gva & ~page_mask);
  if (access == Access::write && cpu.code_watch.written) cpu.code_watch.written(cpu.code_watch.engine, page.host);
  if (cpu.debug_watch & watch_data && access != Access::fetch && page_is_watched(cpu, gva)) [[unlikely]]
    return Result::ok;

  const u64 linear_page = gva & page_mask, tag = linear_page | generation_;
  const u64 addend = reinterpret_cast<u64>(page.host) - linear_page;
  TlbEntry& entry = table_[unsigned(privilege)][slot(gva)];
  if ((entry.read != tag && entry.write != tag && entry.fetch != tag) || entry.addend != addend) {
    entry = {.addend = addend};
    global_[unsigned(privilege)][slot(gva)] = walk.global ? global_generation_ : 0;
  }
  tag_of(entry, access) = tag;
  if (access == Access::write) entry.read = tag;  // what may be written may be read
  if (walk.large) {                               // a 4 MiB page marks the halves of it that are used
    set_bit(large_2m_, region_bit<21>(gva));
    if (walk.huge) set_bit(large_1g_, region_bit<30>(gva));
  }
  return Result::ok;
}

bool Mmu::probe(Cpu& cpu, Gva gva, Gpa& out) {
  if (cpu.state.long_mode()) {
    if (!cpu.canonical(gva)) return false;
  } else {
    gva = u32(gva);
  }
  PageWalk walk;
  if (!cpu.state.paging()) {
    walk.page = gva & page_mask;
  } else if (!probe_page(cpu, gva, walk)) {
    return false;
  }
  out = walk.page | (gva & ~page_mask);
  return true;
}

void Mmu::clear_tables() {
  madvise(table_, table_bytes + global_bytes, MADV_DONTNEED);
  for (Context& context : contexts_) context = {};
  newest_generation_ = 0;
  global_generation_ = 1;
}

u64 Mmu::new_generation() {
  if (newest_generation_ == last_generation) clear_tables();
  return ++newest_generation_;
}

void Mmu::enter_context(u16 pcid, u32 pkru, bool flush) {
  note_flush();
  if (flush) flush_context(pcid);
  current_key_ = key_of(pcid, pkru);
  for (const Context& context : contexts_) {
    if (context.generation && context.key == current_key_) {
      generation_ = context.generation;
      return;
    }
  }
  generation_ = new_generation();
  contexts_[next_context_++ % context_count] = {current_key_, generation_};
}

void Mmu::flush_context(u16 pcid) {
  note_flush();
  for (Context& context : contexts_)
    if (u16(context.key) == pcid) context = {};
  if (u16(current_key_) == pcid) generation_ = new_generation();
}

// The current address space goes on under a number that is in no context: whoever sets CR3 without MOV CR3 flushes, and
// must not leave entries under the name of the address space before.
void Mmu::flush_non_global() {
  note_flush();
  for (Context& context : contexts_) context = {};
  generation_ = new_generation();
}

void Mmu::flush_all() {
  if (++global_generation_ == 0) clear_tables();
  std::memset(large_2m_, 0, sizeof large_2m_);
  std::memset(large_1g_, 0, sizeof large_1g_);
  flush_non_global();
  last_global_flush_ = flush_count_;
}

void Mmu::forbid_stores(u64 host_page, u64 mask) {
  for (const Privilege privilege : {Privilege::user, Privilege::supervisor, Privilege::supervisor_ac})
    for (TlbEntry& entry : table_[unsigned(privilege)])
      if (!((((entry.write & page_mask) + entry.addend) ^ host_page) & mask)) entry.write = 0;
}

int Mmu::pages_flushed_since(u64 since, Gva (&pages)[most_pages_told]) const {
  if (last_wide_flush_ > since || flush_count_ - since > most_pages_told) return -1;
  int count = 0;
  for (u64 number = since + 1; number <= flush_count_; ++number) pages[count++] = flushed_[number % most_pages_told];
  return count;
}

void Mmu::flush_page(Cpu& cpu, Gva gva) {
  if (!cpu.state.long_mode()) gva = u32(gva);
  flushed_[++flush_count_ % most_pages_told] = gva & page_mask;
  // A large page may have been entered as many small ones.
  if (has_bit(large_2m_, region_bit<21>(gva)) || has_bit(large_1g_, region_bit<30>(gva)) ||
      (!cpu.state.long_mode() && has_bit(large_2m_, region_bit<21>(gva ^ 1u << 21)))) {
    flush_all();
    return;
  }
  for (unsigned privilege = 0; privilege < privileges; ++privilege) {
    TlbEntry& entry = table_[privilege][slot(gva)];
    if (((entry.read | entry.write | entry.fetch) & page_mask) == (gva & page_mask)) entry = {};
  }
}

}  // namespace anykvm::x86
