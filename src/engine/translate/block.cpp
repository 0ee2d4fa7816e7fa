#include "engine/translate/block.h"

#include <cstring>
#include <utility>

#include "engine/translate/rewrite.h"
#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

namespace {

CodeKind code_of(const BlockRequest& request) {
  return {.supervisor = request.mode.privilege != x86::Privilege::user, .narrow = request.mode.narrow};
}

bool decode_at(const BlockRequest& request, unsigned offset, GuestInstruction& out) {
  return request.decoder->decode(request.page + offset, unsigned(page_size) - offset, code_of(request), out);
}

/// The lines of the page that [offset, offset + length) lies in.
u64 lines_of(unsigned offset, unsigned length) {
  return 1ull << offset / line_bytes | 1ull << (offset + length - 1) / line_bytes;
}

bool ends_block(Kind kind) {
  return kind == Kind::step_and_end || kind == Kind::want_vectors ||
         (kind >= Kind::set_access_check && kind != Kind::jump_if);
}

/// Whether all flags are overwritten from here on before any is read, as far as a few instructions show.
bool flags_dead_at(const BlockRequest& request, unsigned offset, u64& lines) {
  u32 live = all_flags;
  for (unsigned n = 0; n < 8 && offset < page_size; ++n) {
    GuestInstruction g;
    if (!decode_at(request, offset, g)) return false;
    lines |= lines_of(offset, g.length);
    if (g.what.flags_read & live) return false;
    live &= ~u32(g.what.flags_killed);
    if (!live) return true;
    if (ends_block(g.what.kind) || g.what.kind == Kind::jump_if) return false;
    offset += g.length;
  }
  return false;
}

s32 branch_target(const Guest& g) { return s32(u32(g.next) + u32(g.immediate)); }
bool in_page(s32 offset) { return offset >= 0 && offset < s32(page_size); }

}  // namespace

void Translation::collect() {
  unsigned offset = request_.offset;
  falls_through_ = true;
  while (count_ < request_.limit) {
    Guest& g = guests_[count_];
    g.offset = u16(offset);
    g.bytes = request_.page + offset;
    if (request_.rest) {
      const unsigned first = unsigned(page_size) - offset;
      std::memcpy(crossing_, g.bytes, first);
      std::memcpy(crossing_ + first, request_.rest, sizeof crossing_ - first);
      g.bytes = crossing_;
      if (!request_.decoder->decode(crossing_, sizeof crossing_, code_of(request_), g)) out_of_room_ = true;
    } else if (!decode_at(request_, offset, g)) {
      // Undefined, or it continues on the next page: the reference engine knows.
      if (count_ == 0) {
        static_cast<GuestInstruction&>(g) = {.what = one_step, .mnemonic = ZYDIS_MNEMONIC_INVALID, .sees_x87 = true};
        lines_ |= lines_of(offset, unsigned(page_size) - offset < 15 ? unsigned(page_size) - offset : 15);
        g.next = u16(offset);
        ++count_;
        falls_through_ = false;
      }
      break;
    }
    if (g.is_substituted) g.bytes = g.substitute;
    lines_ |= lines_of(offset, request_.rest ? unsigned(page_size) - offset : g.length);
    if (request_.supervised && !g.is_repeatable) g.what = one_step;
    if (const u8 wanted = g.what.vectors; wanted > request_.mode.vectors) {
      g.what = one_step;
      g.what.kind = Kind::want_vectors;
      g.what.vectors = wanted;
    }
    offset += g.length;
    g.next = u16(offset);
    ++count_;
    const bool branches = g.what.kind == Kind::jump || g.what.kind == Kind::jump_if;
    if (g.what.kind == Kind::jump && branch_target(g) >= s32(g.next) && in_page(branch_target(g))) {
      g.what.kind = Kind::nothing;
      offset = unsigned(branch_target(g));
    }
    if (ends_block(g.what.kind)) {
      falls_through_ = false;
      break;
    }
    if (offset >= page_size) break;
    // What has been emitted is not emitted again behind each branch that leads there.
    if (branches && request_.cache->find(request_.address + offset, request_.mode.number())) break;
  }
  falls_to_ = s32(offset);
  // Between STI and the instruction behind it no interrupt may come.
  if (guests_[count_ - 1].what.kind == Kind::set_interrupt) {
    guests_[count_ - 1].what = one_step;
    falls_through_ = false;
  }

  // Flags that are live behind the block: those that its successors may read.
  const Guest& last = guests_[count_ - 1];
  const auto dead = [&](s32 target) {
    return !request_.exact_flags && in_page(target) && flags_dead_at(request_, unsigned(target), lines_);
  };
  u32 live = all_flags;
  if (falls_through_ && dead(falls_to_)) live = 0;
  if (last.what.kind == Kind::jump && dead(branch_target(last))) live = 0;
  exit_flags_live_ = live != 0;
  for (unsigned n = count_; n-- > 0;) {
    Guest& g = guests_[n];
    g.taken_flags_live = g.what.kind == Kind::jump_if && !dead(branch_target(g));
    if (g.taken_flags_live) live = all_flags;
    if (g.what.kind == Kind::verify_write && (live & ZYDIS_CPUFLAG_ZF || request_.exact_flags))
      g.what.kind = Kind::step, g.what.flags_read = all_flags;
    live = (live & ~u32(g.what.flags_killed)) | g.what.flags_read;
    g.flags_live = live != 0 || request_.exact_flags;
    g.operand_window = g.stack_window = -1;
  }
  if (!request_.single_checks) plan_windows();
}

