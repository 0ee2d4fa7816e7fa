// One vCPU's CPUID: the client's entries, and KVM's rules for what the CPUID instruction shows of them.
#include "x86/cpuid.h"

#include <cerrno>
#include <cstring>

#include "x86/xsave.h"

namespace anykvm::x86 {
namespace {

constexpr size_t max_entries = 256;  // KVM_MAX_CPUID_ENTRIES

u32 mask_of(Feature feature) { return 1u << (unsigned(feature) % 32); }

void set_bit(u32& word, Feature feature, bool on) { word = on ? word | mask_of(feature) : word & ~mask_of(feature); }

const kvm_cpuid_entry2* find_in(std::span<const kvm_cpuid_entry2> entries, u32 leaf, u32 subleaf) {
  for (const kvm_cpuid_entry2& e : entries)
    if (e.function == leaf && (!(e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e.index == subleaf)) return &e;
  return nullptr;
}

/// The first entry of a leaf whose subleaves mean nothing, however the client flagged it.
const kvm_cpuid_entry2* find_leaf(std::span<const kvm_cpuid_entry2> entries, u32 leaf) {
  for (const kvm_cpuid_entry2& e : entries)
    if (e.function == leaf) return &e;
  return nullptr;
}

Vendor vendor_of(const kvm_cpuid_entry2* leaf0) {
  if (!leaf0) return Vendor::other;
  u32 text[3] = {leaf0->ebx, leaf0->edx, leaf0->ecx};
  auto is = [&](const char* name) { return std::memcmp(text, name, sizeof text) == 0; };
  if (is("GenuineIntel")) return Vendor::intel;
  if (is("AuthenticAMD") || is("AMDisbetter!") || is("HygonGenuine")) return Vendor::amd;
  return Vendor::other;
}

/// KVM's signature may stand at any 0x100 step below 0x40010000, for guests that see another hypervisor first.
u32 find_kvm_base(std::span<const kvm_cpuid_entry2> entries) {
  for (const kvm_cpuid_entry2& e : entries)
    if (e.function >= 0x40000000 && e.function < 0x40010000 && (e.function & 0xff) == 0 && e.ebx == 0x4b4d564b &&
        e.ecx == 0x564b4d56 && e.edx == 0x4d)
      return e.function;
  return 0;
}

}  // namespace

int Cpuid::set(std::span<const kvm_cpuid_entry2> entries) {
  if (entries.size() > max_entries) return -E2BIG;
  if (const kvm_cpuid_entry2* sizes = find_leaf(entries, 0x80000008)) {
    const u32 linear_bits = sizes->eax >> 8 & 0xff;
    if (linear_bits != 48 && linear_bits != 57 && linear_bits != 0) return -EINVAL;
  }
  entries_.assign(entries.begin(), entries.end());
  vendor_ = vendor_of(find_leaf(entries_, 0));
  kvm_base_ = find_kvm_base(entries_);

  const kvm_cpuid_entry2 none{};
  auto leaf = [&](u32 function, u32 index = 0) -> const kvm_cpuid_entry2& {
    const kvm_cpuid_entry2* e = find_in(entries_, function, index);
    return e ? *e : none;
  };
  auto word = [&](CpuidWord w) -> u32& { return words_[unsigned(w)]; };
  word(CpuidWord::leaf1_ecx) = leaf(1).ecx;
  word(CpuidWord::leaf1_edx) = leaf(1).edx;
  word(CpuidWord::leaf7_ebx) = leaf(7).ebx;
  word(CpuidWord::leaf7_ecx) = leaf(7).ecx;
  word(CpuidWord::leaf7_edx) = leaf(7).edx;
  word(CpuidWord::leaf7_1_eax) = leaf(7, 1).eax;
  word(CpuidWord::leafd_1_eax) = leaf(0xd, 1).eax;
  word(CpuidWord::ext1_ecx) = leaf(0x80000001).ecx;
  word(CpuidWord::ext1_edx) = leaf(0x80000001).edx;
  word(CpuidWord::ext7_edx) = leaf(0x80000007).edx;
  word(CpuidWord::ext8_ebx) = leaf(0x80000008).ebx;
  word(CpuidWord::ext21_eax) = leaf(0x80000021).eax;
  word(CpuidWord::kvm_eax) = kvm_base_ ? leaf(kvm_base_ + 1).eax & ~withheld_kvm_features_ : 0;

  physical_bits_ = 36;
  if (leaf(0x80000000).eax >= 0x80000008)
    if (const kvm_cpuid_entry2* sizes = find_leaf(entries_, 0x80000008)) {
      const unsigned bits = sizes->eax & 0xff;
      physical_bits_ = u8(bits < 52 ? bits : 52);
    }
  const kvm_cpuid_entry2& xstate = leaf(0xd);
  allowed_xcr0_ = (xstate.eax | u64(xstate.edx) << 32) & supported_xcr0();
  return 0;
}

bool Cpuid::has_mwait(const CpuState& state) const {
  return mwait_follows_misc_enable_ ? state.msr.misc_enable & misc_enable_mwait : has(Feature::mwait);
}

void Cpuid::apply_runtime(kvm_cpuid_entry2& e, const CpuState& state, bool apic_enabled) const {
  switch (e.function) {
    case 1:
      set_bit(e.ecx, Feature::osxsave, state.cr4 & cr4::osxsave);
      set_bit(e.edx, Feature::apic, apic_enabled);
      if (mwait_follows_misc_enable_) set_bit(e.ecx, Feature::mwait, has_mwait(state));
      break;
    case 7:
      if (e.index == 0 && supports(Feature::pku)) set_bit(e.ecx, Feature::ospke, state.cr4 & cr4::pke);
      break;
    case 0xd:
      if (e.index == 0) e.ebx = xsave_layout().standard_size(state.xcr0);
      if (e.index == 1 && e.eax & (mask_of(Feature::xsavec) | mask_of(Feature::xsaves)))
        e.ebx = xsave_layout().compacted_size(state.xcr0 | state.msr.xss);
      break;
  }
  if (kvm_base_ && e.function == kvm_base_ + 1) e.eax &= ~withheld_kvm_features_;
}

void Cpuid::get(const CpuState& state, bool apic_enabled, std::span<kvm_cpuid_entry2> out) const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    out[i] = entries_[i];
    apply_runtime(out[i], state, apic_enabled);
  }
}

