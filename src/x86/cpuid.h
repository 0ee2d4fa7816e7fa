// CPUID: what the machine can offer (KVM_GET_SUPPORTED_CPUID) and what one vCPU was given (KVM_SET_CPUID2).
// Reference: Documentation/virt/kvm/api.rst 4.46, 4.20; Documentation/virt/kvm/x86/cpuid.rst.
#pragma once

#include <span>
#include <vector>

#include "anykvm/kvm.h"
#include "x86/cpuid_features.h"
#include "x86/state.h"

namespace anykvm::x86 {

/// XCR0 components that the machine implements and the host CPU has; always includes x87 and SSE.
u64 supported_xcr0();
/// IA32_XSS: no supervisor component is implemented.
inline constexpr u64 supported_xss = 0;
/// KVM_GET_SUPPORTED_CPUID's entries, computed once a process. The span stays good for ever.
std::span<const kvm_cpuid_entry2> supported_cpuid();
/// KVM_GET_EMULATED_CPUID: nothing is slower than the rest here, so that leaf 0 says 0 features beyond the supported.
std::span<const kvm_cpuid_entry2> emulated_cpuid();
/// Whether supported_cpuid() offers a feature.
bool supports(Feature feature);

enum class Vendor : u8 { other, intel, amd /* and Hygon */ };

/// One vCPU's CPUID. Owned by its Cpu; used on the vCPU's thread only.
class Cpuid {
 public:
  /// KVM_SET_CPUID2: the data is taken as it is. 0, -E2BIG (> 256 entries), -EINVAL (linear address width neither 48
  /// nor 57 nor 0).
  int set(std::span<const kvm_cpuid_entry2> entries);
  /// Features of KVM's own leaf that no set() gives to the guest from now on.
  void withhold_kvm_features(u32 features) { withheld_kvm_features_ = features; }
  /// KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT turned off: leaf 1's MWAIT bit is that of IA32_MISC_ENABLE, not the client's.
  void set_mwait_follows_misc_enable(bool on) { mwait_follows_misc_enable_ = on; }
  bool has_mwait(const CpuState& state) const;
  bool is_set() const { return !entries_.empty(); }
  /// The entries as they were set. KVM_GET_CPUID2 shows them with the runtime bits: get().
  std::span<const kvm_cpuid_entry2> entries() const { return entries_; }
  /// out.size() must be >= entries().size(). `apic_enabled`: IA32_APIC_BASE's enable bit.
  void get(const CpuState& state, bool apic_enabled, std::span<kvm_cpuid_entry2> out) const;
  /// Whether `other` is what get() would show: the one KVM_SET_CPUID2 that is allowed after the first KVM_RUN.
  bool equals(const CpuState& state, bool apic_enabled, std::span<const kvm_cpuid_entry2> other) const;

  /// The CPUID instruction: EAX, EBX, ECX, EDX of a leaf, runtime bits applied (OSXSAVE, APIC, OSPKE, sizes in 0xD).
  /// A leaf out of range shows the highest basic leaf, or zeros for an AMD vendor. Does not allocate.
  void lookup(u32 leaf, u32 subleaf, const CpuState& state, bool apic_enabled, u32 out[4]) const;
  /// The entry that was set for a leaf, or nullptr.
  const kvm_cpuid_entry2* find(u32 leaf, u32 subleaf = 0) const;

  // --- cached at set() ------------------------------------------------------------------------------------------
  bool has(Feature feature) const { return words_[unsigned(feature) / 32] >> (unsigned(feature) % 32) & 1; }
  u32 word(CpuidWord word) const { return words_[unsigned(word)]; }
  Vendor vendor() const { return vendor_; }
  /// MAXPHYADDR; 36 when the leaf is missing, as KVM assumes.
  unsigned physical_bits() const { return physical_bits_; }
  /// Physical address bits that must be zero in page tables, CR3, MTRRs.
  u64 reserved_physical_bits() const { return ~0ull << physical_bits_; }
  /// XCR0 bits that XSETBV accepts: leaf 0xD, within supported_xcr0().
  u64 allowed_xcr0() const { return allowed_xcr0_; }
  /// Where KVM's own leaves begin (0x40000000 unless moved); 0: the guest has none.
  u32 kvm_base() const { return kvm_base_; }
  unsigned family() const;
  unsigned model() const;

 private:
  void apply_runtime(kvm_cpuid_entry2& entry, const CpuState& state, bool apic_enabled) const;

  std::vector<kvm_cpuid_entry2> entries_;
  u32 words_[unsigned(CpuidWord::count)] = {};
  Vendor vendor_ = Vendor::other;
  u8 physical_bits_ = 36;
  u32 kvm_base_ = 0, withheld_kvm_features_ = 0;
  u64 allowed_xcr0_ = 0;
  bool mwait_follows_misc_enable_ = false;
};

}  // namespace anykvm::x86
