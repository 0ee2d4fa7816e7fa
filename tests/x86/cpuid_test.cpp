// KVM's rules for CPUID: what is supported, and what the instruction shows of what the client set.
#include "x86/cpuid.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

#include "x86/xsave.h"

namespace anykvm::x86 {
namespace {

constexpr u32 intel[3] = {0x756e6547, 0x6c65746e, 0x49656e69};  // EBX, ECX, EDX
constexpr u32 amd[3] = {0x68747541, 0x444d4163, 0x69746e65};

kvm_cpuid_entry2 entry(u32 leaf, u32 eax, u32 ebx = 0, u32 ecx = 0, u32 edx = 0) {
  return {leaf, 0, 0, eax, ebx, ecx, edx, {}};
}
kvm_cpuid_entry2 indexed(u32 leaf, u32 index, u32 eax, u32 ebx = 0, u32 ecx = 0, u32 edx = 0) {
  return {leaf, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax, ebx, ecx, edx, {}};
}
kvm_cpuid_entry2 vendor(const u32 (&name)[3], u32 last) { return entry(0, last, name[0], name[1], name[2]); }

struct Regs {
  u32 r[4];
  bool operator==(const Regs&) const = default;
};
Regs ask(const Cpuid& cpuid, u32 leaf, u32 subleaf = 0, const CpuState& state = {}, bool apic = true) {
  Regs regs;
  cpuid.lookup(leaf, subleaf, state, apic, regs.r);
  return regs;
}

const kvm_cpuid_entry2* supported(u32 leaf, u32 index = 0) {
  for (const kvm_cpuid_entry2& e : supported_cpuid())
    if (e.function == leaf && e.index == index) return &e;
  return nullptr;
}

TEST(SupportedCpuid, HasEveryLeafOnce) {
  std::set<u64> seen;
  for (const kvm_cpuid_entry2& e : supported_cpuid()) EXPECT_TRUE(seen.insert(u64(e.function) << 32 | e.index).second);
  for (u32 base : {0u, 0x80000000u, 0x40000000u}) {
    const kvm_cpuid_entry2* first = supported(base);
    ASSERT_TRUE(first);
    for (u32 leaf = base; leaf <= first->eax; ++leaf) EXPECT_TRUE(supported(leaf)) << std::hex << leaf;
  }
}

TEST(SupportedCpuid, MarksIndexedLeaves) {
  for (const kvm_cpuid_entry2& e : supported_cpuid()) {
    const bool is_indexed =
        std::set<u32>{4, 7, 0xb, 0xd, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x8000001d}.contains(
            e.function);
    EXPECT_EQ(e.flags, is_indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0u) << std::hex << e.function;
  }
}

TEST(SupportedCpuid, OffersWhatTheMachineProvides) {
  using enum Feature;
  for (Feature f : {hypervisor,        x2apic,  pcid,   smep,  smap, umip, fsgsbase, invpcid, nx,  gbpages,
                    long_mode,         syscall, rdtscp, rdpid, apic, mtrr, pat,      mce,     mca, tsc_adjust,
                    arch_capabilities, sse2,    cx8,    fxsr})
    EXPECT_TRUE(supports(f)) << std::hex << unsigned(f);
}

TEST(SupportedCpuid, WithholdsWhatTheEnginesDoNot) {
  using enum Feature;
  for (Feature f : {pku, la57, hle, rtm, osxsave, spec_ctrl, amd_ibpb, virt_ssbd, fxsr_opt})
    EXPECT_FALSE(supports(f)) << std::hex << unsigned(f);
  EXPECT_EQ(supports(avx512f), (supported_xcr0() & xfeature::zmm_hi256) != 0);
  EXPECT_FALSE(supported(1)->ecx & (1 << 3 | 1 << 5));  // MONITOR, VMX
  EXPECT_FALSE(supported(0x80000001)->ecx & (1 << 2));  // SVM
  EXPECT_FALSE(supported(1)->edx & (1 << 28));          // HTT is the client's
  EXPECT_FALSE(supported(1)->ecx & (1 << 24));          // the deadline timer, too: not every client's APIC has it
  EXPECT_FALSE(supported(7)->ebx & (1 << 2 | 1 << 14 | 1 << 25));  // SGX, MPX, PT
  if (const kvm_cpuid_entry2* pmu = supported(0xa)) {
    EXPECT_EQ(pmu->eax | pmu->ebx | pmu->ecx | pmu->edx, 0u);
  }
}

TEST(SupportedCpuid, DescribesTheXsaveArea) {
  const kvm_cpuid_entry2* main = supported(0xd);
  ASSERT_TRUE(main);
  EXPECT_EQ(main->eax | u64(main->edx) << 32, supported_xcr0());
  EXPECT_EQ(main->ebx, xsave_layout().standard_size(supported_xcr0()));
  EXPECT_EQ(main->ebx, main->ecx);
  if (supported_xcr0() & xfeature::avx) {
    const kvm_cpuid_entry2* avx = supported(0xd, 2);
    ASSERT_TRUE(avx);
    EXPECT_EQ(avx->eax, 256u);
    EXPECT_EQ(avx->ebx, 576u);
    EXPECT_GE(main->ebx, 832u);
  } else {
    EXPECT_FALSE(supports(Feature::avx) || supports(Feature::avx2) || supports(Feature::fma));
  }
  for (u32 i = 2; i < 64; ++i) EXPECT_EQ(supported(0xd, i) != nullptr, (supported_xcr0() >> i & 1) != 0) << i;
}

TEST(SupportedCpuid, IsTakenBackByAVcpu) {
  Cpuid cpuid;
  ASSERT_EQ(cpuid.set(supported_cpuid()), 0);
  EXPECT_EQ(cpuid.kvm_base(), 0x40000000u);
  EXPECT_EQ(cpuid.allowed_xcr0(), supported_xcr0());
  EXPECT_GE(cpuid.physical_bits(), 36u);
  EXPECT_TRUE(cpuid.has(Feature::long_mode));
  EXPECT_NE(cpuid.word(CpuidWord::kvm_eax), 0u);
}

TEST(Cpuid, RefusesBadData) {
  Cpuid cpuid;
  std::vector<kvm_cpuid_entry2> many(257);
  EXPECT_EQ(cpuid.set(many), -E2BIG);
  for (u32 bits : {48u, 57u, 0u}) {
    const kvm_cpuid_entry2 good[] = {entry(0x80000008, bits << 8 | 40)};
    EXPECT_EQ(cpuid.set(good), 0) << bits;
  }
  const kvm_cpuid_entry2 bad[] = {entry(0x80000008, 52 << 8 | 40), entry(1, 7)};
  EXPECT_EQ(cpuid.set(bad), -EINVAL);
  EXPECT_EQ(cpuid.entries().size(), 1u);  // what was there before
}

TEST(Cpuid, FindsSubleavesOnlyWhereTheyAreSignificant) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 data[] = {vendor(amd, 7), entry(1, 0x600), indexed(7, 0, 1, 2, 3, 4),
                                   indexed(7, 1, 5, 6, 7, 8)};
  ASSERT_EQ(cpuid.set(data), 0);
  EXPECT_EQ(ask(cpuid, 1, 99).r[0], 0x600u);
  EXPECT_EQ(ask(cpuid, 7, 1), (Regs{{5, 6, 7, 8}}));
  EXPECT_EQ(ask(cpuid, 7, 2), (Regs{}));
}

TEST(Cpuid, OutOfRangeIsTheHighestBasicLeafUnlessAmd) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 as_intel[] = {vendor(intel, 2), entry(1, 1), entry(2, 0xaa, 0xbb, 0xcc, 0xdd),
                                       entry(0x80000000, 0x80000001), entry(0x40000000, 0x40000001)};
  ASSERT_EQ(cpuid.set(as_intel), 0);
  const Regs last = {{0xaa, 0xbb, 0xcc, 0xdd}};
  EXPECT_EQ(ask(cpuid, 3), last);
  EXPECT_EQ(ask(cpuid, 0x80000002), last);
  EXPECT_EQ(ask(cpuid, 0x40000002), last);
  EXPECT_EQ(ask(cpuid, 0x40000101), last);  // another hypervisor's range, which is not there
  EXPECT_EQ(ask(cpuid, 0xc0000000), last);
  EXPECT_EQ(ask(cpuid, 0x80000001), (Regs{}));  // in range, not given
  EXPECT_EQ(cpuid.vendor(), Vendor::intel);

