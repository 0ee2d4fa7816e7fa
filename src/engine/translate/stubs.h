// The code that every block shares: the way in, the way out, one step of the reference engine, a TLB refill.
#pragma once

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
  /// Jump here with a guest RIP that the jump cache does not have in the address scratch register, and the
  /// BranchRequest that led there in the index scratch register: goes on there when there is a block, else leaves.
  /// Keeps every register and the flags.
  u8* find[vector_levels];
  /// Takes the branch Context::branch back, and leaves.
  u8* take_back[vector_levels];
  /// Call here with a guest address in the address scratch register and FillRequest in the index scratch register.
  /// Returns behind the call when the TLB has been refilled, else 5 bytes further. Keeps every register and the flags.
  u8* fill;
  /// Call here to have the guest's x87 registers loaded. Returns behind the call when they are, else 5 bytes further:
  /// the guest may not use the unit now. Keeps every register and the flags.
  u8* load_x87;
};
// By VectorLevel of the block.

/// An instruction for the reference engine.
struct StepRequest {
  /// offset, next: in the page. quick: quick_step() may know it. repeats: it has a REP prefix. sees_x87: the x87
  /// registers have to be in the state. ends: it ends its block. mnemonic: ZydisMnemonic.
  static constexpr u64 encode(unsigned offset, unsigned next, bool quick, bool repeats, bool sees_x87, bool ends,
                              unsigned mnemonic) {
    return offset | next << 13 | (repeats ? 1u << 28 : 0) | (quick ? 1u << 29 : 0) | (sees_x87 ? 1u << 30 : 0) |
           (ends ? 1u << 31 : 0) | u64(mnemonic) << 32;
  }
  static unsigned offset(u64 request) { return request & 0x1fff; }
  static unsigned next(u64 request) { return request >> 13 & 0x1fff; }
  static bool repeats(u64 request) { return request >> 28 & 1; }
  static bool quick(u64 request) { return request >> 29 & 1; }
  static bool sees_x87(u64 request) { return request >> 30 & 1; }
  static bool ends(u64 request) { return request >> 31 & 1; }
  static unsigned mnemonic(u64 request) { return unsigned(request >> 32); }
};

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
struct FillRequest {
  static constexpr u32 encode(unsigned size, bool write, x86::Privilege privilege) {
    return size | (write ? 1u << 8 : 0) | unsigned(privilege) << 9;
  }
  static unsigned size(u32 request) { return request & 0xff; }
  static bool write(u32 request) { return request >> 8 & 1; }
  static x86::Privilege privilege(u32 request) { return x86::Privilege(request >> 9 & 3); }
};

/// Implemented by the translator; `state` is up to date in step_function.
Next step_function(Context* context, u64 request);
/// Compiled for general registers only: the guest's vector registers stay in place.
/// true: Context::enter_at is the block at rip.
bool find_function(Context* context, u64 rip, u32 request, u64 rsp);
bool fill_function(Context* context, Gva address, u32 request);
bool load_x87_function(Context* context);

/// Emits them at `a`. whole_vectors: zmm registers are kept, not only ymm.
Stubs emit_stubs(Assembler& a, bool whole_vectors);

}  // namespace anykvm::engine::translate
