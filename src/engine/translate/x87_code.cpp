// The x87 unit and MMX in translated code: their instructions run on the host's unit, which holds the guest's registers
// from the first such instruction on, across blocks, until somebody wants to see them (x87_state.cpp).
#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

/// The first instruction of a block that needs the unit makes sure of it. Where the guest may not use it (CR0.TS,
/// CR0.EM), the reference engine raises what there is to raise.
void Translation::want_x87(const Guest& g, unsigned n) {
  if (x87_loaded_) return;
  held_ = -1;  // a step takes the register
  Cold cold{.kind = Cold::Kind::load_x87, .guest = n};
  constexpr u32 missing = offsetof(Context, x87_missing);
  if (!g.flags_live) {
    a_.compare_context(missing, 0);
    cold.site = a_.jump_if_later(5);  // jne
  } else {
    a_.store(offsetof(Context, temporary), x86::rcx);
    a_.context_op(0x8b, x86::rcx, missing, -1, 0, false);
    u8* const loaded = a_.jump_if_rcx_zero_later();
    cold.site = a_.jump_later();
    cold.restores_rcx = true;
    a_.aim_short(loaded);
    a_.load(x86::rcx, offsetof(Context, temporary));
  }
  cold.retry = a_.here();
  add_cold(cold);
  x87_loaded_ = true;
}

/// The operand's offset in its segment to Context::x87_operand.
void Translation::store_offset(const Guest& g) {
  Address address = address_of(g);
  address.segment = -1;
  Register from = index_scratch;
  if (address.base >= 0 && !in_context(unsigned(address.base)) &&
      (address.index < 0 || !in_context(unsigned(address.index)))) {
    a_.lea(index_scratch, home(unsigned(address.base)), address.index < 0 ? -1 : home(unsigned(address.index)),
           address.shift, address.displacement, wide());
  } else if (address.rip_relative) {
    to_page_offset(index_scratch, address.displacement);
  } else {
    compute(address);
    from = address_scratch;
  }
  a_.store(offsetof(Context, x87_operand), from);
}

/// What the guest may ask for with FNSTENV and its likes, of the instruction that has just been executed.
void Translation::note_x87(const Guest& g) {
  if (g.mnemonic == ZYDIS_MNEMONIC_FLDCW) a_.store_immediate(offsetof(Context, x87_settled), 1, false);
  if (!g.moves_x87_pointers) return;
  if (g.has_memory) {
    store_offset(g);
    a_.store_immediate(offsetof(Context, x87_operand_segment), g.memory.segment + 1u, false);
  }
  if (!x87_noted_) {
    a_.load(index_scratch, offsetof(Context, page_base));
    a_.store(offsetof(Context, x87_page), index_scratch);
    x87_noted_ = true;
  }
  const unsigned opcode = (g.opcode & 7u) << 8 | g.bytes[g.modrm_at];
  static_assert(offsetof(Context, x87_settled) == offsetof(Context, x87_last) + 4);
  a_.store_immediate(offsetof(Context, x87_last), X87Last::encode(g.offset, opcode, g.has_memory), true);
}

void Translation::restore_x87(const Guest& g, unsigned n) {
  a_.call(request_.stubs->load_x87);
  a_.jump(after_[n]);
  to_page_offset(address_scratch, g.next);
  a_.jump(leave());
}

}  // namespace anykvm::engine::translate
