// The client's filter of MSRs, and the accesses that it answers itself.
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

class UserMsr : public TestMachine {
 protected:
  static constexpr u32 known = 0x277 /* PAT */, unknown = 0x12345;

  UserMsr() {
    add_vcpu();
    EXPECT_EQ(vcpus[0]->set_cpuid2(x86::supported_cpuid()), 0);
    set_gate(13, code_at + 0x100);
    put(code_at + 0x100, {0xe6, 0x0d, 0xf4});  // #GP: out 0x0d, al; hlt
  }
  int enable(u64 reasons) { return machine->enable_cap({.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {reasons}}); }
  /// Denies reads and writes as given for one MSR.
  int deny(u32 index, u32 access) {
    u64 none = 0;
    kvm_msr_filter filter{};
    filter.ranges[0] = {.flags = access, .nmsrs = 1, .base = index, .bitmap = reinterpret_cast<u8*>(&none)};
    return machine->x86_set_msr_filter(filter);
  }
  void start(bool write, u32 index, u64 value = 0) {
    start_long_mode(*vcpus[0], {
                                   0x0f, u8(write ? 0x30 : 0x32),  // wrmsr or rdmsr
                                   0xe6, 0x10,                     // out 0x10, al
                               });
    kvm_regs r = regs();
    r.rcx = index, r.rax = u32(value), r.rdx = value >> 32;
    EXPECT_EQ(vcpus[0]->set_regs(r), 0);
    EXPECT_EQ(vcpus[0]->run(), 0);
  }
  void expect_msr_exit(u32 exit, u32 reason, u32 index) {
    ASSERT_EQ(run().exit_reason, exit);
    EXPECT_EQ(run().msr.reason, reason);
    EXPECT_EQ(run().msr.index, index);
    EXPECT_EQ(run().msr.error, 0);
    EXPECT_EQ(regs().rip, code_at);
  }
  void expect_port(u16 port) {
    ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
    EXPECT_EQ(run().io.port, port);
  }
};

TEST_F(UserMsr, WithoutEitherAnUnknownOneFaults) {
  start(false, unknown);
  expect_port(0x0d);
}

TEST_F(UserMsr, TheClientAnswersAReadOfAnUnknownOne) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN), 0);
  start(false, unknown);
  expect_msr_exit(KVM_EXIT_X86_RDMSR, KVM_MSR_EXIT_REASON_UNKNOWN, unknown);
  run().msr.data = 0x1122334455667788;
  EXPECT_EQ(vcpus[0]->run(), 0);
  expect_port(0x10);
  EXPECT_EQ(regs().rax, 0x55667788u);
  EXPECT_EQ(regs().rdx, 0x11223344u);
}

TEST_F(UserMsr, TheClientsErrorIsTheGuestsFault) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN), 0);
  for (const bool write : {false, true}) {
    start(write, unknown);
    ASSERT_EQ(run().exit_reason, u32(write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR));
    run().msr.error = 1;
    EXPECT_EQ(vcpus[0]->run(), 0);
    expect_port(0x0d);
  }
}

TEST_F(UserMsr, AWriteBringsItsValue) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL), 0);
  start(true, unknown, 0xaabbccdd11223344);
  expect_msr_exit(KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_UNKNOWN, unknown);
  EXPECT_EQ(run().msr.data, 0xaabbccdd11223344u);
  EXPECT_EQ(vcpus[0]->run(), 0);
  expect_port(0x10);
}

TEST_F(UserMsr, AValueThatAKnownOneRefusesIsInvalid) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN), 0);
  start(true, known, 0xffff);
  expect_port(0x0d);
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_INVAL), 0);
  start(true, known, 0xffff);
  expect_msr_exit(KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_INVAL, known);
}

TEST_F(UserMsr, WhatTheFilterDeniesFaultsOrIsTheClients) {
  EXPECT_EQ(deny(known, KVM_MSR_FILTER_READ), 0);
  start(false, known);
  expect_port(0x0d);
  start(true, known, 0);
  expect_port(0x10);  // writes are not denied
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_FILTER), 0);
  start(false, known);
  expect_msr_exit(KVM_EXIT_X86_RDMSR, KVM_MSR_EXIT_REASON_FILTER, known);
  // Taken back while the client thinks: its answer is still the one.
  EXPECT_EQ(machine->x86_set_msr_filter({}), 0);
  run().msr.data = 42;
  EXPECT_EQ(vcpus[0]->run(), 0);
  expect_port(0x10);
  EXPECT_EQ(regs().rax, 42u);
  start(false, known);
  expect_port(0x10);
  EXPECT_EQ(regs().rax, 0u);
}

TEST_F(UserMsr, DenyByDefaultAllowsWhatTheBitmapsAllow) {
  u64 bitmap = 1 << 7;
  kvm_msr_filter filter{.flags = KVM_MSR_FILTER_DEFAULT_DENY};
  filter.ranges[3] = {
      .flags = KVM_MSR_FILTER_READ, .nmsrs = 8, .base = 0x270, .bitmap = reinterpret_cast<u8*>(&bitmap)};
  EXPECT_EQ(machine->x86_set_msr_filter(filter), 0);
  start(false, 0x277);
  expect_port(0x10);
  start(false, 0x276);
  expect_port(0x0d);
  start(true, 0x277, 0);
  expect_port(0x0d);
  start(false, 0x278);
  expect_port(0x0d);
}

TEST_F(UserMsr, AnotherRipDropsTheAnswer) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN), 0);
  start(false, unknown);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_X86_RDMSR});
  kvm_regs r = regs();
  r.rip += 2, r.rax = 7;
  EXPECT_EQ(vcpus[0]->set_regs(r), 0);
  EXPECT_EQ(vcpus[0]->run(), 0);
  expect_port(0x10);
  EXPECT_EQ(regs().rax, 7u);
}

TEST_F(UserMsr, ImmediateExitFinishesTheInstructionFirst) {
  EXPECT_EQ(enable(KVM_MSR_EXIT_REASON_UNKNOWN), 0);
  start(false, unknown);
  run().msr.data = 5;
  run().immediate_exit = 1;
  EXPECT_EQ(vcpus[0]->run(), -EINTR);
  EXPECT_EQ(regs().rip, code_at + 2);
  EXPECT_EQ(regs().rax, 5u);
}

TEST_F(UserMsr, BadFiltersAndReasonsAreRefused) {
  EXPECT_EQ(enable(8), -EINVAL);
  u64 bitmap = 0;
  kvm_msr_filter filter{.flags = 2};
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EINVAL);
  filter.flags = KVM_MSR_FILTER_DEFAULT_DENY;  // and nothing allowed
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EINVAL);
  filter.flags = 0;
  const kvm_msr_filter_range good{
      .flags = KVM_MSR_FILTER_READ, .nmsrs = 1, .base = 0, .bitmap = reinterpret_cast<u8*>(&bitmap)};
  filter.ranges[0] = good, filter.ranges[0].flags = 0;
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EINVAL);
  filter.ranges[0] = good, filter.ranges[0].flags = 4;
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EINVAL);
  filter.ranges[0] = good, filter.ranges[0].nmsrs = 0x600 * 8 + 1;
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EINVAL);
  filter.ranges[0] = good, filter.ranges[0].bitmap = reinterpret_cast<u8*>(8);
  EXPECT_EQ(machine->x86_set_msr_filter(filter), -EFAULT);
}

}  // namespace
}  // namespace anykvm
