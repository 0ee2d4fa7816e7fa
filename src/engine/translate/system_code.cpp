// What kernels do all the time beyond computing, emitted in place: interrupt and direction flag, SWAPGS, PUSHF, the
// time stamp, selectors, bit strings. Each changes the state as the reference engine's handler of the instruction does,
// and leaves to it what is not the common case. Host flags are the guest's meanwhile: nothing here changes them.
#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

namespace {

using x86::rcx, x86::rax, x86::rdx;
constexpr s32 other_flags_at = offsetof(x86::CpuState, other_flags);
constexpr s32 gs_base_at =
    offsetof(x86::CpuState, segment) + x86::gs * sizeof(x86::Segment) + offsetof(x86::Segment, base);
constexpr s32 kernel_gs_base_at = offsetof(x86::CpuState, msr) + offsetof(x86::MsrState, kernel_gs_base);
constexpr s32 tsc_aux_at = offsetof(x86::CpuState, msr) + offsetof(x86::MsrState, tsc_aux);
constexpr u32 temporary = offsetof(Context, temporary), at_state = offsetof(Context, state),
              target = offsetof(Context, target);

}  // namespace

void Translation::emit_push_memory(const Guest& g, unsigned n) {
  load_scratch(operand_place(g, address_of(g), unsigned(word()), false, n, g.flags_live));
  a_.store(target, address_scratch);
  push_target(g, n, g.flags_live);
}

void Translation::emit_push_flags(const Guest& g, unsigned n) {
  a_.push_flags();
  a_.pop(address_scratch);
  a_.extract_bits(address_scratch, address_scratch, offsetof(Context, arithmetic_flags));
  a_.deposit_bits(address_scratch, address_scratch, offsetof(Context, arithmetic_flags));
  a_.load(index_scratch, at_state);
  a_.load_from(index_scratch, index_scratch, other_flags_at);
  a_.lea(address_scratch, address_scratch, index_scratch, 0, 0);
  a_.store(target, address_scratch);
  push_target(g, n, true);
}

void Translation::emit_move_from_segment(const Guest& g) {
  const unsigned to = g.registers[0].number;
  const unsigned segment = g.bytes[g.modrm_at] >> 3 & 7;
  a_.load(index_scratch, at_state);
  const bool narrow = g.width == 2;  // the rest of the register stays
  const Register reg = in_context(to) || narrow ? index_scratch : home(to);
  a_.load_word(
      reg, index_scratch,
      s32(offsetof(x86::CpuState, segment) + segment * sizeof(x86::Segment) + offsetof(x86::Segment, selector)));
  if (in_context(to)) {
    if (narrow) a_.byte(0x66);
    a_.context_op(0x89, reg, spill_slot(to), -1, 0, !narrow);
  } else if (narrow) {
    a_.byte(0x66);
    a_.move32(home(to), reg);
  }
}

/// The register numbers a bit from the operand's first, before it or far behind: the address is that of the word that
/// holds the bit.
void Translation::emit_bit_string(const Guest& g, unsigned n) {
  const unsigned bytes = g.width, shift = bytes == 8 ? 6 : 5;
  const unsigned guest = g.registers[0].number;
  const auto load_number = [&](Register to) {
    if (in_context(guest))
      a_.load(to, spill_slot(guest));
    else if (guest != rcx)
      a_.move(to, home(guest));
    else
      a_.load(to, temporary);
  };
  a_.store(temporary, rcx);
  compute(address_of(g));
  load_number(index_scratch);
  if (bytes == 4) a_.sign_extend32(index_scratch, index_scratch);
  a_.move_immediate32(rcx, shift);
  a_.shift_right_signed(index_scratch, index_scratch, rcx);
  a_.load(rcx, temporary);
  a_.lea(address_scratch, address_scratch, index_scratch, bytes == 8 ? 3 : 2, 0, wide());
  a_.store(target, address_scratch);
  const bool writes = g.mnemonic != ZYDIS_MNEMONIC_BT;
  check({.computed = true}, bytes, writes, n, g.flags_live);
  if (guest == rcx)
    a_.move(index_scratch, rcx);
  else
    load_number(index_scratch);
  a_.extract_bits(index_scratch, index_scratch, offsetof(Context, low_bits) + (bytes == 8 ? 8 : 0));
  if (g.is_locked) a_.byte(0xf0);
  // The opcode's byte as it was: BT A3, BTS AB, BTR B3, BTC BB.
  a_.bytes(0x45 | (bytes == 8 ? 8 : 0), 0x0f, g.opcode, (index_scratch & 7) << 3 | (address_scratch & 7));
}

