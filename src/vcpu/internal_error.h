// The line about an internal error that a person can paste into a bug report: where, in which mode, which instruction,
// and what of it is not there.
#pragma once

#include <cstddef>
#include <span>

#include "x86/cpu.h"

namespace anykvm::vcpu {

/// Writes the line, with its end, into `out`; its length. No allocation, no lock.
std::size_t describe_internal_error(const x86::Cpu& cpu, u32 vcpu, std::span<char> out);

/// What the processor is in: "real mode", "64-bit mode", ... A literal.
const char* mode_name(const x86::Cpu& cpu);

/// The line to stderr, when that is a terminal or `anykvm run` has asked for it (ANYKVM_ERRORS).
void tell_internal_error(const x86::Cpu& cpu, u32 vcpu);

}  // namespace anykvm::vcpu