/// Has the jump at site go to the step of instruction n.
void Translation::step_at(u8* site, unsigned n, bool restores_rcx) {
  add_cold({.kind = Cold::Kind::step, .restores_rcx = restores_rcx, .site = site, .guest = n});
}

void Translation::step(const Guest& g, bool leave) {
  a_.move_immediate32(address_scratch,
                      StepRequest::encode(g.offset, g.next, g.is_quick, g.is_repeated, g.sees_x87, leave, g.mnemonic));
  const bool is_call = g.is_quick && (g.mnemonic == ZYDIS_MNEMONIC_SYSCALL || g.mnemonic == ZYDIS_MNEMONIC_SYSRET);
  if (is_call && request_.mode.vectors == no_vectors && !request_.supervised)
    a_.jump(request_.stubs->system_call);
  else if (leave)
    a_.jump(request_.stubs->last_step[request_.mode.vectors]);
  else
    a_.call(request_.stubs->step[request_.mode.vectors]);
}

void Translation::emit_lea(const Guest& g) {
  const unsigned to = g.registers[0].number, bytes = g.width;
  Address address = address_of(g);
  address.segment = -1;
  const bool direct = bytes >= 4 && !in_context(to) && !address.rip_relative &&
                      !(address.base >= 0 && in_context(unsigned(address.base))) &&
                      !(address.index >= 0 && in_context(unsigned(address.index)));
  if (direct) {
    a_.lea(home(to), address.base < 0 ? -1 : home(unsigned(address.base)),
           address.index < 0 ? -1 : home(unsigned(address.index)), address.shift, address.displacement, bytes == 8);
    return;
  }
  compute(address);
  if (bytes == 4) a_.move32(address_scratch, address_scratch);
  if (in_context(to)) {
    if (bytes == 2) {
      a_.byte(0x65);
      a_.bytes(0x66, 0x44, 0x89, (address_scratch & 7) << 3 | 4, 0x25);
      a_.dword(spill_slot(to));
    } else {
      a_.store(spill_slot(to), address_scratch);
    }
  } else if (bytes == 2) {
    const Register reg = home(to);
    a_.bytes(0x66, 0x44 | reg >> 3, 0x89, 0xc0 | (address_scratch & 7) << 3 | (reg & 7));
  } else {
    a_.move(home(to), address_scratch);
  }
}