/// Upwards; the other direction is a step.
void Translation::emit_string(const Guest& g, unsigned n) {
  a_.store(temporary, rcx);
  a_.load(index_scratch, at_state);
  a_.load_from(index_scratch, index_scratch, other_flags_at);
  a_.extract_bits(rcx, index_scratch, offsetof(Context, direction_flag));
  u8* const upwards = a_.jump_if_rcx_zero_later();
  step_restoring_rcx(n);
  a_.aim_short(upwards);
  a_.load(rcx, temporary);
  const unsigned bytes = g.width, operation = g.opcode & ~1u;
  const auto advance = [&](Register reg) { a_.lea(reg, reg, -1, 0, s32(bytes), wide()); };
  // The opcode's form of this size, between the register and what the address scratch register points at.
  const auto access = [&](u8 opcode, Register reg) {
    if (bytes == 2) a_.byte(0x66);
    a_.bytes(0x41 | (bytes == 8 ? 8 : 0) | (reg >> 3) << 2, opcode | (bytes > 1 ? 1 : 0),
             (reg & 7) << 3 | (address_scratch & 7));
  };
  constexpr u8 store = 0x88, load = 0x8a, compare = 0x3a;
  // One operand is in RAX, or both are in memory.
  switch (operation) {
    case 0xaa:  // STOS
      check({.base = x86::rdi}, bytes, true, n, g.flags_live);
      access(store, rax);
      break;
    case 0xac:  // LODS
      check({.base = x86::rsi}, bytes, false, n, g.flags_live);
      access(load, rax);
      break;
    case 0xae:  // SCAS
      check({.base = x86::rdi}, bytes, false, n, g.flags_live);
      access(compare, rax);
      break;
    default: {  // MOVS A4, CMPS A6
      const bool moves = operation == 0xa4;
      check({.base = x86::rsi}, bytes, false, n, g.flags_live);
      access(load, index_scratch);
      a_.store(target, index_scratch);
      check({.base = x86::rdi}, bytes, moves, n, g.flags_live);
      a_.load(index_scratch, target);
      access(moves ? store : compare, index_scratch);
      break;
    }
  }
  if (operation != 0xaa && operation != 0xae) advance(x86::rsi);
  if (operation != 0xac) advance(x86::rdi);
}

void Translation::emit_clear_flag(const Guest& g) {
  const u32 others = offsetof(Context, cleared) + (g.mnemonic == ZYDIS_MNEMONIC_CLD ? 8 : 0);
  a_.load(index_scratch, at_state);
  a_.load_from(address_scratch, index_scratch, other_flags_at);
  a_.extract_bits(address_scratch, address_scratch, others);
  a_.deposit_bits(address_scratch, address_scratch, others);
  a_.store_to(index_scratch, other_flags_at, address_scratch);
}

/// Where nothing waits for the interrupt window, nothing can come between STI and the instruction behind it: what comes
/// later is seen at the next branch.
void Translation::emit_set_interrupt(unsigned n) {
  a_.load(index_scratch, at_state);
  a_.load_from(address_scratch, index_scratch, other_flags_at);
  a_.store(temporary, rcx);
  a_.extract_bits(rcx, address_scratch, offsetof(Context, interrupt_flag));
  u8* const clear = a_.jump_if_rcx_zero_later();
  u8* const set = a_.jump_short_later();
  a_.aim_short(clear);
  a_.load(rcx, offsetof(Context, window_wanted));
  a_.bytes(0x8b, 0x09);  // mov ecx, [rcx]
  u8* const nothing_waits = a_.jump_if_rcx_zero_later();
  step_restoring_rcx(n);
  a_.aim_short(nothing_waits);
  a_.lea(address_scratch, address_scratch, -1, 0, s32(x86::flag::if_));
  a_.store_to(index_scratch, other_flags_at, address_scratch);
  a_.aim_short(set);
  a_.load(rcx, temporary);
}