  const kvm_cpuid_entry2 as_amd[] = {vendor(amd, 2), entry(1, 1), entry(2, 0xaa, 0xbb, 0xcc, 0xdd)};
  ASSERT_EQ(cpuid.set(as_amd), 0);
  EXPECT_EQ(ask(cpuid, 3), (Regs{}));
  EXPECT_EQ(cpuid.vendor(), Vendor::amd);
}

TEST(Cpuid, TopologyTellsTheIdOfUndefinedLevels) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 data[] = {vendor(intel, 0xb), indexed(0xb, 0, 0, 1, 0x100, 5),
                                   indexed(0xb, 1, 2, 4, 0x201, 5)};
  ASSERT_EQ(cpuid.set(data), 0);
  EXPECT_EQ(ask(cpuid, 0xb, 7), (Regs{{0, 0, 7, 5}}));
}

TEST(Cpuid, FollowsTheStateAtRunTime) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 data[] = {vendor(amd, 0xd), entry(1, 0, 0, 1 << 27, 0), indexed(0xd, 0, 7, 1, 1),
                                   indexed(0xd, 1, 0xf)};
  ASSERT_EQ(cpuid.set(data), 0);
  CpuState state;
  EXPECT_FALSE(ask(cpuid, 1, 0, state, true).r[2] & 1 << 27);
  EXPECT_TRUE(ask(cpuid, 1, 0, state, true).r[3] & 1 << 9);
  EXPECT_FALSE(ask(cpuid, 1, 0, state, false).r[3] & 1 << 9);
  state.cr4 = cr4::osxsave;
  EXPECT_TRUE(ask(cpuid, 1, 0, state).r[2] & 1 << 27);
  EXPECT_EQ(ask(cpuid, 0xd, 0, state).r[1], 576u);
  if (supported_xcr0() & xfeature::avx) {
    state.xcr0 = 7;
    EXPECT_EQ(ask(cpuid, 0xd, 0, state).r[1], 832u);
    EXPECT_EQ(ask(cpuid, 0xd, 1, state).r[1], 832u);
  }
  // KVM_GET_CPUID2 shows the same, and may be set again.
  kvm_cpuid_entry2 shown[4];
  cpuid.get(state, true, shown);
  EXPECT_EQ(shown[2].ebx, ask(cpuid, 0xd, 0, state).r[1]);
  EXPECT_TRUE(cpuid.equals(state, true, shown));
  shown[1].eax = 1;
  EXPECT_FALSE(cpuid.equals(state, true, shown));
}