void Translation::emit_native(const Guest& g, unsigned n) {
  Renaming renaming;
  for (unsigned guest = 0; guest < 16; ++guest) renaming.registers[guest] = home(guest);
  const bool memory = g.has_memory;
  const GeneralOperand* high_byte = nullptr;
  u32 spilled = 0, written = 0, overwritten = ~0u;
  for (const GeneralOperand& operand : g.general()) {
    if (operand.is_high && operand.field == Field::reg) high_byte = &operand;
    if (!in_context(operand.number)) continue;
    const u32 bit = 1u << operand.number;
    if (!operand.is_overwritten) overwritten &= ~bit;
    spilled |= bit;
    if (operand.is_written) written |= bit;
  }
  if (g.what.x87) want_x87(g, n);
  if (memory) renaming.memory = operand_place(g, address_of(g), g.memory.bytes, g.memory.is_written, n, g.flags_live);
  // The spilled registers that it names borrow the scratch registers, AH-DH beside a memory operand the low byte of
  // one: first the one that is free, then the one that the address is made of, for a register that is only written.
  Register borrowed = renaming.memory.index == index_scratch ? address_scratch : index_scratch;
  const auto borrow = [&] {
    const Register taken = borrowed;
    borrowed = taken == index_scratch ? address_scratch : index_scratch;
    if (taken == address_scratch) held_ = -1;
    return taken;
  };
  for (const bool needed : {true, false}) {
    for (unsigned guest = 13; guest < 16; ++guest) {
      if (!(spilled >> guest & 1) || (overwritten >> guest & 1) == needed) continue;
      const Register taken = borrow();
      renaming.registers[guest] = taken;
      if (taken != renaming.memory.base && taken != renaming.memory.index) a_.load(taken, spill_slot(guest));
    }
  }
  if (high_byte && memory) {
    renaming.high_byte = borrow();
    a_.rotate_right(Register(renaming.high_byte), home(high_byte->number), 8);
  }
  if (!rewrite(a_, g, g.bytes, renaming)) out_of_room_ = true;
  for (unsigned guest = 13; guest < 16; ++guest)
    if (written >> guest & 1) a_.store(spill_slot(guest), renaming.registers[guest]);
  if (renaming.high_byte >= 0 && high_byte->is_written) {
    const Register whole = home(high_byte->number);
    a_.rotate_right(whole, whole, 8);
    a_.move8(whole, Register(renaming.high_byte));
    a_.rotate_right(whole, whole, 56);
  }
  if (g.what.x87) note_x87(g);
}

void Translation::link(s32 target, bool flags_live, unsigned n) {
  if (!in_page(target)) {
    link_to_other_page(target, n);
    return;
  }
  if (target <= s32(guests_[n].offset)) {  // a loop: look for attention
    Cold cold{.kind = Cold::Kind::back_edge, .guest = n, .target = target};
    if (!flags_live) {
      a_.load(address_scratch, offsetof(Context, attention));
      a_.bytes(0x41, 0x83, 0x3e, 0);  // cmp dword [r14], 0
      cold.site = a_.jump_if_later(5);
      add_cold(cold);
    } else {
      a_.push(x86::rcx);
      a_.load(x86::rcx, offsetof(Context, attention));
      a_.bytes(0x8b, 0x09);  // mov ecx, [rcx]
      u8* none = a_.jump_if_rcx_zero_later();
      cold.site = a_.jump_later();
      cold.pops_rcx = true;
      add_cold(cold);
      a_.aim_short(none);
      a_.pop(x86::rcx);
    }
  }
  aim_or_link(a_.jump_later(), target, n, request_.mode);
}

/// Through the jump's Chain. Attention picks the other of its two ways: a loop has a jump back.
void Translation::link_to_other_page(s32 target, unsigned n) {
  to_page_offset(address_scratch, target & s32(page_mask));
  a_.store(offsetof(Context, page_base), address_scratch);
  Cold cold{.kind = Cold::Kind::chain, .guest = n, .target = target};
  if (target > s32(guests_[n].offset)) {
    cold.site = a_.jump_through_later();
  } else {
    static_assert(offsetof(Chain, unlinked) - offsetof(Chain, code) == 8);
    a_.load(index_scratch, offsetof(Context, attention));
    a_.load_from(index_scratch, index_scratch, 0, false);
    cold.site = a_.load_address_later(address_scratch);
    a_.jump_through(address_scratch, index_scratch);
  }
  add_cold(cold);
}

