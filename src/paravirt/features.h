// What KVM's feature leaf (0x40000001 EAX) offers: what paravirt/ implements and a guest gains by. PV_SCHED_YIELD is
// not among it: the hypercall answers, but a vCPU thread has no system call to yield with that every client's seccomp
// filter lets through.
#pragma once

#include <asm/kvm_para.h>

#include "x86/types.h"

namespace anykvm::paravirt {

inline constexpr u32 offered_features =
    1u << KVM_FEATURE_CLOCKSOURCE | 1u << KVM_FEATURE_NOP_IO_DELAY | 1u << KVM_FEATURE_CLOCKSOURCE2 |
    1u << KVM_FEATURE_STEAL_TIME | 1u << KVM_FEATURE_ASYNC_PF | 1u << KVM_FEATURE_ASYNC_PF_VMEXIT |
    1u << KVM_FEATURE_ASYNC_PF_INT | 1u << KVM_FEATURE_PV_EOI | 1u << KVM_FEATURE_PV_UNHALT |
    1u << KVM_FEATURE_PV_TLB_FLUSH | 1u << KVM_FEATURE_PV_SEND_IPI | 1u << KVM_FEATURE_POLL_CONTROL |
    1u << KVM_FEATURE_CLOCKSOURCE_STABLE_BIT;

}  // namespace anykvm::paravirt