void Translation::emit_swap_gs() {
  a_.store(temporary, rcx);
  a_.load(index_scratch, at_state);
  a_.load_from(address_scratch, index_scratch, gs_base_at);
  a_.load_from(rcx, index_scratch, kernel_gs_base_at);
  a_.store_to(index_scratch, kernel_gs_base_at, address_scratch);
  a_.store_to(index_scratch, gs_base_at, rcx);
  a_.store(offsetof(Context, gs_base), rcx);
  a_.load(rcx, temporary);
}

/// The code behind it has other rights: the block ends, and goes on in one for those.
void Translation::emit_set_access_check(const Guest& g, unsigned n) {
  const bool set = g.mnemonic == ZYDIS_MNEMONIC_STAC;
  if (request_.mode.vectors != no_vectors || g.next >= page_size) {
    step(g, true);
    return;
  }
  a_.store(temporary, rcx);
  a_.load(rcx, offsetof(Context, access_check_is_refused));
  u8* const allowed = a_.jump_if_rcx_zero_later();
  step_restoring_rcx(n);
  a_.aim_short(allowed);
  a_.load(rcx, temporary);
  a_.load(index_scratch, at_state);
  a_.load_from(address_scratch, index_scratch, other_flags_at);
  a_.extract_bits(address_scratch, address_scratch, offsetof(Context, cleared) + 16);
  a_.deposit_bits(address_scratch, address_scratch, offsetof(Context, cleared) + 16);
  if (set) a_.lea(address_scratch, address_scratch, -1, 0, s32(x86::flag::ac));
  a_.store_to(index_scratch, other_flags_at, address_scratch);
  const x86::Privilege privilege = set ? x86::Privilege::supervisor_ac : x86::Privilege::supervisor;
  for (const u32 at : {offsetof(Context, data_privilege), offsetof(Context, mode)}) {
    a_.load(index_scratch, at);
    a_.bytes(0x41, 0xc6, 0x45, 0, unsigned(privilege));  // mov byte [r13], privilege
  }
  aim_or_link(a_.jump_later(), g.next, n, {privilege, request_.mode.vectors, request_.mode.narrow});
}

void Translation::emit_read_time(const Guest& g, unsigned n) {
  const bool with_id = g.mnemonic == ZYDIS_MNEMONIC_RDTSCP;
  a_.store(temporary, rcx);
  a_.load(rcx, offsetof(Context, time_is_refused));
  u8* const allowed = a_.jump_if_rcx_zero_later();
  step_restoring_rcx(n);
  a_.aim_short(allowed);
  if (with_id) a_.bytes(0x0f, 0xae, 0xe8);  // lfence: behind all loads before it
  a_.bytes(0x0f, 0x31);                     // rdtsc
  a_.move_immediate32(rcx, 32);
  a_.shift_left(address_scratch, rdx, rcx);
  a_.lea(address_scratch, address_scratch, rax, 0, 0);
  a_.load(index_scratch, at_state);
  a_.load_from(rax, index_scratch, offsetof(x86::CpuState, tsc_offset));
  a_.lea(address_scratch, address_scratch, rax, 0, 0);
  a_.move32(rax, address_scratch);
  a_.shift_right_unsigned(rdx, address_scratch, rcx);
  if (with_id)
    a_.load_from(rcx, index_scratch, tsc_aux_at, false);
  else
    a_.load(rcx, temporary);
}

}  // namespace anykvm::engine::translate
