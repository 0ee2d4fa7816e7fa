// The software TLB of one CPU and the page walk that fills it.
// Reference: AMD64 manual volume 2 chapter 5, Intel SDM volume 3 chapter 4.
#pragma once

#include <memory>

#include "x86/result.h"
#include "x86/types.h"

namespace anykvm::x86 {

class Cpu;

enum class Access : u8 { read, write, fetch };

/// Whose rights an access has. `user` is CPL 3. `supervisor_ac` is CPL < 3 where SMAP does not hold
/// (EFLAGS.AC set, or CR4.SMAP clear); `supervisor` is an access under SMAP, which implicit ones (descriptor tables,
/// TSS, event delivery) always are when CR4.SMAP is set.
enum class Privilege : u8 { user, supervisor, supervisor_ac };

/// One page as one kind of access sees it. A tag is the page's address with the TLB's generation in its low 12 bits.
struct TlbEntry {
  u64 read = 0, write = 0, fetch = 0;
  u64 addend = 0;  ///< host address - guest virtual address (mod 2^64)
};

class Mmu {
 public:
  static constexpr unsigned entries = 4096;

  Mmu();
  ~Mmu();
  Mmu(const Mmu&) = delete;
  Mmu& operator=(const Mmu&) = delete;

  /// Folds the upper bits in: code, heap and stack often lie a multiple of 16 MiB apart.
  static unsigned slot(Gva gva) { return unsigned(gva >> 12 ^ gva >> 24) % entries; }

  /// Host address of [gva, gva + size) if the TLB has it, the access is allowed and it stays inside the page.
  u8* lookup(Gva gva, unsigned size, Access access, Privilege privilege) const {
    const TlbEntry& e = table_[unsigned(privilege)][slot(gva)];
    const u64 tag = access == Access::read ? e.read : access == Access::write ? e.write : e.fetch;
    if (tag != ((gva & page_mask) | generation_) || (gva & ~page_mask) + size > page_size) return nullptr;
    return reinterpret_cast<u8*>(gva + e.addend);
  }

  struct Translation {
    Gpa gpa = 0;         ///< of the byte; only meaningful when host is nullptr
    u8* host = nullptr;  ///< of the byte; nullptr: MMIO
  };
  /// Walks (or finds) the translation of one byte's page and fills the TLB when it is RAM. Sets A and D bits.
  /// fault: Cpu::fault holds the #PF (or, for a non-canonical address, #GP/#SS by `is_stack`).
  Result translate(Cpu& cpu, Gva gva, Access access, Privilege privilege, Translation& out, bool is_stack = false);

  /// KVM_TRANSLATE and debuggers: no side effects, no faults.
  bool probe(Cpu& cpu, Gva gva, Gpa& out);

  void flush_all();         ///< everything, global pages too
  void flush_non_global();  ///< MOV CR3 without PCID's no-flush bit
  void flush_page(Cpu& cpu, Gva gva);

 private:
  using Table = TlbEntry[entries];
  Table* table_;        ///< [3], mapped lazily so that an idle CPU costs no memory
  u64 generation_ = 1;  ///< 1..4095
  /// Where large pages were entered since the last flush, in the lower and in the upper half of the address space.
  struct Range {
    u64 low = ~0ull, high = 0;
  } large_[2];
};

}  // namespace anykvm::x86
