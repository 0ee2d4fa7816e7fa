// The rules for CR4 and XCR0 values, for MOV CR, XSETBV and the ioctls that set them.
#pragma once

#include "x86/cpu.h"

namespace anykvm::x86 {

/// CR4 bits that some guest can have; everything else is reserved for all.
inline constexpr u64 cr4_supported = cr4::vme | cr4::pvi | cr4::tsd | cr4::de | cr4::pse | cr4::pae | cr4::mce |
                                     cr4::pge | cr4::pce | cr4::osfxsr | cr4::osxmmexcpt | cr4::umip | cr4::fsgsbase |
                                     cr4::pcide | cr4::osxsave | cr4::smep | cr4::smap | cr4::pke | cr4::la57;

/// CR4 bits that this guest's CPUID reserves. Without CPUID (before KVM_SET_CPUID2) it may have all that are supported.
u64 cr4_reserved(const Cpu& cpu);

/// CR0, CR3 and CR4 bits that no guest can set.
inline constexpr u64 cr0_known =
    cr0::pe | cr0::mp | cr0::em | cr0::ts | cr0::et | cr0::ne | cr0::wp | cr0::am | cr0::nw | cr0::cd | cr0::pg;
u64 cr3_reserved(const Cpu& cpu, bool long_mode);

/// Whether XSETBV accepts the value for XCR0.
bool valid_xcr0(const Cpu& cpu, u64 value);

}  // namespace anykvm::x86
