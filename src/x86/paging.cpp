// The page walk: 32-bit, PAE, 4- and 5-level paging.
// Reference: Intel SDM volume 3 chapter 4; AMD64 manual volume 2 chapter 5.
//
// Accessed and dirty bits are set with compare-and-exchange after the rights have been checked, so that a walk that
// faults leaves no trace, and a table that another vCPU changes meanwhile is walked again.
#include "x86/paging.h"

namespace anykvm::x86 {

namespace {

constexpr u64 entry_p = 1, entry_w = 2, entry_u = 4, entry_a = 32, entry_d = 64, entry_ps = 128, entry_g = 256,
              entry_nx = 1ull << 63;
constexpr u64 address_mask = 0x000ffffffffff000;

constexpr u64 bits(unsigned high, unsigned low) { return (2ull << high) - (1ull << low); }

/// The shape of one paging mode.
struct Format {
  unsigned levels;       ///< of tables in memory
  unsigned entry_bytes;  ///< 4 or 8
  unsigned index_bits;   ///< 10 or 9
  bool long_mode;
};

struct Visited {
  Gpa gpa;
  u64 value;
};

u64 load_entry(const u8* host, unsigned bytes) {
  return bytes == 8 ? __atomic_load_n(reinterpret_cast<const u64*>(host), __ATOMIC_RELAXED)
                    : __atomic_load_n(reinterpret_cast<const u32*>(host), __ATOMIC_RELAXED);
}

bool exchange_entry(u8* host, unsigned bytes, u64 expected, u64 desired) {
  if (bytes == 8)
    return __atomic_compare_exchange_n(reinterpret_cast<u64*>(host), &expected, desired, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
  u32 expected32 = u32(expected);
  return __atomic_compare_exchange_n(reinterpret_cast<u32*>(host), &expected32, u32(desired), false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}

/// Bits that must be 0 in a present entry.
u64 reserved_bits(const Cpu& cpu, const Format& format, unsigned level, bool leaf) {
  const u64 physical = cpu.cpuid.reserved_physical_bits();
  if (format.entry_bytes == 4)  // PSE-36: bits 20:13 of a 4 MiB entry are address bits 39:32
    return level == 2 && leaf
               ? (cpu.cpuid.is_set() && !cpu.cpuid.has(Feature::pse36) ? bits(21, 13)
                                                                       : bits(21, 21) | (physical >> 32 & 0xff) << 13)
               : 0;
  u64 reserved = format.long_mode ? physical & bits(51, 12) : physical & bits(62, 12);
  if (!(cpu.state.msr.efer & efer::nx)) reserved |= entry_nx;
  if (leaf && level == 2) reserved |= bits(20, 13);
  if (leaf && level == 3) reserved |= bits(29, 13);
  if (level >= 4 || (level == 3 && cpu.cpuid.is_set() && !cpu.cpuid.has(Feature::gbpages))) reserved |= entry_ps;
  if (level >= 4 && cpu.cpuid.vendor() == Vendor::amd) reserved |= bits(8, 8);
  return reserved;
}

/// Sets bits in an entry that had `value`. false: it has another value now. A table in a read-only slot keeps its bits.
bool update_entry(Cpu& cpu, const Visited& visited, unsigned bytes, u64 set) {
  const HostPage page = cpu.machine.page(visited.gpa & page_mask, true);
  if (!page.host || !page.writable) return true;
  if (cpu.rehearsal) cpu.rehearsal.marked(cpu.rehearsal.engine, page.host + (visited.gpa & ~page_mask));
  return exchange_entry(page.host + (visited.gpa & ~page_mask), bytes, visited.value, visited.value | set);
}

Format format_of(const CpuState& s) {
  if (s.long_mode()) return {s.cr4 & cr4::la57 ? 5u : 4u, 8, 9, true};
  if (s.cr4 & cr4::pae) return {2, 8, 9, false};
  return {2, 4, 10, false};
}

enum class Outcome { done, fault, again };

/// What is done about rights, and about accessed and dirty bits.
enum class Aim { probe, check, access };

/// One attempt. Aim::check looks at the rights, Aim::access also sets accessed and dirty bits.
Outcome attempt(Cpu& cpu, const Format& format, Gva gva, Access access, Privilege privilege, Aim aim, PageWalk& walk) {
  const CpuState& s = cpu.state;
  const bool user = privilege == Privilege::user, nx_enabled = format.entry_bytes == 8 && s.msr.efer & efer::nx;
  u32 error = (access == Access::write ? pf::write : 0) | (user ? pf::user : 0) |
              (access == Access::fetch && (nx_enabled || s.cr4 & cr4::smep) ? pf::fetch : 0);
  walk.error = error;

  Gpa table = format.long_mode          ? s.cr3 & address_mask
              : format.entry_bytes == 8 ? s.pdpte[gva >> 30 & 3] & address_mask
                                        : s.cr3 & 0xfffff000;
  if (!format.long_mode && format.entry_bytes == 8 && !(s.pdpte[gva >> 30 & 3] & entry_p)) return Outcome::fault;

  Visited visited[5];
  u64 all = ~0ull;  // of the bits that every level must grant
  u64 no_execute = 0;
  unsigned level = format.levels;
  unsigned shift;
  for (;; --level) {
    shift = 12 + (level - 1) * format.index_bits;
    const Gpa gpa = table + (gva >> shift & ((1u << format.index_bits) - 1)) * format.entry_bytes;
    const HostPage page = cpu.machine.page(gpa & page_mask, false);
    if (!page.host) return Outcome::fault;  // a table outside RAM: as if nothing were present
    const u64 entry = load_entry(page.host + (gpa & ~page_mask), format.entry_bytes);
    visited[level - 1] = {gpa, entry};
    if (!(entry & entry_p)) return Outcome::fault;
    const bool leaf = level == 1 || (entry & entry_ps && (format.entry_bytes == 8 ? level <= 3 : s.cr4 & cr4::pse));
    if (entry & reserved_bits(cpu, format, level, leaf)) {
      walk.error = error | pf::present | pf::reserved;
      return Outcome::fault;
    }
    all &= entry;
    no_execute |= entry & entry_nx;
    if (leaf) break;
    table = entry & address_mask;
  }

  const u64 leaf = visited[level - 1].value;
  const u64 offset = (1ull << shift) - 1;
  Gpa base = leaf & address_mask;
  if (format.entry_bytes == 4) base = (leaf & 0xfffff000) | (level == 2 ? (leaf >> 13 & 0xff) << 32 : 0);
  walk.page = ((base & ~offset) | (gva & offset)) & page_mask;
  walk.large = level > 1;
  walk.huge = level == 3;
  const bool user_page = all & entry_u, writable = all & entry_w;
  walk.user = user_page, walk.writable = writable;
  walk.executable = !(nx_enabled && no_execute);
  walk.accessed = all & entry_a, walk.dirty = leaf & entry_d;
  if (aim == Aim::probe) return Outcome::done;

  bool allowed = true;
  if (user) {
    allowed = user_page && (access != Access::write || writable);
  } else if (user_page && access == Access::fetch) {
    allowed = !(s.cr4 & cr4::smep);
  } else if (user_page && privilege == Privilege::supervisor) {
    allowed = false;  // SMAP
  }
  if (!user && access == Access::write && !writable && s.cr0 & cr0::wp) allowed = false;
  if (access == Access::fetch && nx_enabled && no_execute) allowed = false;
  if (format.long_mode && user_page && s.cr4 & cr4::pke && access != Access::fetch) {
    const unsigned rights = s.fpu.pkru >> (2 * (leaf >> 59 & 15)) & 3;  // access disable, write disable
    if (rights & 1 || (rights & 2 && access == Access::write && (user || s.cr0 & cr0::wp))) {
      error |= pf::protection_key;
      allowed = false;
    }
  }
  // Rights of a user page may depend on PKRU, which is an address space's.
  walk.global = leaf & entry_g && s.cr4 & cr4::pge && !(user_page && s.cr4 & cr4::pke);
  if (!allowed) {
    walk.error = error | pf::present;
    return Outcome::fault;
  }
  if (aim == Aim::check) return Outcome::done;

  for (unsigned i = format.levels; i >= level; --i) {
    const u64 wanted = entry_a | (i == level && access == Access::write ? entry_d : 0);
    if ((visited[i - 1].value & wanted) != wanted && !update_entry(cpu, visited[i - 1], format.entry_bytes, wanted))
      return Outcome::again;
  }
  return Outcome::done;
}

}  // namespace

bool walk_page(Cpu& cpu, Gva gva, Access access, Privilege privilege, PageWalk& walk) {
  const Format format = format_of(cpu.state);
  for (;;) {
    const Outcome outcome = attempt(cpu, format, gva, access, privilege, Aim::access, walk);
    if (outcome != Outcome::again) return outcome == Outcome::done;
  }
}

bool probe_page(Cpu& cpu, Gva gva, PageWalk& walk) {
  return attempt(cpu, format_of(cpu.state), gva, Access::read, Privilege::supervisor_ac, Aim::probe, walk) ==
         Outcome::done;
}

Result check_page(Cpu& cpu, Gva gva, Access access, Privilege privilege) {
  if (privilege == Privilege::user_aligned) privilege = Privilege::user;
  if (!cpu.state.long_mode()) gva = u32(gva);
  if (!cpu.state.paging() || cpu.mmu.lookup(gva, 1, access, privilege)) return Result::ok;
  PageWalk walk;
  return attempt(cpu, format_of(cpu.state), gva, access, privilege, Aim::check, walk) == Outcome::done
             ? Result::ok
             : cpu.raise_page_fault(gva, walk.error);
}

bool load_pdptes(Cpu& cpu, u64 cr3) {
  const Gpa table = cr3 & 0xffffffe0;
  const HostPage page = cpu.machine.page(table & page_mask, false);
  if (!page.host) return false;
  u64 entries[4];
  for (unsigned i = 0; i < 4; ++i) {
    entries[i] = load_entry(page.host + (table & ~page_mask) + 8 * i, 8);
    const u64 reserved = bits(2, 1) | bits(8, 5) | cpu.cpuid.reserved_physical_bits();
    if (entries[i] & entry_p && entries[i] & reserved) return false;
  }
  for (unsigned i = 0; i < 4; ++i) cpu.state.pdpte[i] = entries[i];
  return true;
}

}  // namespace anykvm::x86
