// MSRs as the guest (RDMSR, WRMSR) and the client (KVM_GET_MSRS, KVM_SET_MSRS) see them.
#include "x86/msr.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <memory>

#include "os/tsc.h"
#include "x86/fake_machine.h"

namespace anykvm::x86 {
namespace {

constexpr u64 not_canonical = 0x0000800000000000;

class Msr : public testing::Test {
 protected:
  Msr() { EXPECT_EQ(cpu->cpuid.set(supported_cpuid()), 0); }

  /// CPUID without anything but a vendor.
  void bare_cpu(bool is_intel) {
    const kvm_cpuid_entry2 amd = {0, 0, 0, 1, 0x68747541, 0x444d4163, 0x69746e65, {}};
    const kvm_cpuid_entry2 intel = {0, 0, 0, 1, 0x756e6547, 0x6c65746e, 0x49656e69, {}};
    ASSERT_EQ(cpu->cpuid.set({is_intel ? &intel : &amd, 1}), 0);
  }

  bool faults(Result result) {
    if (result == Result::ok) return false;
    EXPECT_EQ(result, Result::fault);
    EXPECT_EQ(cpu->fault.vector, exception::gp);
    EXPECT_TRUE(cpu->fault.has_error);
    EXPECT_EQ(cpu->fault.error, 0u);
    return true;
  }
  bool write_faults(u32 index, u64 value) { return faults(cpu->write_msr(index, value)); }
  bool read_faults(u32 index) {
    u64 value;
    return faults(cpu->read_msr(index, value));
  }
  u64 read(u32 index) {
    u64 value = 0;
    EXPECT_EQ(cpu->read_msr(index, value), Result::ok) << std::hex << index;
    return value;
  }
  u64 host_read(u32 index) {
    u64 value = 0;
    EXPECT_TRUE(get_msr(*cpu, index, value, Initiator::host)) << std::hex << index;
    return value;
  }
  void expect_holds(u32 index, u64 value) {
    EXPECT_FALSE(write_faults(index, value)) << std::hex << index;
    EXPECT_EQ(read(index), value) << std::hex << index;
  }

