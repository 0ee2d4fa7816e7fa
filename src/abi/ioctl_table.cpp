#include "abi/ioctl_table.h"

#include <algorithm>
#include <array>
#include <cerrno>

#include "abi/typed_call.h"
#include "abi/variable_calls.h"
#include "anykvm/kvm.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::abi {
namespace {

using vcpu::Vcpu;
using vm::Vm;

/// A row whose handler is written out: the structure of its argument, or void.
template <class T>
consteval Ioctl written(FdKind fd, u32 number, std::string_view name, Argument argument, std::string_view capability,
                        long (*handler)(const Call&)) {
  return {number, name, fd, argument, type_name<T>(), sizeof(T), capability, handler};
}
consteval Ioctl written(FdKind fd, u32 number, std::string_view name, Argument argument, std::string_view type,
                        std::string_view capability, long (*handler)(const Call&)) {
  return {number, name, fd, argument, type, 0, capability, handler};
}

// A number, and its name as text.
#define NAMED(number) number, #number
// A row from a typed method.
#define TYPED(form, number, method, capability) form<number, method>(#number, capability)

constexpr std::string_view basic = "";
using enum Argument;
using enum FdKind;

constexpr auto sorted(auto rows) {
  std::ranges::sort(rows, {}, [](const Ioctl& row) { return u64(row.fd) << 32 | row.number; });
  return rows;
}

// clang-format off
constexpr auto table = sorted(std::to_array<Ioctl>({
    written(system, NAMED(KVM_GET_API_VERSION), none, "", basic, get_api_version),
    written(system, NAMED(KVM_CREATE_VM), value, "u64", basic, create_vm),
    written(system, NAMED(KVM_CHECK_EXTENSION), value, "u64", basic, check_system_extension),
    written(system, NAMED(KVM_GET_VCPU_MMAP_SIZE), none, "", basic, get_vcpu_mmap_size),
    written<kvm_msr_list>(system, NAMED(KVM_GET_MSR_INDEX_LIST), in_out, basic, get_msr_index_list),
    written<kvm_msr_list>(system, NAMED(KVM_GET_MSR_FEATURE_INDEX_LIST), in_out, "KVM_CAP_GET_MSR_FEATURES", get_msr_feature_index_list),
    written<kvm_msrs>(system, NAMED(KVM_GET_MSRS), in_out, "KVM_CAP_GET_MSR_FEATURES", get_feature_msrs),
    written<kvm_cpuid2>(system, NAMED(KVM_GET_SUPPORTED_CPUID), in_out, "KVM_CAP_EXT_CPUID", get_supported_cpuid),
    written<kvm_cpuid2>(system, NAMED(KVM_GET_EMULATED_CPUID), in_out, "KVM_CAP_EXT_EMUL_CPUID", get_emulated_cpuid),
    written<u64>(system, NAMED(KVM_X86_GET_MCE_CAP_SUPPORTED), out, "KVM_CAP_MCE", get_mce_cap_supported),
    written<kvm_device_attr>(system, NAMED(KVM_HAS_DEVICE_ATTR), in, "KVM_CAP_SYS_ATTRIBUTES", has_system_attr),
    written<kvm_device_attr>(system, NAMED(KVM_GET_DEVICE_ATTR), in, "KVM_CAP_SYS_ATTRIBUTES", get_system_attr),

    written(vm, NAMED(KVM_CHECK_EXTENSION), value, "u64", "KVM_CAP_CHECK_EXTENSION_VM", check_vm_extension),
    written(vm, NAMED(KVM_CREATE_VCPU), value, "u64", basic, create_vcpu),
    TYPED(by_pointer, KVM_SET_USER_MEMORY_REGION, &Vm::set_user_memory_region, "KVM_CAP_USER_MEMORY"),
    TYPED(by_pointer, KVM_SET_USER_MEMORY_REGION2, &Vm::set_user_memory_region2, "KVM_CAP_USER_MEMORY2"),
    TYPED(by_pointer, KVM_CLEAR_DIRTY_LOG, &Vm::clear_dirty_log, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    TYPED(by_value, KVM_SET_NR_MMU_PAGES, &Vm::set_nr_mmu_pages, "KVM_CAP_MMU_SHADOW_CACHE_CONTROL"),
    TYPED(plain, KVM_GET_STATS_FD, &Vm::get_stats_fd, "KVM_CAP_BINARY_STATS_FD"),
    TYPED(by_pointer, KVM_CREATE_DEVICE, &Vm::create_device, "KVM_CAP_DEVICE_CTRL"),
    TYPED(by_pointer, KVM_GET_DIRTY_LOG, &Vm::get_dirty_log, basic),
    TYPED(by_value, KVM_SET_TSS_ADDR, &Vm::set_tss_addr, "KVM_CAP_SET_TSS_ADDR"),
    written<u64>(vm, NAMED(KVM_SET_IDENTITY_MAP_ADDR), in, "KVM_CAP_SET_IDENTITY_MAP_ADDR", set_identity_map_addr),
    TYPED(by_value, KVM_SET_BOOT_CPU_ID, &Vm::set_boot_cpu_id, "KVM_CAP_SET_BOOT_CPU_ID"),
    TYPED(by_pointer, KVM_X86_SET_MSR_FILTER, &Vm::x86_set_msr_filter, "KVM_CAP_X86_MSR_FILTER"),
    TYPED(plain, KVM_CREATE_IRQCHIP, &Vm::create_irqchip, "KVM_CAP_IRQCHIP"),
    TYPED(by_pointer, KVM_GET_IRQCHIP, &Vm::get_irqchip, "KVM_CAP_IRQCHIP"),
    TYPED(by_pointer, KVM_SET_IRQCHIP, &Vm::set_irqchip, "KVM_CAP_IRQCHIP"),
    TYPED(by_pointer, KVM_IRQ_LINE, &Vm::irq_line, "KVM_CAP_IRQCHIP"),
    TYPED(by_pointer, KVM_IRQ_LINE_STATUS, &Vm::irq_line_status, "KVM_CAP_IRQ_INJECT_STATUS"),
    TYPED(plain, KVM_CREATE_PIT, &Vm::create_pit, "KVM_CAP_PIT"),
    TYPED(by_pointer, KVM_GET_PIT, &Vm::get_pit, "KVM_CAP_PIT"),
    TYPED(by_pointer, KVM_SET_PIT, &Vm::set_pit, "KVM_CAP_PIT"),
    TYPED(by_pointer, KVM_CREATE_PIT2, &Vm::create_pit2, "KVM_CAP_PIT2"),
    TYPED(by_pointer, KVM_GET_PIT2, &Vm::get_pit2, "KVM_CAP_PIT_STATE2"),
    TYPED(by_pointer, KVM_SET_PIT2, &Vm::set_pit2, "KVM_CAP_PIT_STATE2"),
    TYPED(by_pointer, KVM_REINJECT_CONTROL, &Vm::reinject_control, "KVM_CAP_REINJECT_CONTROL"),
    written<kvm_irq_routing>(vm, NAMED(KVM_SET_GSI_ROUTING), in, "KVM_CAP_IRQ_ROUTING", set_gsi_routing),
    TYPED(by_pointer, KVM_SIGNAL_MSI, &Vm::signal_msi, "KVM_CAP_SIGNAL_MSI"),
    TYPED(by_pointer, KVM_IRQFD, &Vm::irqfd, "KVM_CAP_IRQFD"),
    TYPED(by_pointer, KVM_IOEVENTFD, &Vm::ioeventfd, "KVM_CAP_IOEVENTFD"),
    TYPED(by_pointer, KVM_REGISTER_COALESCED_MMIO, &Vm::register_coalesced_mmio, "KVM_CAP_COALESCED_MMIO"),
    TYPED(by_pointer, KVM_UNREGISTER_COALESCED_MMIO, &Vm::unregister_coalesced_mmio, "KVM_CAP_COALESCED_MMIO"),
    TYPED(by_pointer, KVM_GET_CLOCK, &Vm::get_clock, "KVM_CAP_ADJUST_CLOCK"),
    TYPED(by_pointer, KVM_SET_CLOCK, &Vm::set_clock, "KVM_CAP_ADJUST_CLOCK"),
    TYPED(plain, KVM_GET_TSC_KHZ, &Vm::get_tsc_khz, "KVM_CAP_VM_TSC_CONTROL"),
    TYPED(by_value, KVM_SET_TSC_KHZ, &Vm::set_tsc_khz, "KVM_CAP_VM_TSC_CONTROL"),
    TYPED(by_pointer, KVM_ENABLE_CAP, &Vm::enable_cap, "KVM_CAP_ENABLE_CAP_VM"),

    written(vcpu, NAMED(KVM_RUN), none, "", basic, run),
    TYPED(by_pointer, KVM_GET_REGS, &Vcpu::get_regs, basic),
    TYPED(by_pointer, KVM_SET_REGS, &Vcpu::set_regs, basic),
    TYPED(by_pointer, KVM_GET_SREGS, &Vcpu::get_sregs, basic),
    TYPED(by_pointer, KVM_SET_SREGS, &Vcpu::set_sregs, basic),
    TYPED(by_pointer, KVM_GET_SREGS2, &Vcpu::get_sregs2, "KVM_CAP_SREGS2"),
    TYPED(by_pointer, KVM_SET_SREGS2, &Vcpu::set_sregs2, "KVM_CAP_SREGS2"),
    TYPED(by_pointer, KVM_GET_FPU, &Vcpu::get_fpu, basic),
    TYPED(by_pointer, KVM_SET_FPU, &Vcpu::set_fpu, basic),
    written<kvm_xsave>(vcpu, NAMED(KVM_GET_XSAVE), out, "KVM_CAP_XSAVE", get_xsave),
    written<kvm_xsave>(vcpu, NAMED(KVM_SET_XSAVE), in, "KVM_CAP_XSAVE", set_xsave),
    written<kvm_xsave>(vcpu, NAMED(KVM_GET_XSAVE2), out, "KVM_CAP_XSAVE2", get_xsave2),
    TYPED(by_pointer, KVM_SET_GUEST_DEBUG, &Vcpu::set_guest_debug, "KVM_CAP_SET_GUEST_DEBUG"),
    TYPED(by_pointer, KVM_GET_XCRS, &Vcpu::get_xcrs, "KVM_CAP_XCRS"),
    TYPED(by_pointer, KVM_SET_XCRS, &Vcpu::set_xcrs, "KVM_CAP_XCRS"),
    written<kvm_msrs>(vcpu, NAMED(KVM_GET_MSRS), in_out, basic, get_msrs),
    written<kvm_msrs>(vcpu, NAMED(KVM_SET_MSRS), in, basic, set_msrs),
    TYPED(by_pointer, KVM_GET_LAPIC, &Vcpu::get_lapic, "KVM_CAP_IRQCHIP"),
    written<kvm_lapic_state>(vcpu, NAMED(KVM_SET_LAPIC), in, "KVM_CAP_IRQCHIP", set_lapic),
    TYPED(by_pointer, KVM_GET_MP_STATE, &Vcpu::get_mp_state, "KVM_CAP_MP_STATE"),
    TYPED(by_pointer, KVM_SET_MP_STATE, &Vcpu::set_mp_state, "KVM_CAP_MP_STATE"),
    TYPED(by_pointer, KVM_GET_VCPU_EVENTS, &Vcpu::get_vcpu_events, "KVM_CAP_VCPU_EVENTS"),
    TYPED(by_pointer, KVM_SET_VCPU_EVENTS, &Vcpu::set_vcpu_events, "KVM_CAP_VCPU_EVENTS"),
    TYPED(by_pointer, KVM_GET_DEBUGREGS, &Vcpu::get_debugregs, "KVM_CAP_DEBUGREGS"),
    TYPED(by_pointer, KVM_SET_DEBUGREGS, &Vcpu::set_debugregs, "KVM_CAP_DEBUGREGS"),
    written<kvm_cpuid>(vcpu, NAMED(KVM_SET_CPUID), in, basic, set_cpuid),
    written<kvm_cpuid2>(vcpu, NAMED(KVM_SET_CPUID2), in, "KVM_CAP_EXT_CPUID", set_cpuid2),
    written<kvm_cpuid2>(vcpu, NAMED(KVM_GET_CPUID2), in_out, "KVM_CAP_EXT_CPUID", get_cpuid2),
    written<kvm_pre_fault_memory>(vcpu, NAMED(KVM_PRE_FAULT_MEMORY), in_out, "KVM_CAP_PRE_FAULT_MEMORY", pre_fault_memory),
    TYPED(by_pointer, KVM_TRANSLATE, &Vcpu::translate, basic),
    TYPED(by_pointer, KVM_INTERRUPT, &Vcpu::interrupt, basic),
    TYPED(plain, KVM_NMI, &Vcpu::nmi, "KVM_CAP_USER_NMI"),
    written<kvm_signal_mask>(vcpu, NAMED(KVM_SET_SIGNAL_MASK), in, basic, set_signal_mask),
    TYPED(plain, KVM_GET_TSC_KHZ, &Vcpu::get_tsc_khz, "KVM_CAP_GET_TSC_KHZ"),
    TYPED(by_value, KVM_SET_TSC_KHZ, &Vcpu::set_tsc_khz, "KVM_CAP_TSC_CONTROL"),
    written<kvm_device_attr>(vcpu, NAMED(KVM_HAS_DEVICE_ATTR), in, "KVM_CAP_VCPU_ATTRIBUTES", has_vcpu_attr),
    written<kvm_device_attr>(vcpu, NAMED(KVM_GET_DEVICE_ATTR), in, "KVM_CAP_VCPU_ATTRIBUTES", get_vcpu_attr),
    written<kvm_device_attr>(vcpu, NAMED(KVM_SET_DEVICE_ATTR), in, "KVM_CAP_VCPU_ATTRIBUTES", set_vcpu_attr),
    TYPED(by_pointer, KVM_X86_SETUP_MCE, &Vcpu::x86_setup_mce, "KVM_CAP_MCE"),
    TYPED(by_pointer, KVM_X86_SET_MCE, &Vcpu::x86_set_mce, "KVM_CAP_MCE"),
    written<kvm_vapic_addr>(vcpu, NAMED(KVM_SET_VAPIC_ADDR), in, "KVM_CAP_VAPIC", set_vapic_addr),
    TYPED(by_pointer, KVM_TPR_ACCESS_REPORTING, &Vcpu::tpr_access_reporting, "KVM_CAP_VAPIC"),
    TYPED(plain, KVM_KVMCLOCK_CTRL, &Vcpu::kvmclock_ctrl, "KVM_CAP_KVMCLOCK_CTRL"),
    TYPED(plain, KVM_GET_STATS_FD, &Vcpu::get_stats_fd, "KVM_CAP_BINARY_STATS_FD"),
    TYPED(by_pointer, KVM_ENABLE_CAP, &Vcpu::enable_cap, "KVM_CAP_ENABLE_CAP"),
}));
// clang-format on

#undef NAMED
#undef TYPED

constexpr bool no_duplicates() {
  for (std::size_t i = 1; i < table.size(); ++i)
    if (table[i - 1].fd == table[i].fd && table[i - 1].number == table[i].number) return false;
  return true;
}
static_assert(no_duplicates());

/// Where each kind of descriptor begins.
constexpr std::span<const Ioctl> rows_of(FdKind fd) {
  const auto first = std::ranges::find(table, fd, &Ioctl::fd);
  const auto last = std::ranges::find_if(first, table.end(), [fd](const Ioctl& row) { return row.fd != fd; });
  return {first, last};
}
constexpr std::span<const Ioctl> rows[] = {rows_of(system), rows_of(vm), rows_of(vcpu)};

}  // namespace

std::span<const Ioctl> ioctls() { return table; }

const Ioctl* find_ioctl(FdKind fd, u32 number) {
  const std::span<const Ioctl> candidates = rows[static_cast<unsigned>(fd)];
  const auto found = std::ranges::lower_bound(candidates, number, {}, &Ioctl::number);
  return found != candidates.end() && found->number == number ? &*found : nullptr;
}

int unknown_ioctl_error(FdKind fd, u32 number) {
  // A kernel without system management mode knows the number all the same.
  const bool is_smi = fd == FdKind::vcpu && number == KVM_SMI;
  return fd == FdKind::vm || is_smi ? -ENOTTY : -EINVAL;
}

std::string_view to_string(FdKind fd) {
  switch (fd) {
    case FdKind::system: return "system";
    case FdKind::vm: return "vm";
    case FdKind::vcpu: return "vcpu";
  }
  return "";
}

std::string_view to_string(Argument argument) {
  switch (argument) {
    case Argument::none: return "none";
    case Argument::value: return "value";
    case Argument::in: return "in";
    case Argument::out: return "out";
    case Argument::in_out: return "in/out";
  }
  return "";
}

}  // namespace anykvm::abi