TEST(Cpuid, PhysicalBits) {
  Cpuid cpuid;
  EXPECT_EQ(cpuid.physical_bits(), 36u);
  const kvm_cpuid_entry2 small[] = {entry(0x80000000, 0x80000008), entry(0x80000008, 48 << 8 | 40)};
  ASSERT_EQ(cpuid.set(small), 0);
  EXPECT_EQ(cpuid.physical_bits(), 40u);
  EXPECT_EQ(cpuid.reserved_physical_bits(), ~0ull << 40);
  const kvm_cpuid_entry2 hidden[] = {entry(0x80000000, 0x80000001), entry(0x80000008, 48 << 8 | 40)};
  ASSERT_EQ(cpuid.set(hidden), 0);
  EXPECT_EQ(cpuid.physical_bits(), 36u);
}

TEST(Cpuid, KvmLeavesMayBeElsewhere) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 data[] = {entry(0x40000000, 0x40000006, 0x7263694d, 0x666f736f, 0x76482074),
                                   entry(0x40000100, 0x40000101, 0x4b4d564b, 0x564b4d56, 0x4d),
                                   entry(0x40000101, 0x1234)};
  ASSERT_EQ(cpuid.set(data), 0);
  EXPECT_EQ(cpuid.kvm_base(), 0x40000100u);
  EXPECT_EQ(cpuid.word(CpuidWord::kvm_eax), 0x1234u);
}

TEST(Cpuid, FamilyAndModel) {
  Cpuid cpuid;
  const kvm_cpuid_entry2 data[] = {entry(1, 0x00b00f21)};
  ASSERT_EQ(cpuid.set(data), 0);
  EXPECT_EQ(cpuid.family(), 26u);
  EXPECT_EQ(cpuid.model(), 2u);
}

}  // namespace
}  // namespace anykvm::x86
