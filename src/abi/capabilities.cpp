#include "abi/capabilities.h"

#include <linux/kvm_para.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "abi/limits.h"
#include "anykvm/kvm.h"
#include "vm/vm.h"
#include "x86/cpuid.h"
#include "x86/msr.h"
#include "x86/xsave.h"

namespace anykvm::abi {
namespace {

template <int number>
int constant() {
  return number;
}

int online_cpus() { return static_cast<int>(std::clamp<long>(sysconf(_SC_NPROCESSORS_ONLN), 1, vm::Vm::max_vcpus)); }

#define NAMED(number) number, #number

constexpr auto sorted(auto rows) {
  std::ranges::sort(rows, {}, &Capability::number);
  return rows;
}

constexpr auto table = sorted(std::to_array<Capability>({
    // memory
    {NAMED(KVM_CAP_USER_MEMORY), constant<1>},
    {NAMED(KVM_CAP_DESTROY_MEMORY_REGION_WORKS), constant<1>},
    {NAMED(KVM_CAP_JOIN_MEMORY_REGIONS_WORKS), constant<1>},
    {NAMED(KVM_CAP_NR_MEMSLOTS), constant<vm::MemorySlots::max_slots>},
    {NAMED(KVM_CAP_READONLY_MEM), constant<1>},
    {NAMED(KVM_CAP_SYNC_MMU), constant<1>},
    {NAMED(KVM_CAP_USER_MEMORY2), constant<1>},
    {NAMED(KVM_CAP_PRE_FAULT_MEMORY), constant<1>},
    {NAMED(KVM_CAP_MEMORY_FAULT_INFO), constant<1>},
    {NAMED(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
     constant<KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET>},
    {NAMED(KVM_CAP_MMU_SHADOW_CACHE_CONTROL), constant<1>},
    {NAMED(KVM_CAP_SET_TSS_ADDR), constant<1>},
    {NAMED(KVM_CAP_SET_IDENTITY_MAP_ADDR), constant<1>},
    // vCPUs
    {NAMED(KVM_CAP_NR_VCPUS), online_cpus},
    {NAMED(KVM_CAP_MAX_VCPUS), constant<vm::Vm::max_vcpus>},
    {NAMED(KVM_CAP_MAX_VCPU_ID), constant<vm::Vm::max_vcpu_ids>},
    {NAMED(KVM_CAP_SET_BOOT_CPU_ID), constant<1>},
    {NAMED(KVM_CAP_HLT), constant<1>},
    {NAMED(KVM_CAP_HALT_POLL), constant<1>},
    {NAMED(KVM_CAP_MCE), constant<x86::mc_banks>},
    {NAMED(KVM_CAP_VAPIC), constant<1>},
    {NAMED(KVM_CAP_NOP_IO_DELAY), constant<1>},
    {NAMED(KVM_CAP_IMMEDIATE_EXIT), constant<1>},
    {NAMED(KVM_CAP_INTERNAL_ERROR_DATA), constant<1>},
    {NAMED(KVM_CAP_SYSTEM_EVENT_DATA), constant<1>},
    {NAMED(KVM_CAP_LAST_CPU), constant<1>},
    {NAMED(KVM_CAP_X86_GUEST_MODE), constant<1>},
    {NAMED(KVM_CAP_MP_STATE), constant<1>},
    {NAMED(KVM_CAP_VCPU_EVENTS), constant<1>},
    {NAMED(KVM_CAP_USER_NMI), constant<1>},
    {NAMED(KVM_CAP_DEBUGREGS), constant<1>},
    {NAMED(KVM_CAP_SET_GUEST_DEBUG), constant<1>},
    {NAMED(KVM_CAP_SET_GUEST_DEBUG2),
     constant<KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_USE_SW_BP |
              KVM_GUESTDBG_INJECT_BP | KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_BLOCKIRQ>},
    {NAMED(KVM_CAP_X86_ROBUST_SINGLESTEP), constant<1>},
    {NAMED(KVM_CAP_X86_MSR_FILTER), constant<1>},
    {NAMED(KVM_CAP_X86_USER_SPACE_MSR), constant<1>},
    {NAMED(KVM_CAP_X86_DISABLE_EXITS), constant<KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_HLT>},
    {NAMED(KVM_CAP_EXIT_ON_EMULATION_FAILURE), constant<1>},
    {NAMED(KVM_CAP_SREGS2), constant<1>},
    {NAMED(KVM_CAP_XSAVE), constant<1>},
    {NAMED(KVM_CAP_XSAVE2), [] { return static_cast<int>(xsave2_size()); }},
    {NAMED(KVM_CAP_XCRS), constant<1>},
    {NAMED(KVM_CAP_EXT_CPUID), constant<1>},
    {NAMED(KVM_CAP_EXT_EMUL_CPUID), constant<1>},
    {NAMED(KVM_CAP_GET_MSR_FEATURES), constant<1>},
    // interrupts
    {NAMED(KVM_CAP_IRQCHIP), constant<1>},
    {NAMED(KVM_CAP_IRQ_INJECT_STATUS), constant<1>},
    {NAMED(KVM_CAP_IRQ_ROUTING), constant<max_irq_routes>},
    {NAMED(KVM_CAP_SIGNAL_MSI), constant<1>},
    {NAMED(KVM_CAP_IRQFD), constant<1>},
    {NAMED(KVM_CAP_IRQFD_RESAMPLE), constant<1>},
    {NAMED(KVM_CAP_X2APIC_API), constant<KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK>},
    {NAMED(KVM_CAP_X86_APIC_BUS_CYCLES_NS), constant<1>},
    {NAMED(KVM_CAP_SPLIT_IRQCHIP), constant<1>},
    {NAMED(KVM_CAP_COALESCED_MMIO), constant<2>},  // the ring's page behind kvm_run
    {NAMED(KVM_CAP_COALESCED_PIO), constant<1>},
    {NAMED(KVM_CAP_IOEVENTFD), constant<1>},
    {NAMED(KVM_CAP_IOEVENTFD_NO_LENGTH), constant<1>},
    {NAMED(KVM_CAP_IOEVENTFD_ANY_LENGTH), constant<1>},
    {NAMED(KVM_CAP_IOAPIC_POLARITY_IGNORED), constant<1>},
    {NAMED(KVM_CAP_PIT), constant<1>},
    {NAMED(KVM_CAP_PIT2), constant<1>},
    {NAMED(KVM_CAP_PIT_STATE2), constant<1>},
    {NAMED(KVM_CAP_REINJECT_CONTROL), constant<1>},
    {NAMED(KVM_CAP_PCI_SEGMENT), constant<1>},
    // time
    {NAMED(KVM_CAP_CLOCKSOURCE), constant<1>},
    {NAMED(KVM_CAP_ADJUST_CLOCK), constant<KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC>},
    {NAMED(KVM_CAP_GET_TSC_KHZ), constant<1>},
    {NAMED(KVM_CAP_TSC_CONTROL), constant<1>},
    {NAMED(KVM_CAP_VM_TSC_CONTROL), constant<1>},
    {NAMED(KVM_CAP_TSC_DEADLINE_TIMER), constant<1>},
    {NAMED(KVM_CAP_KVMCLOCK_CTRL), constant<1>},
    {NAMED(KVM_CAP_STEAL_TIME), constant<1>},
    {NAMED(KVM_CAP_ASYNC_PF), constant<1>},
    {NAMED(KVM_CAP_ASYNC_PF_INT), constant<1>},
    {NAMED(KVM_CAP_ENFORCE_PV_FEATURE_CPUID), constant<1>},
    {NAMED(KVM_CAP_EXIT_HYPERCALL), constant<1 << KVM_HC_MAP_GPA_RANGE>},
    // the API itself
    {NAMED(KVM_CAP_SYNC_REGS), constant<KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS>},
    {NAMED(KVM_CAP_VM_TYPES), constant<1>},  // KVM_X86_DEFAULT_VM
    {NAMED(KVM_CAP_BINARY_STATS_FD), constant<1>},
    {NAMED(KVM_CAP_DEVICE_CTRL), constant<1>},
    {NAMED(KVM_CAP_SYS_ATTRIBUTES), constant<1>},
    {NAMED(KVM_CAP_VCPU_ATTRIBUTES), constant<1>},
    {NAMED(KVM_CAP_DISABLE_QUIRKS), constant<1>},
    {NAMED(KVM_CAP_DISABLE_QUIRKS2), constant<vm::Vm::quirks>},
    {NAMED(KVM_CAP_MSR_PLATFORM_INFO), constant<1>},
    {NAMED(KVM_CAP_CHECK_EXTENSION_VM), constant<1>},
    {NAMED(KVM_CAP_ENABLE_CAP), constant<1>},
    {NAMED(KVM_CAP_ENABLE_CAP_VM), constant<1>},
    {NAMED(KVM_CAP_EXCEPTION_PAYLOAD), constant<1>},
    {NAMED(KVM_CAP_X86_TRIPLE_FAULT_EVENT), constant<1>},
}));

#undef NAMED

}  // namespace

std::span<const Capability> capabilities() { return table; }

int capability_value(u64 number) {
  const auto found = std::ranges::lower_bound(table, number, {}, &Capability::number);
  return found != table.end() && found->number == number ? found->value() : 0;
}

u32 xsave2_size() { return std::max<u32>(x86::xsave_layout().standard_size(x86::supported_xcr0()), sizeof(kvm_xsave)); }

}  // namespace anykvm::abi
