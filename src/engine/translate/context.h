// What translated code reaches through the GS base, and which host register holds which guest register.
#pragma once

#include <atomic>
#include <cstddef>

#include "engine/translate/assembler.h"
#include "x86/cpu.h"

namespace anykvm::engine::translate {

// --- registers
// --------------------------------------------------------------------------------------------------------- Guest
// RAX-RDI (but RSP) and R8-R12 live in the host registers of the same name; guest RSP in host R15. Guest R13-R15, which
// compilers use least, live in the context, so that host R13 and R14 are free for address checks.
inline constexpr Register index_scratch = 13, address_scratch = 14, guest_rsp = 15;
inline constexpr Register host_rsp = 4;
constexpr bool in_context(unsigned guest) { return guest >= 13; }
constexpr Register home(unsigned guest) { return guest == x86::rsp ? guest_rsp : Register(guest); }

// --- the TLB of translated code
// ------------------------------------------------------------------------------------------
/// One page. Tags are negated, so that adding one to an address inside the page leaves the offset in the page: one
/// compare with 4096 - size then checks the page and its end together. An entry that holds nothing has a tag of another
/// slot's page, which no address of this slot can match.
struct TlbEntry {
  u64 minus_read, minus_write;
  u64 host;    ///< address of the page
  u64 addend;  ///< host address - guest address
};
inline constexpr unsigned tlb_entries = 1024;
/// A tag for a slot that is empty: of a page that neither this slot nor a neighbour can be asked for.
constexpr u64 minus_other_page(unsigned slot) { return -(u64((slot + tlb_entries / 2) % tlb_entries) << 12); }

// --- where a guest address continues ---------------------------------------------------------------------------------
/// Targets of indirect and cross-page branches by guest RIP. minus_rip of an unused slot is a RIP of another slot.
inline constexpr unsigned jump_entries = 16384;
struct Jump {
  u64 minus_rip;
  u64 never_minus_rip;  ///< of no RIP with this slot. Bit 32 + n: the entry is in Translator::jumps_used_[n]
  u64 code;
  u64 page_base;

  static constexpr u64 listed(bool global) { return 1ull << (32 + global); }
};

/// Of one direct jump to another page, in the code cache: where it goes on.
struct Chain {
  u64 code;      ///< the target's, once it is linked
  u64 unlinked;  ///< its own way to find the target: always so while attention is not 0
};

constexpr unsigned jump_slot(u64 rip) { return unsigned(rip >> 1) & (jump_entries - 1); }

/// Of one block: groups of accesses that are checked together (windows.cpp).
inline constexpr unsigned window_count = 16;

/// Which of the guest's vector registers are in the host's while a block runs.
enum VectorLevel : u8 {
  no_vectors,
  first_vectors,  ///< 0-15, MXCSR
  all_vectors,    ///< 0-31, opmasks
};
inline constexpr unsigned vector_levels = 3;

/// Translated code differs by how wide its addresses are, by whose rights it has and by which vector registers it
/// finds.
struct Mode {
  static constexpr unsigned count = 2 * 3 * vector_levels;
  x86::Privilege privilege;
  u8 vectors;           ///< VectorLevel
  bool narrow = false;  ///< 32-bit code on flat segments, whose general registers have nothing in their upper halves
  unsigned number() const { return (narrow * 3 + unsigned(privilege)) * vector_levels + vectors; }
  static unsigned vectors_of(unsigned number) { return number % vector_levels; }
  static bool is_narrow(unsigned number) { return number / (3 * vector_levels) & 1; }
};

struct Context {
  u64 page_base;   ///< guest address of the page that the running block lies in
  u64 spilled[3];  ///< guest R13, R14, R15
  u64 temporary;
  u64 enter_at;
  u64 fs_base, gs_base;
  u64 fs_refused, gs_refused;  ///< of 32-bit code: what takes each address there out of what the TLB has, or 0
  x86::CpuState* state;
  const std::atomic<u32>* attention;  ///< 0 or 1: what is emitted takes it for an index
  const u32* window_wanted;
  u64 time_is_refused;          ///< RDTSC and RDTSCP are not what the emitted code takes them for
  u64 access_check_is_refused;  ///< STAC and CLAC are not what the emitted code takes them for
  u8* data_privilege;           ///< Cpu's
  u8* mode;                     ///< the translator's Mode, whose first byte is the privilege
  u64 cleared[3];               ///< masks for PEXT and PDEP that leave one flag out: IF, DF, AC
  u64 arithmetic_flags, interrupt_flag, direction_flag;
  u64 tlb_index_bits, page_number_bits, jump_index_bits, low_bits[2];  ///< masks for PEXT; low_bits: 0x1f, 0x3f
  u64 host_stack;
  u64 link_site;  ///< the jump that led out of the code and may be aimed at the next block; 0: none
  u64 chain;      ///< the Chain of a jump to another page that has not been linked; 0: none
  void* translator;
  Context* self;
  u64 target;  ///< a value kept while an address is checked
  // Of a branch that must be taken back, because its target is not canonical:
  u64 branch;    ///< its RIP
  u64 undo;      ///< by how much it has moved the stack pointer, negated
  u64 replaced;  ///< what an indirect call's return address has replaced
  u32 host_mxcsr;
  u32 faulted;        ///< left because the host raised an exception in the instruction that is next
  u32 wants_vectors;  ///< left because the next instruction needs this VectorLevel
  u64 wants_checks;   ///< left because accesses that were to be checked together (windows.cpp) must be checked singly
  u64 addends[window_count];  ///< host address - guest address, of the block's windows

  // --- the x87 unit (x87_state.cpp) ---------------------------------------------------------------------------------
  u32 x87_missing;  ///< the host's unit does not hold the guest's registers
  // What has been executed on it since it was loaded, for the pointers that the guest may ask for. The first two are
  // written together.
  u32 x87_last;             ///< X87Last of the last instruction that moves the pointers; 0: none
  u32 x87_settled;          ///< what came behind that may have changed whether an exception waits
  u32 x87_operand_segment;  ///< of the last memory operand: its SegmentName + 1; 0: none
  u64 x87_operand;          ///< and its offset
  u64 x87_page;             ///< guest address of the page that the last instruction lies in
  struct alignas(64) {
    u8 legacy[512];
    u64 xstate_bv, header[7];
  } x87_image;  ///< for XSAVE and XRSTOR

  alignas(64) TlbEntry tlb[3][tlb_entries];
  Jump jumps[Mode::count][jump_entries];
};

/// An x87 instruction as Context::x87_last keeps it.
struct X87Last {
  static constexpr u32 encode(unsigned offset, unsigned opcode, bool has_operand) {
    return offset | opcode << 12 | (has_operand ? 1u << 23 : 0) | 1u << 24;
  }
  static unsigned offset(u32 last) { return last & 0xfff; }        ///< in its page
  static unsigned opcode(u32 last) { return last >> 12 & 0x7ff; }  ///< as FOP has it
  static bool has_operand(u32 last) { return last >> 23 & 1; }
};

/// Of the TLB's first entry.
inline constexpr u32 tlb_tag(x86::Privilege privilege, bool write) {
  return u32(offsetof(Context, tlb) + unsigned(privilege) * sizeof(Context::tlb[0]) +
             (write ? offsetof(TlbEntry, minus_write) : offsetof(TlbEntry, minus_read)));
}

inline constexpr u32 spill_slot(unsigned guest) { return offsetof(Context, spilled) + (guest - 13) * 8; }

}  // namespace anykvm::engine::translate
