// The walk through the guest's page tables: one linear address, one kind of access, its physical page or the error
// code of its #PF.
#pragma once

#include "x86/cpu.h"

namespace anykvm::x86 {

struct PageWalk {
  Gpa page = 0;         ///< physical address of the 4 KiB page
  bool large = false;   ///< mapped by more than one 4 KiB page's entry
  bool huge = false;    ///< ... by a 1 GiB page
  bool global = false;  ///< in every address space
  u32 error = 0;        ///< when the walk fails: the page-fault error code
  // What the tables say of the page, all levels together.
  bool user = false, writable = false, executable = false, accessed = false, dirty = false;
};

/// Bits of a page-fault error code.
namespace pf {
inline constexpr u32 present = 1, write = 2, user = 4, reserved = 8, fetch = 16, protection_key = 32;
}

/// Walks for an access and sets accessed and dirty bits on success. Paging is on.
bool walk_page(Cpu& cpu, Gva gva, Access access, Privilege privilege, PageWalk& walk);
/// The page fault that an access to a canonical address would raise, if any. It sets no accessed and dirty bits.
Result check_page(Cpu& cpu, Gva gva, Access access, Privilege privilege);
/// Follows the tables without rights and without side effects.
bool probe_page(Cpu& cpu, Gva gva, PageWalk& walk);

/// PAE paging's four PDPTE registers from the table at cr3; false: a reserved bit is set, nothing changed.
bool load_pdptes(Cpu& cpu, u64 cr3);

}  // namespace anykvm::x86
