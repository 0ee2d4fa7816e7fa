// FpuState piece by piece as the XSAVE area holds it.
#pragma once

#include "x86/xsave.h"

namespace anykvm::x86 {

/// Bytes of the legacy region that x87 state owns: two runs around MXCSR and its mask.
inline constexpr unsigned x87_control_size = 24, x87_stack_offset = 32, x87_stack_size = 128;
inline constexpr unsigned mxcsr_offset = 24, xmm_offset = 160;

/// Extended components (AVX and later). `vectors`: registers that the mode reaches, 8 or 16.
void store_component(const FpuState& fpu, unsigned index, unsigned vectors, u8* out);
void load_component(FpuState& fpu, unsigned index, unsigned vectors, const u8* in);

/// x87 control words as the save instructions write them: 24 bytes. `wide`: 64-bit instruction and data pointers
/// (REX.W) where there are selectors otherwise.
void store_x87_control(const FpuState& fpu, bool wide, u8* out);
void load_x87_control(FpuState& fpu, bool wide, const u8* in);
/// What the processor does to the control and status words that it loads: bits which nothing can change, and ES and B,
/// which say whether an unmasked exception waits.
void settle_x87_words(FpuState& fpu);
void init_x87(FpuState& fpu);

}  // namespace anykvm::x86