void Translation::emit_chain(const Cold& cold) {
  while (u64(a_.here()) % alignof(Chain) && !a_.overflowed()) a_.byte(0xcc);
  u8* const chain = a_.here();
  a_.aim(cold.site);
  const u64 unlinked = u64(chain) + sizeof(Chain);
  a_.qword(unlinked);
  a_.qword(unlinked);
  a_.aim(a_.load_address_later(index_scratch), chain);
  a_.jump(request_.stubs->chain[request_.mode.vectors]);
  a_.dword(u32(-(cold.target & s32(page_mask))));
  a_.dword(u32(cold.target));
  const s32 undo = guests_[cold.guest].what.kind == Kind::call ? word() : 0;
  a_.dword(BranchRequest::encode(guests_[cold.guest].offset, undo, false));
}

/// Aims the jump at the target's code, or has it leave until there is some.
void Translation::aim_or_link(u8* site, s32 target, unsigned n, Mode mode) {
  if (const Block* block = request_.cache->find(request_.address + unsigned(target), mode.number())) {
    a_.aim(site, block->code);
    return;
  }
  add_cold({.kind = Cold::Kind::link, .site = site, .guest = n, .target = target});
}

/// Straight to where it goes, unless something must be looked at on the way.
void Translation::emit_jump_if(const Guest& g, unsigned n) {
  const unsigned condition = g.opcode & 15;
  const s32 target = branch_target(g);
  if (g.mnemonic == ZYDIS_MNEMONIC_JRCXZ || g.mnemonic == ZYDIS_MNEMONIC_JECXZ) {
    u8* const taken = a_.jump_if_rcx_zero_later();
    u8* const not_taken = a_.jump_later();
    a_.aim_short(taken);
    link(target, g.taken_flags_live, n);
    a_.aim(not_taken);
    return;
  }
  if (in_page(target) && target > s32(g.offset)) {
    aim_or_link(a_.jump_if_later(condition), target, n, request_.mode);
    return;
  }
  u8* const not_taken = a_.jump_if_later(condition ^ 1);
  link(target, g.taken_flags_live, n);
  a_.aim(not_taken);
}

void Translation::indirect(unsigned n, s32 undo, bool restores) {
  constexpr Register rcx = x86::rcx;
  const u32 jumps = u32(offsetof(Context, jumps) + request_.mode.number() * sizeof(Context::jumps[0]));
  a_.push(rcx);
  a_.load(rcx, offsetof(Context, attention));
  a_.bytes(0x8b, 0x09);  // mov ecx, [rcx]
  a_.extract_bits(index_scratch, address_scratch, offsetof(Context, jump_index_bits));
  // With attention this is one word behind the entry, and what is compared with RIP never is alike.
  static_assert(sizeof(Jump) == 4 * 8 && offsetof(Jump, never_minus_rip) == offsetof(Jump, minus_rip) + 8);
  a_.lea(index_scratch, rcx, index_scratch, 2, 0);
  a_.load(rcx, jumps + u32(offsetof(Jump, minus_rip)), index_scratch, 3);
  a_.lea(rcx, rcx, address_scratch, 0, 0);
  u8* hit = a_.jump_if_rcx_zero_later();
  add_cold({.kind = Cold::Kind::indirect,
            .pops_rcx = true,
            .site = a_.jump_later(),
            .request = BranchRequest::encode(guests_[n].offset, undo, restores)});
  a_.aim_short(hit);
  a_.load(rcx, jumps + u32(offsetof(Jump, page_base)), index_scratch, 3);
  a_.store(offsetof(Context, page_base), rcx);
  a_.pop(rcx);
  a_.jump_context(jumps + u32(offsetof(Jump, code)), index_scratch, 3);
}

/// What is in Context::target.
void Translation::push_target(const Guest& g, unsigned n, bool flags_live) {
  const Place place = on_stack(g, n, -word(), true, flags_live);
  a_.load(index_scratch, offsetof(Context, target));
  a_.store_to(place, index_scratch, wide());
  move_stack_pointer(-word());
}

void Translation::push_return_address(const Guest& g, unsigned n) {
  const Place place = on_stack(g, n, -word(), true, true);
  if (g.what.kind == Kind::call_indirect && wide()) {
    a_.load_from(index_scratch, place, true);
    a_.store(offsetof(Context, replaced), index_scratch);
  }
  to_page_offset(index_scratch, g.next);
  a_.store_to(place, index_scratch, wide());
  move_stack_pointer(-word());
}

