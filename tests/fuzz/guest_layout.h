// A small guest with one of everything: descriptors of every type, gates in IDTs of every form, page tables of every
// form with every kind of page, TSSs to switch to. Code that a fuzzer makes up finds something to use at every turn.
#pragma once

#include <span>

#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::fuzz {

/// Guest-physical addresses, which paging maps onto themselves.
namespace layout {
inline constexpr Gpa gdt = 0x1000, ldt = 0x1800, idt64 = 0x2000, idt32 = 0x3000, idt16 = 0x3800, pml5 = 0x4000,
                     pml4 = 0x5000, pdpt = 0x6000, pd = 0x7000, pt = 0x8000, legacy_pd = 0x9000, legacy_pt = 0xa000,
                     pae_pdpt = 0xb000, tss64 = 0xc000, tss32 = 0xd000, tss16 = 0xe000, handlers = 0x10000,
                     stack = 0x14000, code = 0x18000, data = 0x20000;
inline constexpr u64 ram_size = 0x40000;
inline constexpr Gpa rom = 0x50000, refused = 0x60000;  ///< a read-only slot; pages that the host protects
inline constexpr Gpa high = 1ull << 32;                 ///< the RAM once more
}  // namespace layout

/// Every exception and interrupt ends in an OUT to this port.
inline constexpr unsigned trap_port = 0x99;

enum class Mode : u8 {
  real,
  protected16,
  protected32,
  paging32,
  pae,
  v86,
  long64,
  long64_user,
  compatibility32_user,
  compatibility16,
  long64_la57,
  count,
};

/// Fills RAM as the mode wants it.
void write_tables(std::span<u8> ram, Mode mode);
/// The registers to go with it, on top of those of a new vCPU.
void set_mode(Mode mode, kvm_sregs& sregs, kvm_regs& regs);

}  // namespace anykvm::fuzz
