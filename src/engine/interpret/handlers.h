// The interpreter's chapters. Each select_* looks at a decoded instruction and, when it is one of its own, fills in
// what its handler needs and returns the handler; else nullptr. decode() asks them in order. What an instruction does
// stands beside its select_*, in the file of the chapter.
#pragma once

#include "engine/interpret/instruction.h"
#include "engine/native/decoded.h"

namespace anykvm::engine {

Handler select_move(const Decoded&, Instruction&);    ///< MOV, MOVZX, LEA, XLAT, NOP ...
Handler select_stack(const Decoded&, Instruction&);   ///< PUSH, POP, ENTER, LEAVE, PUSHF ...
Handler select_branch(const Decoded&, Instruction&);  ///< JMP, Jcc, CALL, RET, LOOP, far transfers, INT, IRET
Handler select_string(const Decoded&, Instruction&);  ///< MOVS, STOS, LODS, CMPS, SCAS
Handler select_io(const Decoded&, Instruction&);      ///< IN, OUT, INS, OUTS
Handler select_bits(const Decoded&, Instruction&,
                    std::span<u8> code);               ///< BT, BTS, BTR, BTC on memory with a register offset
Handler select_decimal(const Decoded&, Instruction&);  ///< AAA ... DAS, AAM, AAD, SALC, BOUND, ARPL: legacy modes only
Handler select_system(const Decoded&, Instruction&);   ///< control registers, descriptor tables, MSRs, CPUID ...
Handler select_state(const Decoded&, Instruction&);    ///< FXSAVE, XSAVE ..., XGETBV, MXCSR, VZEROALL, FWAIT
Handler select_gather(const Decoded&, Instruction&);   ///< gathers, scatters
Handler select_x87(const Decoded&, Instruction&);      ///< FNSTENV, FNSAVE, FNINIT and their likes
Handler select_native(const Decoded&, Instruction&, std::span<u8> code);  ///< everything the host CPU executes for us

/// A string instruction's source segment, which a prefix may override; ES:rDI cannot be.
x86::SegmentName source_segment(const Decoded&);

x86::Result undefined(Context&, const Instruction&);  ///< raises #UD
x86::Result no_operation(Context&, const Instruction&);

/// #UD or #NM where CR0, CR4 and XCR0 do not allow the instruction's unit, #MF where one is pending.
x86::Result check_unit(Context&, const Instruction&);

/// Whether it may be executed a second time as if the first had not been, once registers and RAM are put back.
bool is_repeatable(const Decoded&);

/// Whether the host CPU has the instruction. What the guest's CPUID leaves out but the host has runs, as under hardware
/// virtualisation.
bool host_has(const Decoded&);
/// Whether the host CPU may execute it for the guest: it only computes, and the host has it.
bool runs_natively(const Decoded&);
/// Whether a memory operand of the instruction may lie in a device.
bool may_reach_devices(const Decoded&, Unit unit);
/// The handler of an instruction that may not and has no native code: Instruction::behind_bar, with devices barred.
x86::Result without_devices(Context&, const Instruction&);
/// NOPs and prefetches, which does_nothing() then, or which are undefined.
bool is_hint(const Decoded&);
bool does_nothing(const Decoded&);
/// How wide the target of a near branch in 64-bit code is: AMD's processors heed the operand-size prefix.
u8 near_branch_bytes(const Decoded&);
/// What the memory operand's address must be a multiple of, or 0.
u8 required_alignment(const Decoded&, Unit unit, unsigned memory_bytes);
Unit unit_of(const Decoded&);

/// Behind native code: the host's x87 unit holds guest values until the engine returns.
inline void note_x87(Context& c, const Instruction& i) {
  if (i.unit == Unit::x87 || i.unit == Unit::mmx) c.x87_touched = true;
}
/// Raises in the guest what the host raised in its instruction.
x86::Result host_exception(Context&, const Instruction&);
/// Lets the host execute the instruction on its memory operand at `memory`. fault: the host raised an exception.
inline x86::Result run_native(Context& c, const Instruction& i, void* memory) {
  i.native(&c.cpu.state, memory);
  return c.host_exception == Context::no_exception ? x86::Result::ok : host_exception(c, i);
}

/// For an instruction with native code whose mask chooses which elements of its memory operand it accesses.
Handler select_masked(const Decoded&, Instruction&);

/// Whether an x87 instruction reports an exception that waits.
bool waits_for_x87(ZydisMnemonic);
/// x87 instructions that do not count as the unit's last instruction.
bool is_x87_control(ZydisMnemonic);

/// Emits native code for the instruction and points out.native at it.
bool make_native(const Decoded&, Instruction& out, std::span<u8> code);

/// Decodes at most 15 bytes. `code`: room for native code. Returns the status when the bytes end too early.
enum class DecodeStatus : u8 { ok, needs_more };
DecodeStatus decode(const u8* bytes, unsigned available, unsigned code_bits, Instruction& out, std::span<u8> code);

}  // namespace anykvm::engine
