// The code that every block shares: the way in, the way out, one step of the reference engine, a TLB refill.
#pragma once

#include "engine/translate/context.h"

namespace anykvm::engine::translate {

struct Stubs {
  /// Loads the guest's registers and jumps to Context::enter_at.
  void (*enter[2])(Context*);
  /// Jump here with the guest's RIP in the address scratch register: stores the guest's registers and returns from
  /// enter.
  u8* leave[2];
  /// Call here with where | next << 16 in the address scratch register: the reference engine executes the instruction
  /// at that offset in the page. Returns when the guest goes on at `next`, else leaves.
  u8* step[2];
  /// Call here with a guest address in the address scratch register and FillRequest in the index scratch register.
  /// Returns behind the call when the TLB has been refilled, else 5 bytes further. Keeps every register and the flags.
  u8* fill;
};
// [0]: the vector registers are the host's own; [1]: they are the guest's.

/// For Stubs::step: bit 31 set: leave in any case.
inline constexpr u32 step_and_leave = 1u << 31;

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
bool step_function(Context* context, u32 where_and_next);
/// Compiled for general registers only: the guest's vector registers stay in place.
bool fill_function(Context* context, Gva address, u32 request);

/// Emits them at `a`. whole_vectors: zmm registers are kept, not only ymm.
Stubs emit_stubs(Assembler& a, bool whole_vectors);

}  // namespace anykvm::engine::translate
