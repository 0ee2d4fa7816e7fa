// Topology leaves after the Intel SDM, volume 2, CPUID, and AMD's APM, volume 3, appendix E.
#include "vmm/cpu_model.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "x86/types.h"

namespace anykvm::vmm {

std::vector<kvm_cpuid_entry2> cpuid_of(const Kvm& kvm, unsigned id, unsigned count) {
  auto entries = kvm.supported_cpuid();
  // KVM lists only subleaf 0 of the topology leaves; the level of cores is ours to add.
  for (const u32 leaf : {0xbu, 0x1fu}) {
    const auto is = [&](u32 index) {
      return [=](const kvm_cpuid_entry2& e) { return e.function == leaf && e.index == index; };
    };
    const auto first = std::ranges::find_if(entries, is(0));
    if (first == entries.end() || std::ranges::any_of(entries, is(1))) continue;
    kvm_cpuid_entry2 cores = *first;
    cores.index = 1;
    entries.insert(first + 1, cores);
  }
  const unsigned id_bits = unsigned(std::bit_width(count - 1));
  const bool has_deadline_timer = kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0;
  for (kvm_cpuid_entry2& entry : entries) {
    switch (entry.function) {
      case 0x1:
        entry.ebx = (entry.ebx & 0xff00) | std::min(count, 255u) << 16 | (id & 0xff) << 24 | (entry.ebx & 0xff);
        entry.edx = (entry.edx & ~(1u << 28)) | (count > 1 ? 1u << 28 : 0);
        // KVM tells of the deadline timer by the capability alone: it depends on the interrupt chip.
        if (has_deadline_timer) entry.ecx |= 1u << 24;
        entry.ecx |= 1u << 31;  // a hypervisor is present
        break;
      case 0x4:  // caches: none is shared but the last level
        if ((entry.eax & 0x1f) == 0) break;
        entry.eax = (entry.eax & 0x3fff) | ((1u << id_bits) - 1) << 26;
        if ((entry.eax >> 5 & 7) == 3) entry.eax |= ((1u << id_bits) - 1) << 14;
        break;
      case 0xb:
      case 0x1f:
        // Level 0: threads of a core, one. Level 1: cores of the package.
        entry.eax = entry.index == 1 ? id_bits : 0;
        entry.ebx = entry.index == 0 ? 1 : entry.index == 1 ? count : 0;
        entry.ecx = entry.index | (entry.index == 0 ? 1u << 8 : entry.index == 1 ? 2u << 8 : 0);
        entry.edx = id;
        break;
      case 0x8000'0008: entry.ecx = ((count - 1) & 0xff) | id_bits << 12; break;
      case 0x8000'001e:
        entry.eax = id;
        entry.ebx = id & 0xff;
        entry.ecx = 0;
        break;
      default: break;
    }
  }
  return entries;
}

void set_power_on_state(Vcpu& vcpu) {
  constexpr u32 misc_enable = 0x1a0, amd_hardware_configuration = 0xc001'0015;
  const kvm_msr_entry msrs[] = {
      {.index = misc_enable, .data = 1},                       // fast strings
      {.index = amd_hardware_configuration, .data = 1 << 24},  // the TSC counts at P0's frequency
  };
  for (const kvm_msr_entry& entry : msrs) vcpu.set_msrs({&entry, 1});
}

void set_firmware_state(Vcpu& vcpu) {
  constexpr u32 mtrr_default_type = 0x2ff;
  // Enabled, write-back: without, the guest leaves the PAT alone.
  const kvm_msr_entry memory_types{.index = mtrr_default_type, .data = 1 << 11 | 6};
  vcpu.set_msrs({&memory_types, 1});

  // The local APIC's pins: the 8259s on LINT0 of the boot processor, NMI on LINT1 of all.
  constexpr unsigned lvt_lint0 = 0x350, lvt_lint1 = 0x360;
  constexpr u32 masked = 1 << 16, mode_nmi = 4 << 8, mode_extint = 7 << 8;
  auto lapic = vcpu.lapic();
  const auto set = [&](unsigned offset, u32 value) { std::memcpy(lapic.regs + offset, &value, sizeof value); };
  set(lvt_lint0, vcpu.id() == 0 ? mode_extint : mode_extint | masked);
  set(lvt_lint1, mode_nmi);
  vcpu.set_lapic(lapic);
}

}  // namespace anykvm::vmm
