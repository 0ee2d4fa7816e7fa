// Lets the host CPU execute one guest instruction: a short function that loads the guest's registers and flags which
// the instruction uses, runs the instruction itself (its memory operand replaced by a host address), and stores what it
// wrote.
//
// Constraints:
//  1. Host RSP stays a valid host stack at every instruction: a guest RSP operand is renamed to another register.
//  2. What the host raises in it (#DE, #UD, #XM, #GP) is the guest's exception: a signal handler lets the thread go on
//  at
//     way_out(), and the guest's registers are those of before.
//  3. Host MXCSR is as before afterwards. The x87 unit is left with the guest's registers; see leave_x87().
//
// Example: `add [rbx+8], cx` becomes
//     movzx eax, word [rdi + arithmetic] ; add al, 0x7f ; sahf      (only where old flags survive or are read)
//     mov   rcx, [rdi + gpr + 8]
//     add   [rsi], cx
//     lahf ; seto al ; mov [rdi + arithmetic], ax
//     ret
#pragma once

#include <span>

#include "x86/state.h"

struct ZydisDecodedInstruction_;
struct ZydisDecodedOperand_;

namespace anykvm::engine {

/// memory: host address of the memory operand, ignored when it has none.
using NativeCode = void (*)(x86::CpuState* state, void* memory);

inline constexpr unsigned native_code_bytes = 160;  ///< room for the longest

/// Where code that a host exception has interrupted goes on, to return without an effect. code: native_code_bytes.
inline const u8* way_out(const u8* code) { return code + code[native_code_bytes - 1]; }

struct EmitResult {
  bool emitted = false;     ///< false: not an instruction that may run natively, or no room
  bool uses_mxcsr = false;  ///< rounds and raises as MXCSR says
};

/// Emits code for the instruction into `out` (native_code_bytes, writable and executable). code_bits is the mode it was
/// decoded for. Refused: control flow, stack, string and segment operands, more than one memory operand. That it is not
/// a system instruction is the caller's to know.
EmitResult emit_native(const ZydisDecodedInstruction_& instruction, std::span<const ZydisDecodedOperand_> operands,
                       const u8* bytes, unsigned code_bits, std::span<u8> out);

}  // namespace anykvm::engine
