// What the x87 unit remembers of its last instruction, and the images that FNSTENV, FNSAVE and their likes move.
// Reference: Intel SDM volume 1 section 8.1.8 to 8.1.10; AMD64 manual volume 5 (FNSTENV), volume 2 section 11.4.
#pragma once

#include "x86/state.h"

namespace anykvm::x86 {

/// Where processors differ; the guest's x87 unit is the host's.
struct X87Behaviour {
  bool drops_pointers;    ///< FXSAVE and XSAVE write 0 for the pointers unless an exception waits (AMD)
  bool keeps_selectors;   ///< FCS and FDS exist
  bool operand_if_fault;  ///< FDP moves only when an unmasked exception came up
  bool opcode_if_fault;   ///< so does FOP (Intel)
  u8 pointer_bits;        ///< of FIP and FDP as FXRSTOR64 loads them: the upper ones become copies of the highest
};
const X87Behaviour& x87_behaviour();

/// A non-control instruction has been executed: `code` at cs:`rip`, `operand` (if any) at data:`offset`.
struct X87Instruction {
  u16 opcode;  ///< its 11 bits
  u16 code_selector;
  u64 rip;
  bool has_operand;
  u16 data_selector;
  u64 offset;
};
/// fault: an unmasked exception waits since then.
void note_x87_instruction(FpuState& fpu, const X87Instruction& last, bool fault);
inline bool x87_exception_waits(const FpuState& fpu) { return fpu.x87[2] & 0x80; }

/// The environment: control, status and tag words, pointers. Its layout follows the mode and the operand size.
struct X87Format {
  bool wide;            ///< 32-bit
  bool protected_mode;  ///< selectors and offsets, not linear addresses
  unsigned size() const { return wide ? 28 : 14; }
};
void store_x87_environment(const FpuState& fpu, X87Format format, u8* out);
void load_x87_environment(FpuState& fpu, X87Format format, const u8* in);

/// The registers behind it, ST(0) first: 80 bytes.
inline constexpr unsigned x87_registers_size = 80;
void store_x87_registers(const FpuState& fpu, u8* out);
void load_x87_registers(FpuState& fpu, const u8* in);

}  // namespace anykvm::x86
