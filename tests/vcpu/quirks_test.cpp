// What a client can turn off of KVM's peculiarities, and what else it can set for the whole machine.
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

class Quirks : public TestMachine {
 protected:
  int enable(u32 cap, u64 value) { return machine->enable_cap({.cap = cap, .args = {value}}); }
  void start(std::initializer_list<u8> code) {
    if (vcpus.empty()) add_vcpu();
    EXPECT_EQ(vcpus[0]->set_cpuid2(x86::supported_cpuid()), 0);
    start_long_mode(*vcpus[0], code);
    for (const u8 vector : {u8{6}, u8{13}}) {
      set_gate(vector, code_at + 0x100 + vector * 0x10);
      put(code_at + 0x100 + vector * 0x10, {0xe6, vector});  // out vector, al
    }
  }
  void expect_port(u16 port) {
    EXPECT_EQ(vcpus[0]->run(), 0);
    ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
    EXPECT_EQ(run().io.port, port);
  }
};

TEST_F(Quirks, OnlyKnownOnesAreTaken) {
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, vm::Vm::quirks | 1ull << 40), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS, 1ull << 40), 0);  // the older call looks at no bit it does not know
}

TEST_F(Quirks, TheOtherVendorsHypercallIsPatchedOrUndefined) {
  const bool amd = [] {
    x86::Cpuid cpuid;
    EXPECT_EQ(cpuid.set(x86::supported_cpuid()), 0);
    return cpuid.vendor() == x86::Vendor::amd;
  }();
  const u8 foreign = amd ? 0xc1 : 0xd9, own = amd ? 0xd9 : 0xc1;
  start({0x0f, 0x01, foreign, 0xe6, 0x10});  // vmcall or vmmcall; out 0x10, al
  expect_port(0x10);
  EXPECT_EQ(load<u8>(code_at + 2), own);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN), 0);
  start({0x0f, 0x01, foreign, 0xe6, 0x10});
  expect_port(6);
  EXPECT_EQ(load<u8>(code_at + 2), foreign);
  start({0x0f, 0x01, own, 0xe6, 0x10});
  expect_port(0x10);
}

TEST_F(Quirks, MwaitIsNeverUndefinedUnlessTheClientWantsThat) {
  std::vector<kvm_cpuid_entry2> cpuid(x86::supported_cpuid().begin(), x86::supported_cpuid().end());
  for (kvm_cpuid_entry2& entry : cpuid)
    if (entry.function == 1) entry.ecx &= ~8u;
  add_vcpu();
  start_long_mode(*vcpus[0], {0x0f, 0x01, 0xc8, 0x0f, 0x01, 0xc9, 0xe6, 0x10});  // monitor; mwait; out 0x10, al
  EXPECT_EQ(vcpus[0]->set_cpuid2(cpuid), 0);
  set_gate(6, code_at + 0x100);
  put(code_at + 0x100, {0xe6, 6});
  expect_port(0x10);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS), 0);
  start_long_mode(*vcpus[0], {0x0f, 0x01, 0xc8, 0x0f, 0x01, 0xc9, 0xe6, 0x10});
  expect_port(6);
}

TEST_F(Quirks, OutIsBehindItsClientOnlyAtPort7e) {
  start({
      0xe6, 0x7e,  // out 0x7e, al
      0xe6, 0x7d,  // out 0x7d, al
      0x6e,        // outsb
      0xf4,        // hlt
  });
  expect_port(0x7e);
  EXPECT_EQ(regs().rip, code_at + 2);
  expect_port(0x7d);
  EXPECT_EQ(regs().rip, code_at + 2) << "until KVM_RUN";
  run().immediate_exit = 1;
  EXPECT_EQ(vcpus[0]->run(), -EINTR);
  run().immediate_exit = 0;
  EXPECT_EQ(regs().rip, code_at + 4);

  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP), 0);
  start({0xe6, 0x7e, 0xe6, 0x7d});
  expect_port(0x7e);
  EXPECT_EQ(regs().rip, code_at);
  kvm_regs moved = regs();
  moved.rip = code_at;
  EXPECT_EQ(vcpus[0]->set_regs(moved), 0);
  expect_port(0x7d);
  moved.rip = code_at + 2;  // where it is, which is no move
  EXPECT_EQ(vcpus[0]->set_regs(moved), 0);
  moved.rip = code_at;
  EXPECT_EQ(vcpus[0]->set_regs(moved), 0);
  expect_port(0x7e);
}