  FakeMachine machine;
  std::unique_ptr<Cpu> cpu = std::make_unique<Cpu>(machine);
};

TEST_F(Msr, UnknownFaults) {
  for (u32 index : {0x1000u, 0x4b564dffu, 0xc0000fffu, 0x40000000u}) {
    EXPECT_TRUE(read_faults(index)) << std::hex << index;
    EXPECT_TRUE(write_faults(index, 0)) << std::hex << index;
    u64 value = 1;
    EXPECT_FALSE(get_msr(*cpu, index, value, Initiator::host));
    EXPECT_EQ(value, 0u);
  }
}

TEST_F(Msr, MachineIsAskedFirst) {
  machine.msrs[0xc0000081] = 42;
  EXPECT_EQ(read(0xc0000081), 42u);
  EXPECT_FALSE(write_faults(0xc0000081, 43));
  EXPECT_EQ(machine.msrs[0xc0000081], 43u);
  EXPECT_EQ(cpu->state.msr.star, 0u);
}

TEST_F(Msr, SystemCallRegisters) {
  expect_holds(0xc0000081, 0x23001000000000);
  expect_holds(0xc0000082, 0xffffffff81000000);
  expect_holds(0xc0000083, 0x7fffffffffff);
  expect_holds(0xc0000084, 0x47700);
  expect_holds(0x174, 0x10);
  EXPECT_TRUE(write_faults(0xc0000082, not_canonical));
  EXPECT_TRUE(write_faults(0xc0000083, not_canonical));
  EXPECT_EQ(read(0xc0000082), 0xffffffff81000000);
}

TEST_F(Msr, SysenterAddressesHaveTheVendorsWidth) {
  bare_cpu(false);
  EXPECT_FALSE(write_faults(0x175, 0xffffffff81234567));
  EXPECT_EQ(read(0x175), 0x81234567u);
  bare_cpu(true);
  EXPECT_FALSE(write_faults(0x176, 0xffffffff81234567));
  EXPECT_EQ(read(0x176), 0xffffffff81234567u);
  EXPECT_FALSE(write_faults(0x176, not_canonical));
  EXPECT_EQ(read(0x176), 0xffff800000000000u);
}

TEST_F(Msr, SegmentBases) {
  expect_holds(0xc0000100, 0x7f0000001000);
  EXPECT_EQ(cpu->state.segment[fs].base, 0x7f0000001000u);
  expect_holds(0xc0000101, 0xffff888000000000);
  EXPECT_EQ(cpu->state.segment[gs].base, 0xffff888000000000u);
  expect_holds(0xc0000102, 0x1000);
  for (u32 index : {0xc0000100u, 0xc0000101u, 0xc0000102u}) {
    EXPECT_TRUE(write_faults(index, not_canonical));
    EXPECT_FALSE(set_msr(*cpu, index, not_canonical, Initiator::host));
  }
}

TEST_F(Msr, EferFollowsCpuid) {
  expect_holds(0xc0000080, efer::sce | efer::lme | efer::nx);
  for (u64 bit : {u64{1} << 1, efer::svme, efer::ffxsr, u64{1} << 21, u64{1} << 63})
    EXPECT_TRUE(write_faults(0xc0000080, bit));
  bare_cpu(true);
  EXPECT_TRUE(write_faults(0xc0000080, efer::nx));
  EXPECT_TRUE(write_faults(0xc0000080, efer::lme));
  EXPECT_FALSE(write_faults(0xc0000080, efer::sce));
  EXPECT_TRUE(set_msr(*cpu, 0xc0000080, efer::sce | efer::nx, Initiator::host));
}

TEST_F(Msr, EferLmeIsFixedWhilePaging) {
  cpu->state.cr0 |= cr0::pe | cr0::pg;
  EXPECT_TRUE(write_faults(0xc0000080, efer::lme));
  EXPECT_FALSE(write_faults(0xc0000080, efer::nx));
  cpu->state.msr.efer = efer::lme | efer::lma;
  EXPECT_FALSE(write_faults(0xc0000080, efer::lme | efer::sce));  // LMA written as 0 stays
  EXPECT_EQ(read(0xc0000080), efer::lme | efer::lma | efer::sce);
}

TEST_F(Msr, Pat) {
  EXPECT_EQ(read(0x277), 0x0007040600070406u);
  expect_holds(0x277, 0x0407050600070106);
  EXPECT_TRUE(write_faults(0x277, 0x02));
  EXPECT_TRUE(write_faults(0x277, 0x03ull << 56));
  EXPECT_TRUE(write_faults(0x277, 0x08));
}

TEST_F(Msr, Mtrrs) {
  EXPECT_EQ(read(0xfe), 0x508u);
  EXPECT_TRUE(write_faults(0xfe, 0));
  expect_holds(0x2ff, 0xc06);
  EXPECT_TRUE(write_faults(0x2ff, 0x1006));
  EXPECT_TRUE(write_faults(0x2ff, 0xc02));
  expect_holds(0x250, 0x0606060606060606);
  expect_holds(0x259, 0);
  expect_holds(0x26f, 0x0505050505050505);
  EXPECT_TRUE(write_faults(0x268, 0x07));
  expect_holds(0x200, 0x80000006);
  expect_holds(0x201, 0xf80000800);
  EXPECT_TRUE(write_faults(0x200, 0x80000106));
  EXPECT_TRUE(write_faults(0x201, 0x801));
  EXPECT_TRUE(write_faults(0x20e, 1ull << cpu->cpuid.physical_bits()));
  EXPECT_TRUE(write_faults(0x210, 0));
}

TEST_F(Msr, TscCounts) {
  const u64 first = read(0x10), host = os::host_tsc();
  EXPECT_LE(first, host);
  EXPECT_LT(host - first, 100'000'000u);
  EXPECT_FALSE(write_faults(0x10, 1000));
  EXPECT_LT(read(0x10), 1'000'000'000u);
  EXPECT_GE(read(0x10), 1000u);
  EXPECT_EQ(read(0x3b), cpu->state.tsc_offset);  // both moved by the same
}

TEST_F(Msr, TscAdjustMovesTheTscForTheGuestOnly) {
  EXPECT_FALSE(write_faults(0x3b, 1ull << 40));
  EXPECT_EQ(cpu->state.tsc_offset, 1ull << 40);
  EXPECT_FALSE(write_faults(0x3b, 1ull << 41));
  EXPECT_EQ(cpu->state.tsc_offset, 1ull << 41);
  EXPECT_TRUE(set_msr(*cpu, 0x3b, 5, Initiator::host));
  EXPECT_EQ(read(0x3b), 5u);
  EXPECT_EQ(cpu->state.tsc_offset, 1ull << 41);
}

TEST_F(Msr, ScaledTsc) {
  CpuState state;
  EXPECT_EQ(guest_tsc(state, 1000), 1000u);
  state.tsc_ratio = 3ull << (tsc_ratio_bits - 1);  // 1.5
  state.tsc_offset = u64(-500);
  EXPECT_EQ(guest_tsc(state, 1000), 1000u);
  EXPECT_EQ(guest_tsc(state, 1ull << 62), (3ull << 61) - 500);
}

TEST_F(Msr, TscAux) {
  EXPECT_FALSE(write_faults(0xc0000103, 7));
  EXPECT_EQ(read(0xc0000103), 7u);
  bare_cpu(true);
  EXPECT_TRUE(write_faults(0xc0000103, 1));  // neither RDTSCP nor RDPID
  EXPECT_TRUE(read_faults(0xc0000103));
  EXPECT_FALSE(set_msr(*cpu, 0xc0000103, 1ull << 32, Initiator::host));
  EXPECT_TRUE(set_msr(*cpu, 0xc0000103, 9, Initiator::host));
  EXPECT_EQ(host_read(0xc0000103), 9u);
}

TEST_F(Msr, MachineCheckBanks) {
  EXPECT_EQ(read(0x179), mc_banks);
  EXPECT_TRUE(write_faults(0x179, 0));
  EXPECT_TRUE(read_faults(0x17b));  // no MCG_CTL until the client gives it
  EXPECT_EQ(setup_mce(*cpu, 10 | 1 << 8), 0);
  EXPECT_EQ(read(0x17b), ~0ull);
  EXPECT_TRUE(write_faults(0x17b, 1));
  EXPECT_FALSE(write_faults(0x17b, 0));
  EXPECT_EQ(read(0x400), ~0ull);
  EXPECT_TRUE(write_faults(0x400, 2));
  EXPECT_FALSE(write_faults(0x400 + 4 * 4, ~(1ull << 10)));  // the GART erratum
  EXPECT_FALSE(write_faults(0x401, 0));
  EXPECT_TRUE(write_faults(0x401, 1));
  EXPECT_TRUE(set_msr(*cpu, 0x401, 1ull << 63, Initiator::host));
  EXPECT_EQ(read(0x401), 1ull << 63);
  EXPECT_TRUE(read_faults(0x400 + 4 * 10));  // the eleventh bank
  EXPECT_TRUE(read_faults(0x280));           // no CMCI
  EXPECT_EQ(setup_mce(*cpu, 0), -EINVAL);
  EXPECT_EQ(setup_mce(*cpu, 33), -EINVAL);
  EXPECT_EQ(setup_mce(*cpu, 10 | 1 << 27), -EINVAL);  // local machine checks
  EXPECT_EQ(setup_mce(*cpu, 10 | 1 << 10), 0);
  EXPECT_FALSE(write_faults(0x280, 1 << 30 | 0x7fff));
  EXPECT_TRUE(write_faults(0x280, 1 << 15));
  EXPECT_EQ(read(0x280), 1u << 30 | 0x7fff);
}

TEST_F(Msr, AmdMayWriteBankStatusWhenHwcrSaysSo) {
  bare_cpu(false);
  EXPECT_TRUE(write_faults(0x405, 1));
  EXPECT_FALSE(write_faults(0xc0010015, 1 << 18));
  EXPECT_FALSE(write_faults(0x405, 1));
}

TEST_F(Msr, SideChannelControlsFollowCpuid) {
  EXPECT_TRUE(read_faults(0x48));
  EXPECT_TRUE(write_faults(0x48, 0));
  EXPECT_TRUE(write_faults(0x49, 1));
  EXPECT_TRUE(write_faults(0x10b, 1));
  const kvm_cpuid_entry2 leaves[] = {
      {7, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 0, 0, 0, 1u << 26 | 1u << 28 | 1u << 29, {}}};
  ASSERT_EQ(cpu->cpuid.set(leaves), 0);
  expect_holds(0x48, 1);
  EXPECT_TRUE(write_faults(0x48, 4));  // SSBD is another bit of CPUID
  EXPECT_FALSE(write_faults(0x49, 1));
  EXPECT_TRUE(write_faults(0x49, 2));
  EXPECT_TRUE(read_faults(0x49));
  EXPECT_FALSE(write_faults(0x10b, 1));
  EXPECT_TRUE(read_faults(0x10b));
}

TEST_F(Msr, ReadOnlyForTheGuestIsWritableForTheClient) {
  for (u32 index : {0x10au, 0xceu, 0x34u}) {
    EXPECT_TRUE(write_faults(index, 1ull << 31)) << std::hex << index;
    EXPECT_TRUE(set_msr(*cpu, index, 1ull << 31, Initiator::host)) << std::hex << index;
    EXPECT_EQ(read(index), 1ull << 31) << std::hex << index;
  }
  EXPECT_TRUE(read_faults(0x9e));
  EXPECT_EQ(host_read(0x9e), 0x30000u);
  const u64 revision = read(0x8b);
  EXPECT_FALSE(write_faults(0x8b, 0));
  EXPECT_EQ(read(0x8b), revision);
  EXPECT_TRUE(set_msr(*cpu, 0x8b, 0x77, Initiator::host));
  EXPECT_EQ(read(0x8b), 0x77u);
}

TEST_F(Msr, CpuidFaulting) {
  EXPECT_EQ(read(0xce), 1ull << 31);
  expect_holds(0x140, 1);
  EXPECT_TRUE(write_faults(0x140, 2));
  EXPECT_FALSE(set_msr(*cpu, 0xce, 0, Initiator::host));  // in use
  EXPECT_FALSE(write_faults(0x140, 0));
  EXPECT_TRUE(set_msr(*cpu, 0xce, 0, Initiator::host));
  EXPECT_TRUE(write_faults(0x140, 1));
}

TEST_F(Msr, XssHoldsNoComponents) {
  if (!supports(Feature::xsaves)) GTEST_SKIP();
  expect_holds(0xda0, 0);
  EXPECT_TRUE(write_faults(0xda0, 1 << 11));
  bare_cpu(true);
  EXPECT_TRUE(read_faults(0xda0));
  EXPECT_EQ(host_read(0xda0), 0u);
}

TEST_F(Msr, WhatLinuxTouchesOnAmd) {
  for (u32 index : {0xc0010010u, 0xc001001au, 0xc001001du, 0xc001001fu, 0xc0010055u, 0xc0010058u, 0xc0010112u,
                    0xc0010113u, 0xc0010117u, 0xc0011021u, 0xc0011022u, 0xc001102au, 0xc0010000u, 0xc0010007u})
    EXPECT_EQ(read(index), 0u) << std::hex << index;
  for (u32 index : {0xc001001fu, 0xc0010020u, 0xc0010117u, 0xc001102au, 0xc0010000u, 0xc0010004u})
    EXPECT_FALSE(write_faults(index, 0x1234)) << std::hex << index;
  EXPECT_EQ(read(0xc0010004), 0u);
  EXPECT_EQ(read(0xc0010015), 0u);  // setting TscFreqSel is the firmware's business
  expect_holds(0xc0010015, 1 << 24);
  EXPECT_FALSE(write_faults(0xc0010015, 1 << 3));  // accepted and forgotten
  EXPECT_EQ(read(0xc0010015), 0u);
  EXPECT_TRUE(write_faults(0xc0010015, 1 << 0));
  expect_holds(0xc0011029, 2);
  EXPECT_TRUE(write_faults(0xc0011029, 1 << 9));
  EXPECT_TRUE(write_faults(0xc0010058, 1));
}

TEST_F(Msr, ListedOnesCanBeReadAndWrittenBack) {
  for (u32 index : msr_index_list()) {
    if (index == 0x11 || index == 0x12 || index >> 8 == 0x4b564d) continue;  // paravirt/ answers for these
    u64 value = 0;
    EXPECT_TRUE(get_msr(*cpu, index, value, Initiator::host)) << std::hex << index;
    EXPECT_TRUE(set_msr(*cpu, index, value, Initiator::host)) << std::hex << index;
  }
  // Also when the client's CPUID names nothing.
  bare_cpu(true);
  for (u32 index : msr_index_list()) {
    if (index == 0x11 || index == 0x12 || index >> 8 == 0x4b564d) continue;
    u64 value = 0;
    EXPECT_TRUE(get_msr(*cpu, index, value, Initiator::host)) << std::hex << index;
    EXPECT_TRUE(set_msr(*cpu, index, 0, Initiator::host)) << std::hex << index;
  }
}

TEST(MsrFeatures, HaveValues) {
  for (u32 index : msr_feature_index_list()) {
    u64 value;
    EXPECT_TRUE(get_feature_msr(index, value)) << std::hex << index;
  }
  u64 value = 1;
  EXPECT_FALSE(get_feature_msr(0x174, value));
  EXPECT_EQ(value, 0u);
}

TEST(HostTsc, RunsAtTheMeasuredRate) {
  const u32 khz = os::host_tsc_khz();
  EXPECT_GT(khz, 100'000u);
  const os::ClockPair begin = os::read_tsc_and_clock(CLOCK_MONOTONIC_RAW);
  const timespec pause = {0, 100'000'000};
  nanosleep(&pause, nullptr);
  const os::ClockPair end = os::read_tsc_and_clock(CLOCK_MONOTONIC_RAW);
  const double measured = double(end.tsc - begin.tsc) * 1e6 / double(end.ns - begin.ns);
  EXPECT_NEAR(measured, khz, khz * 50e-6);
}

}  // namespace
}  // namespace anykvm::x86
