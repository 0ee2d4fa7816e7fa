// Where memory operands lie: the guest's address, the look into the TLB, the place among the host's addresses.
#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

/// Of its memory operand.
Translation::Address Translation::address_of(const Guest& g) {
  const MemoryOperand& operand = g.memory;
  return {.base = operand.base,
          .index = operand.index,
          .shift = operand.shift,
          .displacement = operand.displacement + (operand.is_rip_relative ? g.next : 0),
          .rip_relative = operand.is_rip_relative,
          .segment = operand.segment >= x86::fs ? operand.segment : -1};
}

/// The guest's linear address to the address scratch register. Flags and everything but the scratch registers stay.
void Translation::compute(const Address& address) {
  held_ = -1;
  int base = address.base, index = address.index;
  if (address.computed) {
    a_.load(address_scratch, offsetof(Context, target));
    return;
  }
  if (address.rip_relative) {
    a_.load(address_scratch, offsetof(Context, page_base));
    base = address_scratch;
  } else if (base >= 0 && in_context(unsigned(base))) {
    a_.load(address_scratch, spill_slot(unsigned(base)));
    base = address_scratch;
  } else if (base >= 0) {
    base = home(unsigned(base));
  }
  if (index >= 0 && in_context(unsigned(index))) {
    a_.load(index_scratch, spill_slot(unsigned(index)));
    index = index_scratch;
  } else if (index >= 0) {
    index = home(unsigned(index));
  }
  if (base >= 0 && index < 0 && address.displacement == 0) {
    if (base != address_scratch) a_.move(address_scratch, Register(base));
  } else {
    a_.lea(address_scratch, base, index, address.shift, address.displacement, wide());
  }
  if (address.segment >= 0) {
    const bool fs = address.segment == x86::fs;
    a_.load(index_scratch, fs ? offsetof(Context, fs_base) : offsetof(Context, gs_base));
    a_.lea(address_scratch, address_scratch, index_scratch, 0, 0, wide());
    if (wide()) return;
    a_.load(index_scratch, fs ? offsetof(Context, fs_refused) : offsetof(Context, gs_refused));
    a_.lea(address_scratch, address_scratch, index_scratch, 0, 0);
  }
}

/// Leaves in the index scratch register where the TLB's entry is: its offset in the table if flags live not, else an
/// eighth of that. In the address scratch register, the offset in the page if flags live not, else the address.
void Translation::check_tag(const Address& address, unsigned size, bool write, unsigned n, bool flags_live,
                            Cold::Kind miss) {
  constexpr Register rcx = x86::rcx;
  const u32 tag = tlb_tag(request_.mode.privilege, write);
  Cold cold{.kind = miss,
            .pops_rcx = flags_live,
            .size = u8(size),
            .writes = write,
            .flags_live = flags_live,
            .retry = a_.here(),
            .guest = n};
  compute(address);
  static_assert(sizeof(TlbEntry) == 32);
  if (!flags_live) {
    a_.rotate_right(index_scratch, address_scratch, 12 - 5);
    a_.and_immediate32(index_scratch, (tlb_entries - 1) << 5);
    a_.add(address_scratch, tag, index_scratch);
    a_.compare_immediate(address_scratch, s32(page_size - size));
    cold.site = a_.jump_if_later(7);  // ja
  } else {
    a_.extract_bits(index_scratch, address_scratch, offsetof(Context, tlb_index_bits));
    a_.rotate_right(index_scratch, index_scratch, 64 - 2);
    a_.push(rcx);
    a_.load(rcx, tag, index_scratch, 3);
    a_.lea(rcx, rcx, address_scratch, 0, s32(size - 1));
    a_.extract_bits(rcx, rcx, offsetof(Context, page_number_bits));
    u8* hit = a_.jump_if_rcx_zero_later();
    cold.site = a_.jump_later();
    a_.aim_short(hit);
    a_.pop(rcx);
  }
  add_cold(cold);
}

void Translation::check(const Address& address, unsigned size, bool write, unsigned n, bool flags_live) {
  check_tag(address, size, write, n, flags_live);
  if (!flags_live) {
    a_.add(address_scratch, tlb(offsetof(TlbEntry, host)), index_scratch);
  } else {
    a_.load(index_scratch, tlb(offsetof(TlbEntry, addend)), index_scratch, 3);
    a_.lea(address_scratch, address_scratch, index_scratch, 0, 0);
  }
}

/// The place of the instruction's memory operand. Where one register and a displacement make the address, that register
/// stays in it: the processor knows then where a load finds what was stored last. (In 32-bit code the address may be
/// another than their sum.)
Place Translation::operand_place(const Guest& g, const Address& address, unsigned size, bool write, unsigned n,
                                 bool flags_live) {
  if (g.operand_window >= 0) return in_window(g.operand_window, address.displacement);
  const bool plain = address.base >= 0 && !in_context(unsigned(address.base)) && address.index < 0 &&
                     address.segment < 0 && !address.rip_relative && wide();
  if (!plain) {
    check(address, size, write, n, flags_live);
    return {.base = address_scratch};
  }
  check_tag(address, size, write, n, flags_live);
  a_.load(index_scratch, tlb(offsetof(TlbEntry, addend)), index_scratch, flags_live ? 3 : 0);
  return {.base = home(unsigned(address.base)), .index = index_scratch, .displacement = address.displacement};
}

Place Translation::on_stack(const Guest& g, unsigned n, s32 displacement, bool write, bool flags_live) {
  if (g.stack_window >= 0) return in_window(g.stack_window, displacement);
  check({.base = x86::rsp, .displacement = displacement}, unsigned(word()), write, n, flags_live);
  return {.base = address_scratch};
}

void Translation::load_scratch(const Place& place) {
  a_.load_from(address_scratch, place, wide());
  held_ = -1;
}

/// Goes on behind when there is nothing to refill the TLB with.
void Translation::refill(const Cold& cold) {
  a_.call(request_.stubs->refill[unsigned(request_.mode.privilege)][cold.writes][cold.flags_live]);
  a_.dword(u32(s32(cold.retry - a_.here())));
  a_.byte(cold.size);
}

}  // namespace anykvm::engine::translate
