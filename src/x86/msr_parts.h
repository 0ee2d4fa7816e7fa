// What the files behind x86/msr.h share: each knows the MSRs of one subject, and says `unknown` for the rest.
#pragma once

#include "x86/cpu.h"
#include "x86/msr.h"

namespace anykvm::x86 {

enum class MsrAccess : u8 { done, refused, unknown };

constexpr MsrAccess allow_if(bool condition) { return condition ? MsrAccess::done : MsrAccess::refused; }

/// PAT and MTRRs (msr_memory_types.cpp).
MsrAccess get_memory_type_msr(const Cpu& cpu, u32 index, u64& value);
MsrAccess set_memory_type_msr(Cpu& cpu, u32 index, u64 value);
/// MCG_* and the banks (msr_machine_check.cpp).
MsrAccess get_machine_check_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator);
MsrAccess set_machine_check_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator);
/// Side channel controls, microcode revision, what a CPU says about itself (msr_cpu_model.cpp).
MsrAccess get_model_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator);
MsrAccess set_model_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator);

}  // namespace anykvm::x86