bool Cpuid::equals(const CpuState& state, bool apic_enabled, std::span<const kvm_cpuid_entry2> other) const {
  if (other.size() != entries_.size()) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {
    kvm_cpuid_entry2 ours = entries_[i], theirs = other[i];
    apply_runtime(ours, state, apic_enabled);
    apply_runtime(theirs, state, apic_enabled);
    if (ours.function != theirs.function || ours.index != theirs.index || ours.flags != theirs.flags ||
        ours.eax != theirs.eax || ours.ebx != theirs.ebx || ours.ecx != theirs.ecx || ours.edx != theirs.edx)
      return false;
  }
  return true;
}

const kvm_cpuid_entry2* Cpuid::find(u32 leaf, u32 subleaf) const { return find_in(entries_, leaf, subleaf); }

void Cpuid::lookup(u32 leaf, u32 subleaf, const CpuState& state, bool apic_enabled, u32 out[4]) const {
  const kvm_cpuid_entry2* e = find(leaf, subleaf);
  if (!e && vendor_ != Vendor::amd) {
    // Behind the last leaf of its range, a CPU that is not AMD's shows its highest basic leaf, the subleaf as asked.
    if (const kvm_cpuid_entry2* basic = find_leaf(entries_, 0)) {
      const u32 range = leaf >= 0x40000000 && leaf <= 0x4fffffff ? leaf & 0xffffff00
                        : leaf >= 0xc0000000                     ? 0xc0000000
                                                                 : leaf & 0x80000000;
      const kvm_cpuid_entry2* first = find_leaf(entries_, range);
      if (!first || leaf > first->eax) {
        leaf = basic->eax;
        e = find(leaf, subleaf);
      }
    }
  }
  if (e) {
    kvm_cpuid_entry2 shown = *e;
    apply_runtime(shown, state, apic_enabled);
    out[0] = shown.eax, out[1] = shown.ebx, out[2] = shown.ecx, out[3] = shown.edx;
    return;
  }
  out[0] = out[1] = out[2] = out[3] = 0;
  // Topology leaves exist when their subleaf 1 does; behind their last level they still tell the subleaf and x2APIC ID.
  if (leaf == 0xb || leaf == 0x1f)
    if (const kvm_cpuid_entry2* level = find(leaf, 1)) {
      out[2] = subleaf & 0xff;
      out[3] = level->edx;
    }
}

unsigned Cpuid::family() const {
  const kvm_cpuid_entry2* e = find(1);
  if (!e) return 0;
  const unsigned base = e->eax >> 8 & 0xf;
  return base == 0xf ? base + (e->eax >> 20 & 0xff) : base;
}

unsigned Cpuid::model() const {
  const kvm_cpuid_entry2* e = find(1);
  if (!e) return 0;
  const unsigned base = e->eax >> 4 & 0xf, family_code = e->eax >> 8 & 0xf;
  return family_code == 6 || family_code == 0xf ? (e->eax >> 12 & 0xf0) | base : base;
}

}  // namespace anykvm::x86
