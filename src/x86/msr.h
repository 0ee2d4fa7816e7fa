// The architectural MSRs: those whose value is CPU state (MsrState). Cpu::read_msr and Cpu::write_msr are RDMSR and
// WRMSR; this is what they, KVM_GET_MSRS and KVM_SET_MSRS share. The local APIC's and the paravirtual MSRs belong to
// irqchip/lapic.h and paravirt/paravirt.h: the vCPU asks those first, then this.
// Reference: Intel SDM volume 4; AMD64 manual volume 2 appendix A; Documentation/virt/kvm/api.rst 4.3, 4.18.
#pragma once

#include <span>

#include "x86/types.h"

namespace anykvm::x86 {

class Cpu;

/// Who accesses an MSR. The guest sees what its CPUID offers; the host (an ioctl) may restore anything, also read-only
/// ones.
enum class Initiator : u8 { guest, host };

/// false: no such MSR, or not this value: #GP for the guest, the end of the list for KVM_GET/SET_MSRS.
bool get_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator);
bool set_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator);

/// Whether there is an MSR with this number at all, whoever may read it.
bool is_known_msr(const Cpu& cpu, u32 index);

/// KVM_GET_MSR_INDEX_LIST: every MSR that holds state, the local APIC's and the paravirtual ones included.
std::span<const u32> msr_index_list();
/// KVM_GET_MSR_FEATURE_INDEX_LIST, and KVM_GET_MSRS on the system fd.
std::span<const u32> msr_feature_index_list();
bool get_feature_msr(u32 index, u64& value);

/// KVM_CHECK_EXTENSION(KVM_CAP_MCE), KVM_X86_GET_MCE_CAP_SUPPORTED (MCG_CTL_P, MCG_CMCI_P, MCG_SER_P),
/// KVM_X86_SETUP_MCE (-EINVAL: no such capability, or no banks).
inline constexpr unsigned mc_banks = 32;
inline constexpr u64 mce_cap_cmci = 1 << 10, mce_cap_supported = 1ull << 8 | mce_cap_cmci | 1ull << 24;
int setup_mce(Cpu& cpu, u64 mcg_cap);

/// The values of a new vCPU's MSRs that are not 0; Cpu::reset calls it.
struct MsrState;
void reset_msrs(MsrState& msr);

/// The fixed point of CpuState::tsc_ratio: guest TSC = host TSC * ratio >> 48 + offset.
inline constexpr unsigned tsc_ratio_bits = 48;
/// The guest's TSC at a host TSC value.
struct CpuState;
u64 guest_tsc(const CpuState& state, u64 host_tsc);

}  // namespace anykvm::x86
