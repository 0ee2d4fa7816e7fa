// The ioctls whose argument is not one structure of fixed size, those that make descriptors or belong to no VM, and
// those that look at the machine before they look at their argument.
#pragma once

#include "abi/ioctl_table.h"

namespace anykvm::abi {

// --- system (system_calls.cpp)
// ----------------------------------------------------------------------------------------
long get_api_version(const Call& call);
long create_vm(const Call& call);
long check_system_extension(const Call& call);
long get_vcpu_mmap_size(const Call& call);
long get_msr_index_list(const Call& call);
long get_msr_feature_index_list(const Call& call);
long get_supported_cpuid(const Call& call);
long get_emulated_cpuid(const Call& call);
long get_feature_msrs(const Call& call);
long get_mce_cap_supported(const Call& call);
long has_system_attr(const Call& call);
long get_system_attr(const Call& call);

// --- VM (vm_calls.cpp)
// ------------------------------------------------------------------------------------------------
long check_vm_extension(const Call& call);
long create_vcpu(const Call& call);
long set_identity_map_addr(const Call& call);
long set_gsi_routing(const Call& call);

// --- vCPU (vcpu_calls.cpp)
// --------------------------------------------------------------------------------------------
long run(const Call& call);
long set_cpuid(const Call& call);
long set_cpuid2(const Call& call);
long get_cpuid2(const Call& call);
long get_msrs(const Call& call);
long set_msrs(const Call& call);
long set_lapic(const Call& call);
long set_vapic_addr(const Call& call);
long pre_fault_memory(const Call& call);
long set_signal_mask(const Call& call);
long get_xsave(const Call& call);
long set_xsave(const Call& call);
long get_xsave2(const Call& call);
long has_vcpu_attr(const Call& call);
long get_vcpu_attr(const Call& call);
long set_vcpu_attr(const Call& call);

}  // namespace anykvm::abi
