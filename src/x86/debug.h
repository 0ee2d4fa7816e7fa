// Bits of DR6 and DR7, and what the TLB asks of x86/debug.cpp.
#pragma once

#include "x86/cpu.h"

namespace anykvm::x86 {

inline constexpr u64 dr6_fixed = 0xffff0ff0, dr6_writable = 0xe00f;
inline constexpr u64 dr6_bd = 1u << 13, dr6_bs = 1u << 14, dr6_bt = 1u << 15;
inline constexpr u64 dr7_fixed = 0x400, dr7_writable = 0xffff2bff, dr7_gd = 1u << 13;
/// IA32_DEBUGCTL.BTF: TF traps behind taken branches only.
inline constexpr u64 debugctl_btf = 1u << 1;

/// Whether a data breakpoint lies on the page of gva.
bool page_is_watched(const Cpu& cpu, Gva gva);

}  // namespace anykvm::x86
