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
/// TSS, event delivery) always are when CR4.SMAP is set. `user_aligned` is CPL 3 with alignment checks (CR0.AM and
/// EFLAGS.AC): the TLB never has it, so that every access meets the check on the slow path.
enum class Privilege : u8 { user, supervisor, supervisor_ac, user_aligned };

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

  /// The same; an entry of a global page that another address space has made becomes the current one's first.
  u8* find(Gva gva, unsigned size, Access access, Privilege privilege) {
    if (u8* host = lookup(gva, size, access, privilege)) return host;
    return revive_global(unsigned(privilege), slot(gva), gva & page_mask) ? lookup(gva, size, access, privilege)
                                                                          : nullptr;
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

  /// Whose entries are looked up from now on: the address space `pcid` (0 without CR4.PCIDE) under the protection keys
  /// `pkru` (0 without CR4.PKE). `flush` drops what is kept of that address space; global pages stay.
  void enter_context(u16 pcid, u32 pkru, bool flush);

  void flush_all();         ///< everything, global pages too
  void flush_non_global();  ///< every address space, not the global pages
  void flush_context(u16 pcid);
  void flush_page(Cpu& cpu, Gva gva);  ///< in every address space, global or not

  /// Stores to the pages of the host's whose address has these bits come to translate() again, whatever guest address
  /// they have. mask: which bits of the address count.
  void forbid_stores(u64 host_page, u64 mask);

  /// Changes with every flush and switch: what was derived from the TLB before is to be derived again.
  u64 flush_count() const { return flush_count_; }

  /// What has been flushed since flush_count() was `since`: the number of pages in `pages`, or -1 when it was more than
  /// a few pages.
  static constexpr unsigned most_pages_told = 8;
  int pages_flushed_since(u64 since, Gva (&pages)[most_pages_told]) const;

  /// Whether global pages were among what has been flushed of more than a page.
  bool global_pages_flushed_since(u64 since) const { return last_global_flush_ > since; }
  /// Whether the TLB has the page of an address as a global one for that privilege.
  bool is_global(Gva gva, Privilege privilege) const {
    const TlbEntry& entry = table_[unsigned(privilege)][slot(gva)];
    return global_[unsigned(privilege)][slot(gva)] == global_generation_ &&
           ((entry.read | entry.write | entry.fetch) & page_mask) == (gva & page_mask);
  }

  u64 walks = 0;  ///< page walks since the CPU was made

 private:
  void note_flush() { last_wide_flush_ = ++flush_count_; }

  u64 flush_count_ = 0;
  u64 last_global_flush_ = 0;          ///< flush_count_ behind the last flush_all()
  u64 last_wide_flush_ = 0;            ///< flush_count_ at the last one that was of more than a page
  Gva flushed_[most_pages_told] = {};  ///< the pages of the others, by number
  using Table = TlbEntry[entries];
  using GlobalTable = u16[entries];
  /// An address space whose entries are kept while another one is current.
  struct Context {
    u64 key = 0;         ///< PCID, PKRU
    u64 generation = 0;  ///< 0: free
  };
  static constexpr unsigned context_count = 16;

  u64 new_generation();
  void clear_tables();
  /// All tags of an entry have one generation.
  bool revive_global(unsigned privilege, unsigned slot, Gva page) {
    if (global_[privilege][slot] != global_generation_) return false;
    TlbEntry& entry = table_[privilege][slot];
    if (((entry.read | entry.write | entry.fetch) & page_mask) != page) return false;
    for (u64* tag : {&entry.read, &entry.write, &entry.fetch})
      if (*tag) *tag = page | generation_;
    return true;
  }

  Table* table_;         ///< [4], mapped lazily so that an idle CPU costs no memory
  GlobalTable* global_;  ///< [4]: the global generation under which an entry was made of a global page; 0: it was not
  u64 generation_ = 1;   ///< of the current address space: 1..4095
  u64 newest_generation_ = 1;  ///< handed out last
  u16 global_generation_ = 1;
  u64 current_key_ = 0;
  Context contexts_[context_count];
  unsigned next_context_ = 0;
  /// Which 2 MiB and which 1 GiB regions large pages may have been entered from since flush_all(): one hashed bit each.
  static constexpr unsigned large_bits = 4096;
  u64 large_2m_[large_bits / 64] = {}, large_1g_[large_bits / 64] = {};
};

}  // namespace anykvm::x86
