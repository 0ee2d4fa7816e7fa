// What the guest's processors say of themselves: CPUID, and the few MSRs that firmware sets.
#pragma once

#include "anykvm/anykvm.h"

namespace anykvm::vmm {

/// The CPUID of vCPU `id` of `count`: all that KVM supports, with the topology of one socket of `count` cores.
std::vector<kvm_cpuid_entry2> cpuid_of(const Kvm& kvm, unsigned id, unsigned count);

/// What a processor has in its MSRs at power-on and KVM leaves to its user. An MSR that this KVM does not have stays
/// out.
void set_power_on_state(Vcpu& vcpu);

/// What firmware leaves in the MSRs and in the local APIC, for a machine that has none.
void set_firmware_state(Vcpu& vcpu);

}  // namespace anykvm::vmm
