// The code that every block shares: the way in, the way out, one step of the reference engine, a TLB refill.
#pragma once

#include <Zydis/Zydis.h>

#include <iterator>

#include "engine/translate/context.h"

namespace anykvm::engine::translate {

struct Stubs {
  /// Loads the guest's registers and jumps to Context::enter_at.
  void (*enter[vector_levels])(Context*);
  /// Jump here with the guest's RIP in the address scratch register: stores the guest's registers and returns from
  /// enter.
  u8* leave[vector_levels];
  /// Call here with a StepRequest in the address scratch register: the reference engine executes the instruction.
  /// Returns when the guest goes on behind it in the same block, else goes on elsewhere or leaves.
  u8* step[vector_levels];
  /// Jump here instead where the instruction ends its block.
  u8* last_step[vector_levels];
  /// The same for SYSCALL and SYSRET, in blocks without vector registers.
  u8* system_call;
  /// Jump here with a guest RIP that the jump cache does not have in the address scratch register, and the
  /// BranchRequest that led there in the index scratch register: goes on there when there is a block, else leaves.
  /// Keeps every register and the flags.
  u8* find[vector_levels];
  /// Takes the branch Context::branch back, and leaves.
  u8* take_back[vector_levels];
  /// Jump here with an offset in the page in the index scratch register: leaves to go on there.
  u8* leave_at[vector_levels];
  /// Call here to go on at a place in the page as find does, telling which jump may be aimed at its block: behind the
  /// call lies a LinkRequest.
  u8* link[vector_levels];
  /// Jump here with an unlinked Chain that has been taken in the index scratch register, behind which lies a
  /// ChainRequest: goes on as find does.
  u8* chain[vector_levels];
  /// Call here, right behind the jump that may be aimed at the block, to leave for a place in the page in whose block
  /// each access is checked by itself: behind the call lies its offset, a u16.
  u8* check_singly[vector_levels];
  /// Call here where a look into the TLB has not found the page, with the scratch registers as that left them; behind
  /// the call lies a RefillRequest. Goes on at its `retry` when the TLB has been refilled, else behind it. Keeps all
  /// other registers and the flags.
  u8* refill[3][2][2];
  static constexpr unsigned privileges = std::size(decltype(refill){});
  /// Call here to have the guest's x87 registers loaded. Returns behind the call when they are, else 5 bytes further:
  /// the guest may not use the unit now. Keeps every register and the flags.
  u8* load_x87;
};
// By VectorLevel of the block.

/// An instruction for the reference engine.
struct StepRequest {
  /// offset, next: in the page. quick: quick_step() may know it. repeats: it has a REP prefix. sees_x87: the x87
  /// registers have to be in the state. ends: it ends its block. mnemonic: ZydisMnemonic.
  static constexpr u32 encode(unsigned offset, unsigned next, bool quick, bool repeats, bool sees_x87, bool ends,
                              unsigned mnemonic) {
    return offset | (next - offset) << 12 | (repeats ? 1u << 16 : 0) | (quick ? 1u << 17 : 0) |
           (sees_x87 ? 1u << 18 : 0) | (ends ? 1u << 19 : 0) | mnemonic << 20;
  }
  static unsigned offset(u64 request) { return request & 0xfff; }
  static unsigned next(u64 request) { return offset(request) + (request >> 12 & 15); }
  static bool repeats(u64 request) { return request >> 16 & 1; }
  static bool quick(u64 request) { return request >> 17 & 1; }
  static bool sees_x87(u64 request) { return request >> 18 & 1; }
  static bool ends(u64 request) { return request >> 19 & 1; }
  static unsigned mnemonic(u64 request) { return unsigned(request >> 20); }
};
static_assert(ZYDIS_MNEMONIC_MAX_VALUE < 1 << 12);

/// The branch that leads somewhere else, in case it must be taken back.
struct BranchRequest {
  /// offset: in the page. undo: what the stack pointer's change is taken back by. restores: what was pushed has
  /// replaced Context::replaced.
  static constexpr u32 encode(unsigned offset, s32 undo, bool restores) {
    return offset | (restores ? 1u << 13 : 0) | u32(undo + bias) << 14;
  }
  static unsigned offset(u32 request) { return request & 0x1fff; }
  static bool restores(u32 request) { return request >> 13 & 1; }
  static s32 undo(u32 request) { return s32(request >> 14) - bias; }

 private:
  static constexpr s32 bias = 0x10010;  // RET takes up to 8 + 65,535 bytes
};

/// Where the guest goes on after a step.
enum class Next : u8 {
  leave,       ///< the run loop decides
  same_block,  ///< behind the instruction
  enter,       ///< at Context::enter_at with no_vectors; the numbers behind it: with the other VectorLevels
};

/// What a TLB refill is asked for.
struct [[gnu::packed]] RefillRequest {
  s32 retry;  ///< where the look into the TLB begins, from here
  u8 size;
};
/// How Stubs::refill hands it on.
struct FillRequest {
  static constexpr u32 encode(bool write, x86::Privilege privilege) {
    return (write ? 1 : 0) | unsigned(privilege) << 1;
  }
  static bool write(u32 request) { return request & 1; }
  static x86::Privilege privilege(u32 request) { return x86::Privilege(request >> 1 & 3); }
};

/// Behind a Chain: its own way to find the target, and where that is.
struct [[gnu::packed]] ChainRequest {
  u8 way[12];
  s32 back;    ///< from the target's page to that of the jump
  s32 target;  ///< from the page of the jump
  u32 branch;  ///< BranchRequest
};
struct [[gnu::packed]] LinkRequest {
  s32 site;    ///< where the jump has its displacement, from here
  u16 target;  ///< offset in the page
};

/// What a stub saves of the guest on the stack before it calls one of the functions below.
struct SavedRegisters {
  u16 flags;  ///< as CpuState::arithmetic
  u64 r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
};

/// Implemented by the translator; `state` is up to date in step_function.
Next step_function(Context* context, u64 request);
/// Compiled for general registers only: the guest's vector registers stay in place.
/// true: Context::enter_at is the block at rip.
bool find_function(Context* context, u64 rip, u32 request, u64 rsp);
bool fill_function(Context* context, Gva address, u32 request, const RefillRequest* more);
bool load_x87_function(Context* context);
/// true: the registers are those behind the instruction, Context::enter_at is the block there; false: they are as they
/// were, and it wants a step.
bool system_call_function(Context* context, SavedRegisters* registers, u32 request);

/// Emits them at `a`. whole_vectors: zmm registers are kept, not only ymm.
Stubs emit_stubs(Assembler& a, bool whole_vectors);

}  // namespace anykvm::engine::translate
