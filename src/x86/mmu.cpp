// The software TLB: three tables (one per privilege) of 4096 entries, direct-mapped by page number. A flush starts a
// new generation, which no old tag matches; the tables are only cleared when the generation number wraps.
#include "x86/mmu.h"

#include <sys/mman.h>

#include <new>

#include "x86/cpu.h"
#include "x86/debug.h"
#include "x86/paging.h"

namespace anykvm::x86 {

namespace {

constexpr unsigned privileges = 3;
constexpr std::size_t table_bytes = privileges * Mmu::entries * sizeof(TlbEntry);
constexpr u64 last_generation = page_size - 1;

u64& tag_of(TlbEntry& entry, Access access) {
  return access == Access::read ? entry.read : access == Access::write ? entry.write : entry.fetch;
}

}  // namespace

Mmu::Mmu() {
  void* memory = mmap(nullptr, table_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  table_ = static_cast<Table*>(memory);
}

Mmu::~Mmu() { munmap(table_, table_bytes); }

Result Mmu::translate(Cpu& cpu, Gva gva, Access access, Privilege privilege, Translation& out, bool is_stack) {
  if (u8* host = lookup(gva, 1, access, privilege)) {
    // The physical address is of no use to whoever gets a host pointer; only MMIO needs it, and is never in the TLB.
    out = {0, host};
    return Result::ok;
  }
  const CpuState& s = cpu.state;
  if (s.long_mode()) {
    if (!canonical(gva)) return cpu.raise(is_stack ? exception::ss : exception::gp, 0);
  } else {
    gva = u32(gva);
  }
  PageWalk walk;
  if (!s.paging()) {
    walk.page = gva & page_mask;
  } else if (!walk_page(cpu, gva, access, privilege, walk)) {
    return cpu.raise_page_fault(gva, walk.error);
  }

  out = {walk.page | (gva & ~page_mask), nullptr};
  const HostPage page = cpu.machine.page(walk.page, access == Access::write);
  if (!page.host || (access == Access::write && !page.writable)) return Result::ok;
  out.host = page.host + (gva & ~page_mask);
  if (cpu.debug_watch & watch_data && access != Access::fetch && page_is_watched(cpu, gva)) [[unlikely]]
    return Result::ok;

  const u64 linear_page = gva & page_mask, tag = linear_page | generation_;
  const u64 addend = reinterpret_cast<u64>(page.host) - linear_page;
  TlbEntry& entry = table_[unsigned(privilege)][slot(gva)];
  if ((entry.read != tag && entry.write != tag && entry.fetch != tag) || entry.addend != addend) {
    entry = {.addend = addend};
  }
  tag_of(entry, access) = tag;
  if (access == Access::write) entry.read = tag;  // what may be written may be read
  if (walk.large) {
    Range& range = large_[gva >> 63];
    if (linear_page < range.low) range.low = linear_page;
    if (linear_page > range.high) range.high = linear_page;
  }
  return Result::ok;
}

bool Mmu::probe(Cpu& cpu, Gva gva, Gpa& out) {
  if (cpu.state.long_mode()) {
    if (!canonical(gva)) return false;
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

void Mmu::flush_all() {
  large_[0] = large_[1] = {};
  if (generation_++ != last_generation) return;
  generation_ = 1;
  madvise(table_, table_bytes, MADV_DONTNEED);
}

// Global pages are entered like the others: dropping too much is allowed, and costs less than keeping two generations.
void Mmu::flush_non_global() { flush_all(); }

void Mmu::flush_page(Cpu& cpu, Gva gva) {
  if (!cpu.state.long_mode()) gva = u32(gva);
  // A large page may have been entered as many small ones. Their extent is not kept: 1 GiB covers any of them.
  constexpr u64 largest = 1ull << 30;
  const u64 start = gva & ~(largest - 1), end = start + (largest - 1);
  if (const Range& range = large_[gva >> 63]; range.low <= end && range.high >= start) {
    flush_all();
    return;
  }
  for (unsigned privilege = 0; privilege < privileges; ++privilege) {
    TlbEntry& entry = table_[privilege][slot(gva)];
    const u64 tag = (gva & page_mask) | generation_;
    if (entry.read == tag || entry.write == tag || entry.fetch == tag) entry = {};
  }
}

}  // namespace anykvm::x86