TEST_F(Quirks, MwaitFollowsItsSwitchWhenTheClientWantsThat) {
  constexpr u32 misc_enable = 0x1a0;
  const auto shows_mwait = [&] {
    u32 out[4];
    vcpus[0]->cpuid(1, 0, out);
    return (out[2] >> 3 & 1) != 0;
  };
  const auto set_switch = [&](bool on) {
    const kvm_msr_entry entry{.index = misc_enable, .data = on ? 0x41801u : 0x1801u};
    EXPECT_EQ(vcpus[0]->set_msrs({&entry, 1}), 1);
  };
  start({0xf4});
  const bool from_client = shows_mwait();
  set_switch(!from_client);
  EXPECT_EQ(shows_mwait(), from_client);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT), 0);
  EXPECT_EQ(vcpus[0]->set_cpuid2(x86::supported_cpuid()), 0);
  for (const bool on : {true, false}) {
    set_switch(on);
    EXPECT_EQ(shows_mwait(), on);
  }
}

TEST_F(Quirks, WithoutItsMmioHoleTheDisabledApicLeavesItsPage) {
  EXPECT_EQ(machine->create_irqchip(), 0);
  start({0xf4});
  const kvm_msr_entry off{.index = 0x1b, .data = 0xfee00100};
  EXPECT_EQ(vcpus[0]->set_msrs({&off, 1}), 1);
  u32 value = 0;
  EXPECT_TRUE(vcpus[0]->mmio_read(0xfee00020, &value, 4));
  EXPECT_EQ(value, ~0u);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LAPIC_MMIO_HOLE), 0);
  EXPECT_FALSE(vcpus[0]->mmio_read(0xfee00020, &value, 4));
}

TEST_F(Quirks, Lint0IsMaskedWithoutItsQuirk) {
  EXPECT_EQ(machine->create_irqchip(), 0);
  EXPECT_EQ(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LINT0_REENABLED), 0);
  kvm_lapic_state state;
  EXPECT_EQ(add_vcpu().get_lapic(state), 0);
  EXPECT_EQ(state.regs[0x352], 1);  // LVT0's mask bit
}

// --- other settings of a machine
// -------------------------------------------------------------------------------------

TEST_F(Quirks, PlatformInfoCanBeHidden) {
  start({0x0f, 0x32, 0xe6, 0x10});  // rdmsr; out 0x10, al
  kvm_regs r = regs();
  r.rcx = 0xce;
  EXPECT_EQ(vcpus[0]->set_regs(r), 0);
  EXPECT_EQ(enable(KVM_CAP_MSR_PLATFORM_INFO, 0), 0);
  expect_port(13);
  EXPECT_EQ(vcpus[0]->set_regs(r), 0);
  EXPECT_EQ(enable(KVM_CAP_MSR_PLATFORM_INFO, 1), 0);
  expect_port(0x10);
}

TEST_F(Quirks, TheApicTimersClockCanBeSet) {
  EXPECT_EQ(enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, ~0ull), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 40), -ENXIO);
  EXPECT_EQ(machine->create_irqchip(), 0);
  EXPECT_EQ(enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 1000), 0);
  vcpu::Vcpu& vcpu = add_vcpu();
  EXPECT_EQ(enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 40), -EINVAL);
  u32 enabled = 0x1ff, initial = 100'000'000, current = 0;
  vcpu.mmio_write(0xfee000f0, &enabled, 4);
  const u64 began = os::monotonic_ns();
  vcpu.mmio_write(0xfee00380, &initial, 4);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  vcpu.mmio_read(0xfee00390, &current, 4);
  const u64 took = os::monotonic_ns() - began;
  // Divided by two: a tick is 2 us.
  EXPECT_GE(initial - current, 20'000'000 / 2000 - 1);
  EXPECT_LE(initial - current, took / 2000 + 1);
}

TEST_F(Quirks, VcpuIdsAndTheBootCpusKeepToTheirLimit) {
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 4097), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 0), 0);  // that it is not set
  EXPECT_EQ(machine->set_boot_cpu_id(5), 0);
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 4), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 8), 0);
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 9), -EINVAL);
  EXPECT_EQ(enable(KVM_CAP_MAX_VCPU_ID, 8), 0);
  EXPECT_EQ(machine->set_boot_cpu_id(9), -EINVAL);
  std::shared_ptr<vcpu::Vcpu> vcpu;
  EXPECT_EQ(machine->create_vcpu(8, nullptr, vcpu), -EINVAL);
  add_vcpu();
  EXPECT_EQ(machine->set_boot_cpu_id(0), -EBUSY);
}

}  // namespace
}  // namespace anykvm
