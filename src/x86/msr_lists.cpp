// KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST, the feature MSRs' values and a new vCPU's.
// Reference: Documentation/virt/kvm/api.rst 4.3; Documentation/virt/kvm/x86/msr.rst.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "x86/cpuid.h"
#include "x86/msr.h"
#include "x86/state.h"

namespace anykvm::x86 {
namespace {

/// State that a client saves and restores. Those of the local APIC and the MTRRs have their own places in its code, and
/// are not listed by KVM either.
constexpr u32 index_list[] = {
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0xc0000081,  // STAR
    0xc0000083,  // CSTAR
    0xc0000102,  // KERNEL_GS_BASE
    0xc0000084,  // SFMASK
    0xc0000082,  // LSTAR
    0x10,        // TSC
    0x277,       // PAT
    0xc0010117,  // VM_HSAVE_PA
    0xc0000103,  // TSC_AUX
    0x48,        // SPEC_CTRL
    0x1d9,       // DEBUGCTL
    0x1db,       // LASTBRANCHFROMIP
    0x1dc,       // LASTBRANCHTOIP
    0x1dd,       // LASTINTFROMIP
    0x1de,       // LASTINTTOIP
    0xda0,       // XSS
    0x12,        // KVM_SYSTEM_TIME
    0x11,        // KVM_WALL_CLOCK
    0x4b564d01,  // KVM_SYSTEM_TIME_NEW
    0x4b564d00,  // KVM_WALL_CLOCK_NEW
    0x4b564d03,  // KVM_STEAL_TIME
    0x4b564d02,  // KVM_ASYNC_PF_EN
    0x4b564d04,  // KVM_PV_EOI_EN
    0x4b564d06,  // KVM_ASYNC_PF_INT
    0x4b564d07,  // KVM_ASYNC_PF_ACK
    0x4b564d05,  // KVM_POLL_CONTROL
    0x3b,        // TSC_ADJUST
    0x6e0,       // TSC_DEADLINE
    0x10a,       // ARCH_CAPABILITIES
    0x345,       // PERF_CAPABILITIES
    0x1a0,       // MISC_ENABLE
    0x17a,       // MCG_STATUS
    0x17b,       // MCG_CTL
    0x9e,        // SMBASE
    0x34,        // SMI_COUNT
    0xce,        // PLATFORM_INFO
    0x140,       // MISC_FEATURES_ENABLES
    0xc001011f,  // VIRT_SPEC_CTRL
    0x1fc,       // POWER_CTL
    0x8b,        // UCODE_REV
    0xc0010015,  // HWCR
};

constexpr u32 ucode_rev = 0x8b, arch_capabilities = 0x10a, perf_capabilities = 0x345, de_cfg = 0xc0011029;
constexpr u32 feature_list[] = {de_cfg, ucode_rev, arch_capabilities, perf_capabilities};

constexpr u64 lfence_serialises = 1 << 1;

bool host_is_not_affected_by(const char* vulnerability) {
  char path[96] = "/sys/devices/system/cpu/vulnerabilities/", text[13] = {};
  std::strncat(path, vulnerability, sizeof path - std::strlen(path) - 1);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool got = read(fd, text, 12) == 12;
  close(fd);
  return got && std::strcmp(text, "Not affected") == 0;
}

/// The guest runs on the host's CPU, so it is exposed to what the host is exposed to, apart from what concerns hardware
/// page tables and virtualisation, which the guest does not have.
u64 host_arch_capabilities() {
  static const u64 value = [] {
    u64 bits = 1ull << 3 /* no L1D flush needed for nested entry */ | 1ull << 6 /* no page size change machine check */;
    struct {
      const char* vulnerability;
      u64 bits;
    } const immune[] = {
        {"meltdown", 1ull << 0},
        {"spec_store_bypass", 1ull << 4},
        {"mds", 1ull << 5},
        {"tsx_async_abort", 1ull << 8},
        {"mmio_stale_data", 7ull << 13},
        {"gather_data_sampling", 1ull << 26},
        {"reg_file_data_sampling", 1ull << 27},
        {"indirect_target_selection", 1ull << 62},
    };
    for (const auto& i : immune)
      if (host_is_not_affected_by(i.vulnerability)) bits |= i.bits;
    return bits;
  }();
  return value;
}

u64 default_ucode_rev() {
  // What KVM gives: a revision that no patch level is above on AMD, and the high half on Intel.
  return supported_cpuid()[0].ebx == 0x68747541 ? 0x01000065 : 0x100000000ull;
}

bool host_lfence_serialises() {
  for (const kvm_cpuid_entry2& e : supported_cpuid())
    if (e.function == 0x80000021) return e.eax >> 2 & 1;
  return false;
}

}  // namespace

std::span<const u32> msr_index_list() { return index_list; }
std::span<const u32> msr_feature_index_list() { return feature_list; }

bool get_feature_msr(u32 index, u64& value) {
  switch (index) {
    case de_cfg: value = host_lfence_serialises() ? lfence_serialises : 0; return true;
    case ucode_rev: value = default_ucode_rev(); return true;
    case arch_capabilities: value = host_arch_capabilities(); return true;
    case perf_capabilities: value = 0; return true;
  }
  value = 0;
  return false;
}

void reset_msrs(MsrState& msr) {
  msr = {};
  msr.arch_capabilities = host_arch_capabilities();
  msr.ucode_rev = default_ucode_rev();
  msr.platform_info = 1ull << 31;  // CPUID faulting
}

}  // namespace anykvm::x86
