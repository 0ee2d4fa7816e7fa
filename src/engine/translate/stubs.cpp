#include "engine/translate/stubs.h"

#include <iterator>

namespace anykvm::engine::translate {

namespace {

constexpr Register rax = 0, rcx = 1, rdx = 2, rbx = 3, rbp = 5, rsi = 6, rdi = 7;
constexpr u32 gpr_at = offsetof(x86::CpuState, gpr), rip_at = offsetof(x86::CpuState, rip);
constexpr u32 flags_at = offsetof(x86::CpuState, arithmetic);
constexpr u32 vector_at = offsetof(x86::CpuState, fpu) + offsetof(x86::FpuState, vector);
constexpr u32 opmask_at = offsetof(x86::CpuState, fpu) + offsetof(x86::FpuState, opmask);
constexpr u32 mxcsr_at = offsetof(x86::CpuState, fpu) + offsetof(x86::FpuState, mxcsr);

constexpr u32 at_state = offsetof(Context, state);

/// Moves the vector registers of a level: opcode 0x10 loads, 0x11 stores. whole: zmm, not only ymm.
void move_vectors(Assembler& a, unsigned level, unsigned opcode, Register base, bool whole) {
  const unsigned not_b = (~base >> 3 & 1) << 5;
  for (unsigned n = 0; n < (level == all_vectors ? 32 : 16); ++n) {
    const unsigned not_r = (~n >> 3 & 1) << 7, not_r4 = (~n >> 4 & 1) << 4;
    if (whole)
      a.bytes(0x62, not_r | 0x40 | not_b | not_r4 | 0x01, 0x7c, 0x48, opcode);
    else
      a.bytes(0xc4, not_r | 0x40 | not_b | 0x01, 0x7c, opcode);
    a.byte(0x80 | (n & 7) << 3 | (base & 7));
    a.dword(vector_at + n * 64);
  }
  for (unsigned n = 0; level == all_vectors && n < 8; ++n) {
    a.bytes(0xc4, 0x80 | 0x40 | not_b | 0x01, 0xf8, opcode + 0x80);  // kmovq
    a.address(n, base, s32(opmask_at + n * 8));
  }
}

/// 0F AE /extension [base + displacement]: ldmxcsr 2, stmxcsr 3.
void mxcsr_op(Assembler& a, unsigned extension, Register base, u32 displacement) {
  if (base >= 8) a.byte(0x41);
  a.bytes(0x0f, 0xae);
  a.address(extension, base, s32(displacement));
}
void mxcsr_context(Assembler& a, unsigned extension, u32 offset) {
  a.bytes(0x65, 0x0f, 0xae, extension << 3 | 4, 0x25);
  a.dword(offset);
}

/// Guest registers and flags to the state. Only the address scratch is used; RIP is the caller's.
void save_guest(Assembler& a, unsigned vectors, bool whole) {
  // Flags first: nothing before touches them.
  a.load(index_scratch, at_state);
  for (unsigned guest = 0; guest < 16; ++guest)
    if (!in_context(guest)) a.store_to(index_scratch, s32(gpr_at + guest * 8), home(guest));
  // lahf ; seto al ; mov [state + arithmetic], ax
  a.bytes(0x9f, 0x0f, 0x90, 0xc0, 0x66, 0x41, 0x89);
  a.address(rax, index_scratch, s32(flags_at));
  for (unsigned guest = 13; guest < 16; ++guest) {
    a.load(rax, spill_slot(guest));
    a.store_to(index_scratch, s32(gpr_at + guest * 8), rax);
  }
  if (vectors) {
    move_vectors(a, vectors, 0x11, index_scratch, whole);
    mxcsr_op(a, 3, index_scratch, mxcsr_at);
    mxcsr_context(a, 2, offsetof(Context, host_mxcsr));
  }
  a.byte(0xfc);  // cld
}

void load_guest(Assembler& a, unsigned vectors, bool whole) {
  a.load(index_scratch, at_state);
  if (vectors) {
    move_vectors(a, vectors, 0x10, index_scratch, whole);
    mxcsr_op(a, 2, index_scratch, mxcsr_at);
  }
  for (unsigned guest = 13; guest < 16; ++guest) {
    a.load_from(rax, index_scratch, s32(gpr_at + guest * 8));
    a.store(spill_slot(guest), rax);
  }
  // movzx eax, word [state + arithmetic] ; add al, 0x7f ; sahf
  a.bytes(0x41, 0x0f, 0xb7);
  a.address(rax, index_scratch, s32(flags_at));
  a.bytes(0x04, 0x7f, 0x9e);
  for (unsigned guest = 0; guest < 16; ++guest)
    if (!in_context(guest)) a.load_from(home(guest), index_scratch, s32(gpr_at + guest * 8));
}

void jump_to_block(Assembler& a) {
  a.bytes(0x65, 0xff, 0x24, 0x25);  // jmp gs:[enter_at]
  a.dword(offsetof(Context, enter_at));
}

constexpr Register callee_saved[] = {rbx, rbp, 12, 13, 14, 15};
constexpr Register caller_saved[] = {rax, rcx, rdx, rsi, rdi, 8, 9, 10, 11};
constexpr u8 saved_bytes = (std::size(caller_saved) + 1) * 8;  ///< with the flags

/// From the saved state back to whoever called enter.
void return_to_host(Assembler& a, bool vectors) {
  a.load(host_rsp, offsetof(Context, host_stack));
  if (vectors) a.bytes(0xc5, 0xf8, 0x77);  // vzeroupper
  for (unsigned n = std::size(callee_saved); n-- > 0;) a.pop(callee_saved[n]);
  a.ret();
}

}  // namespace

Stubs emit_stubs(Assembler& a, bool whole) {
  Stubs stubs{};
  for (unsigned vectors = 0; vectors < vector_levels; ++vectors) {
    stubs.enter[vectors] = reinterpret_cast<void (*)(Context*)>(a.here());
    for (Register reg : callee_saved) a.push(reg);
    a.store(offsetof(Context, host_stack), host_rsp);
    if (vectors) mxcsr_context(a, 3, offsetof(Context, host_mxcsr));
    load_guest(a, vectors, whole);
    jump_to_block(a);

    stubs.leave[vectors] = a.here();
    save_guest(a, vectors, whole);
    a.store_to(index_scratch, s32(rip_at), address_scratch);
    return_to_host(a, vectors);

    // Both ways in and the ways on return as often as they are called: the processor predicts returns by counting, and
    // a call too many would have it mistake every return on the way back to the client.
    const auto call_step_function = [&] {
      save_guest(a, vectors, whole);
      if (vectors) a.bytes(0xc5, 0xf8, 0x77);
      a.load(rdi, offsetof(Context, self));
      a.move(rsi, address_scratch);
      // The stack is 16-byte aligned here: six registers and two return addresses lie on it.
      a.move_immediate64(rax, reinterpret_cast<u64>(&step_function));
      a.bytes(0xff, 0xd0);  // call rax
    };
    const auto is = [&](Next next) {
      a.bytes(0x3c, u8(next));    // cmp al, next
      return a.jump_if_later(4);  // je
    };
    stubs.last_step[vectors] = a.here();
    a.push(rax);  // where a step has a return address: the stack is aligned alike
    call_step_function();
    const u8* const go_on = a.here();
    u8* enter[vector_levels];
    for (unsigned next = 0; next < vector_levels; ++next) enter[next] = is(Next(unsigned(Next::enter) + next));
    return_to_host(a, false);
    for (unsigned next_vectors = 0; next_vectors < vector_levels; ++next_vectors) {
      a.aim(enter[next_vectors]);
      a.pop(rax);
      load_guest(a, next_vectors, whole);
      jump_to_block(a);
    }

    stubs.step[vectors] = a.here();
    call_step_function();
    u8* const same = is(Next::same_block);
    u8* const elsewhere = a.load_address_later(rcx);
    a.store_to(host_rsp, 0, rcx);
    a.ret();
    a.aim(elsewhere);
    a.push(rax);
    a.jump(go_on);
    a.aim(same);
    load_guest(a, vectors, whole);
    a.ret();
  }

  const auto save = [&a] {
    for (Register reg : caller_saved) a.push(reg);
    a.bytes(0x9f, 0x0f, 0x90, 0xc0);  // lahf ; seto al
    a.push(rax);
    a.bytes(0xfc);
  };
  const auto restore = [&a] {
    a.pop(rax);
    a.bytes(0x04, 0x7f, 0x9e);  // add al, 0x7f ; sahf
    for (unsigned n = std::size(caller_saved); n-- > 0;) a.pop(caller_saved[n]);
  };
  const auto call = [&a](u64 function) {
    a.load(rdi, offsetof(Context, self));
    a.move(rsi, address_scratch);
    a.move_immediate64(rax, function);
    a.bytes(0xff, 0xd0);
    a.bytes(0x84, 0xc0);        // test al, al
    return a.jump_if_later(5);  // jnz
  };

  // Where flags are dead, the look has added the entry's tag to the address.
  u8* refills[Stubs::privileges][2][2];
  for (unsigned privilege = 0; privilege < Stubs::privileges; ++privilege)
    for (const bool write : {false, true})
      for (const bool flags_live : {false, true}) {
        const u32 tag = tlb_tag(x86::Privilege(privilege), write);
        stubs.refill[privilege][write][flags_live] = a.here();
        if (!flags_live) a.subtract(address_scratch, tag, index_scratch);
        a.move_immediate32(index_scratch, FillRequest::encode(write, x86::Privilege(privilege)));
        refills[privilege][write][flags_live] = a.jump_later();
      }
  for (auto& of_privilege : refills)
    for (auto& of_access : of_privilege)
      for (u8* const site : of_access) a.aim(site);
  save();
  a.move32(rdx, index_scratch);
  a.load_from(rcx, host_rsp, saved_bytes);  // the return address: the RefillRequest
  u8* const filled = call(reinterpret_cast<u64>(&fill_function));
  a.add_to_stack(saved_bytes, sizeof(RefillRequest));
  u8* const refused = a.jump_short_later();
  a.aim(filled);
  a.load_from(rax, host_rsp, saved_bytes);
  a.load_signed32(rcx, rax, offsetof(RefillRequest, retry));
  a.lea(rax, rax, rcx, 0, 0);
  a.store_to(host_rsp, saved_bytes, rax);
  a.aim_short(refused);
  restore();
  a.ret();

  const auto return_if = [&a, &restore](u8* done) {
    a.add_to_stack(saved_bytes, 5);  // the return address
    a.aim(done);
    restore();
    a.ret();
  };
  stubs.load_x87 = a.here();
  save();
  return_if(call(reinterpret_cast<u64>(&load_x87_function)));

  stubs.system_call = a.here();
  a.push(rax);  // as in find
  save();
  static_assert(sizeof(SavedRegisters) == saved_bytes);
  a.move32(rdx, address_scratch);
  a.load(rdi, offsetof(Context, self));
  a.move(rsi, host_rsp);
  a.move_immediate64(rax, reinterpret_cast<u64>(&system_call_function));
  a.bytes(0xff, 0xd0);  // call rax
  a.bytes(0x84, 0xc0);  // test al, al
  u8* const done = a.jump_if_later(5);
  restore();
  a.pop(index_scratch);
  a.jump(stubs.last_step[no_vectors]);
  a.aim(done);
  restore();
  a.pop(address_scratch);
  jump_to_block(a);

  for (unsigned vectors = 0; vectors < vector_levels; ++vectors) {
    stubs.find[vectors] = a.here();
    a.push(rax);  // where fill has a return address: the stack is aligned alike
    save();
    a.move32(rdx, index_scratch);
    a.move(rcx, guest_rsp);
    u8* found = call(reinterpret_cast<u64>(&find_function));
    restore();
    a.pop(rax);
    a.jump(stubs.leave[vectors]);
    a.aim(found);
    restore();
    a.pop(rax);
    jump_to_block(a);

    stubs.link[vectors] = a.here();
    a.pop(address_scratch);
    a.load_signed32(index_scratch, address_scratch, offsetof(LinkRequest, site));
    a.lea(index_scratch, index_scratch, address_scratch, 0, 0);
    a.store(offsetof(Context, link_site), index_scratch);
    a.load_word(index_scratch, address_scratch, offsetof(LinkRequest, target));
    a.load(address_scratch, offsetof(Context, page_base));
    a.lea(address_scratch, address_scratch, index_scratch, 0, 0);
    a.jump(stubs.find[vectors]);

    stubs.leave_at[vectors] = a.here();
    a.load(address_scratch, offsetof(Context, page_base));
    a.lea(address_scratch, address_scratch, index_scratch, 0, 0);
    a.jump(stubs.leave[vectors]);

    stubs.chain[vectors] = a.here();
    const auto in_request = [](u32 field) { return s32(sizeof(Chain) + field); };
    a.store(offsetof(Context, chain), index_scratch);
    a.push(rcx);
    a.load(rcx, offsetof(Context, page_base));
    a.load_signed32(address_scratch, index_scratch, in_request(offsetof(ChainRequest, back)));
    a.lea(rcx, rcx, address_scratch, 0, 0);
    a.store(offsetof(Context, page_base), rcx);
    a.load_signed32(address_scratch, index_scratch, in_request(offsetof(ChainRequest, target)));
    a.lea(address_scratch, address_scratch, rcx, 0, 0);
    a.pop(rcx);
    a.load_from(index_scratch, index_scratch, in_request(offsetof(ChainRequest, branch)), false);
    a.jump(stubs.find[vectors]);

    stubs.check_singly[vectors] = a.here();
    a.pop(address_scratch);
    a.lea(index_scratch, address_scratch, -1, 0, -9);  // a call and the jump's displacement
    a.store(offsetof(Context, link_site), index_scratch);
    a.store(offsetof(Context, wants_checks), index_scratch);
    a.load_word(index_scratch, address_scratch, 0);
    a.jump(stubs.leave_at[vectors]);

    stubs.take_back[vectors] = a.here();
    a.load(index_scratch, offsetof(Context, undo));
    a.lea(guest_rsp, guest_rsp, index_scratch, 0, 0);
    a.load(address_scratch, offsetof(Context, branch));
    a.jump(stubs.leave[vectors]);
  }
  return stubs;
}

}  // namespace anykvm::engine::translate