void Translation::emit(unsigned n) {
  const Guest& g = guests_[n];
  for (unsigned w = 0; w < window_total_; ++w)
    if (windows_[w].at == n) check_window(w);
  if (!keeps_address_scratch(g.what.kind)) held_ = -1;
  switch (g.what.kind) {
    case Kind::step:
      step(g, false);
      if (g.sees_x87) x87_loaded_ = x87_noted_ = false;
      break;
    case Kind::step_and_end: step(g, true); break;
    case Kind::nothing: break;
    case Kind::want_vectors:
      a_.move_immediate32(index_scratch, g.what.vectors);
      a_.context_op(0x89, index_scratch, offsetof(Context, wants_vectors), -1, 0, false);
      to_page_offset(address_scratch, g.offset);
      a_.jump(leave());
      break;
    case Kind::native: emit_native(g, n); break;
    case Kind::lea: emit_lea(g); break;
    case Kind::push: {
      const Place place = on_stack(g, n, -word(), true, g.flags_live);
      if (g.has_immediate) {
        a_.store_signed32(place, g.immediate, wide());
      } else {
        const unsigned guest = g.registers[0].number;
        Register from = home(guest);
        if (in_context(guest)) {
          a_.load(index_scratch, spill_slot(guest));
          from = index_scratch;
        }
        a_.store_to(place, from, wide());
      }
      move_stack_pointer(-word());
      break;
    }
    case Kind::pop: {
      const unsigned guest = g.registers[0].number;
      const Place place = on_stack(g, n, 0, false, g.flags_live);
      if (in_context(guest)) {
        a_.load_from(index_scratch, place, wide());
        a_.store(spill_slot(guest), index_scratch);
      } else {
        a_.load_from(home(guest), place, wide());
      }
      if (guest != x86::rsp) move_stack_pointer(word());
      break;
    }
    case Kind::leave:
      load_scratch(operand_place(g, {.base = x86::rbp}, unsigned(word()), false, n, g.flags_live));
      a_.lea(guest_rsp, x86::rbp, -1, 0, word(), wide());
      a_.move(x86::rbp, address_scratch);
      break;
    case Kind::jump: link(branch_target(g), exit_flags_live_, n); break;
    case Kind::jump_if: emit_jump_if(g, n); break;
    case Kind::push_memory: emit_push_memory(g, n); break;
    case Kind::push_flags: emit_push_flags(g, n); break;
    case Kind::move_from_segment: emit_move_from_segment(g); break;
    case Kind::bit_string: emit_bit_string(g, n); break;
    case Kind::string: emit_string(g, n); break;
    case Kind::clear_flag: emit_clear_flag(g); break;
    case Kind::set_interrupt: emit_set_interrupt(n); break;
    case Kind::swap_gs: emit_swap_gs(); break;
    case Kind::set_access_check: emit_set_access_check(g, n); break;
    case Kind::verify_write: check(address_of(g), 2, false, n, g.flags_live); break;
    case Kind::read_time: emit_read_time(g, n); break;
    case Kind::call:
      push_return_address(g, n);
      link(branch_target(g), true, n);
      break;
    case Kind::jump_indirect:
    case Kind::call_indirect: {
      if (g.has_memory) {
        load_scratch(operand_place(g, address_of(g), unsigned(word()), false, n, true));
      } else {
        const unsigned guest = g.registers[0].number;
        if (in_context(guest))
          a_.load(address_scratch, spill_slot(guest));
        else
          a_.move(address_scratch, home(guest));
      }
      if (g.what.kind == Kind::call_indirect) {
        a_.store(offsetof(Context, target), address_scratch);
        push_return_address(g, n);
        a_.load(address_scratch, offsetof(Context, target));
      }
      if (g.what.kind == Kind::call_indirect)
        indirect(n, word(), true);
      else
        indirect(n);
      break;
    }
    case Kind::ret: {
      const s32 extra = g.has_immediate ? g.immediate & 0xffff : 0;
      load_scratch(on_stack(g, n, 0, false, true));
      move_stack_pointer(word() + extra);
      indirect(n, -word() - extra);
      break;
    }
  }
}

void Translation::emit_cold_step(unsigned n) {
  const Guest& g = guests_[n];
  const bool ends = ends_block(g.what.kind);
  step(g, ends);
  if (g.what.x87)
    restore_x87(g, n);
  else if (!ends)
    a_.jump(after_[n]);
}

void Translation::emit_cold(const Cold& cold) {
  if (cold.kind == Cold::Kind::chain) {
    emit_chain(cold);
    return;
  }
  a_.aim(cold.site);
  if (cold.restores_rcx) a_.load(x86::rcx, offsetof(Context, temporary));
  if (cold.pops_rcx) a_.pop(x86::rcx);
  switch (cold.kind) {
    case Cold::Kind::load_x87:
      a_.call(request_.stubs->load_x87);
      a_.jump(cold.retry);
      emit_cold_step(cold.guest);
      break;
    case Cold::Kind::crossing: {
      const unsigned offset = guests_[0].offset;
      a_.move_immediate32(address_scratch,
                          StepRequest::encode(offset, offset, false, false, true, true, ZYDIS_MNEMONIC_INVALID));
      a_.jump(request_.stubs->last_step[request_.mode.vectors]);
      break;
    }
    case Cold::Kind::window: {
      u8* crosses = nullptr;
      if (!cold.flags_live) {
        a_.compare_immediate(address_scratch, s32(page_size - 1));
        crosses = a_.jump_if_short_later(6);  // jbe: no refill will help
      }
      refill(cold);
      if (crosses) a_.aim_short(crosses);
      [[fallthrough]];
    }
    case Cold::Kind::singly:
      // The same place with single checks.
      a_.aim(a_.jump_later());
      a_.call(request_.stubs->check_singly[request_.mode.vectors]);
      a_.word(guests_[cold.guest].offset);
      break;
    case Cold::Kind::refill: refill(cold); [[fallthrough]];
    case Cold::Kind::step: emit_cold_step(cold.guest); break;
    case Cold::Kind::link:
      a_.call(request_.stubs->link[request_.mode.vectors]);
      a_.dword(u32(s32(cold.site - a_.here())));
      a_.word(u32(cold.target));
      break;
    case Cold::Kind::chain: break;
    case Cold::Kind::indirect:
      a_.move_immediate32(index_scratch, cold.request);
      a_.jump(request_.stubs->find[request_.mode.vectors]);
      break;
    case Cold::Kind::back_edge:
      a_.move_immediate32(index_scratch, u32(cold.target));
      a_.jump(request_.stubs->leave_at[request_.mode.vectors]);
      break;
  }
}

/// Whether what is emitted for it resets held_ where it takes the register.
bool Translation::keeps_address_scratch(Kind kind) {
  return kind == Kind::nothing || kind == Kind::native || kind == Kind::lea || kind == Kind::push || kind == Kind::pop;
}

BlockCode Translation::run() {
  collect();
  u8* const begin = a_.here();
  if (request_.rest) emit_crossing_guard();
  for (unsigned n = 0; n < count_; ++n) {
    emit(n);
    if (!keeps_address_scratch(guests_[n].what.kind)) held_ = -1;
    after_[n] = a_.here();
  }
  if (falls_through_ && request_.rest)
    emit_crossing_end();
  else if (falls_through_)
    link(falls_to_, exit_flags_live_, count_ - 1);
  const Assembler hot = std::exchange(a_, cold_assembler_);
  if (hot.overflowed()) return {};  // the cold parts would be aimed at from where there is nothing
  for (unsigned n = 0; n < cold_count_; ++n) emit_cold(cold_[n]);
  const u8* const places = a_.here();
  PlaceWriter writer(a_);
  for (unsigned n = 0; n < count_; ++n) writer.put({u16((n ? after_[n - 1] : begin) - begin), guests_[n].offset});
  if (a_.overflowed() || out_of_room_) return {};
  return {{hot.here(), a_.here()}, u32(hot.here() - begin), places, count_, lines_};
}

BlockCode translate_block(const BlockRequest& request, CodeRoom at, CodeRoom end) {
  Translation translation(request, at, end);
  return translation.run();
}

}  // namespace anykvm::engine::translate
