// The calls of later years: device attributes, machine checks, the old forms of new calls, and what a kernel built
// without something answers.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "abi/client.h"
#include "x86/cpuid.h"
#include "x86/msr.h"

namespace anykvm::abi {
namespace {

using Msrs = Counted<kvm_msrs, kvm_msr_entry>;

u64 get_msr(const TestMachine& machine, u32 index) {
  Msrs msrs(1);
  msrs.header()->nmsrs = 1;
  msrs.entries()[0].index = index;
  EXPECT_EQ(1, machine.vcpu.call(KVM_GET_MSRS, msrs.header()));
  return msrs.entries()[0].data;
}
void set_msr(const TestMachine& machine, u32 index, u64 value) {
  Msrs msrs(1);
  msrs.header()->nmsrs = 1;
  msrs.entries()[0] = {.index = index, .data = value};
  EXPECT_EQ(1, machine.vcpu.call(KVM_SET_MSRS, msrs.header()));
}

// --- device attributes
// --------------------------------------------------------------------------------------------------

TEST(DeviceAttributes, TheSystemSaysWhichStateComponentsAGuestMayHave) {
  const TestMachine machine;
  u64 xcr0 = 0;
  kvm_device_attr attr{.group = 0, .attr = KVM_X86_XCOMP_GUEST_SUPP, .addr = reinterpret_cast<u64>(&xcr0)};
  EXPECT_EQ(0, machine.system.call(KVM_HAS_DEVICE_ATTR, &attr));
  EXPECT_EQ(0u, xcr0);
  EXPECT_EQ(0, machine.system.call(KVM_GET_DEVICE_ATTR, &attr));
  EXPECT_EQ(x86::supported_xcr0(), xcr0);

  attr.addr = reinterpret_cast<u64>(GuardedPage().bad());
  EXPECT_EQ(-EFAULT, machine.system.call(KVM_GET_DEVICE_ATTR, &attr));
  attr.attr = 77;
  EXPECT_EQ(-ENXIO, machine.system.call(KVM_HAS_DEVICE_ATTR, &attr));
  EXPECT_EQ(-ENXIO, machine.system.call(KVM_GET_DEVICE_ATTR, &attr));
  attr = {.group = 1, .attr = 0};
  EXPECT_EQ(-ENXIO, machine.system.call(KVM_HAS_DEVICE_ATTR, &attr));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_SET_DEVICE_ATTR, &attr));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_HAS_DEVICE_ATTR, &attr));
}

TEST(DeviceAttributes, TheOffsetOfAVcpusTsc) {
  TestMachine machine;
  machine.add_vcpu();
  u64 offset = 0;
  kvm_device_attr attr{.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = reinterpret_cast<u64>(&offset)};
  EXPECT_EQ(0, machine.vcpu.call(KVM_HAS_DEVICE_ATTR, &attr));
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_DEVICE_ATTR, &attr));
  const u64 before = offset;
  EXPECT_LT(get_msr(machine, 0x10), 1ull << 40);  // it started at 0
  offset = before + (1ull << 50);
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_DEVICE_ATTR, &attr));
  EXPECT_GE(get_msr(machine, 0x10), 1ull << 50);
  offset = 0;
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_DEVICE_ATTR, &attr));
  EXPECT_EQ(before + (1ull << 50), offset);

  attr.addr = reinterpret_cast<u64>(GuardedPage().bad());
  EXPECT_EQ(-EFAULT, machine.vcpu.call(KVM_GET_DEVICE_ATTR, &attr));
  EXPECT_EQ(-EFAULT, machine.vcpu.call(KVM_SET_DEVICE_ATTR, &attr));
  attr.attr = 1;
  for (const unsigned long call : {KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR}) {
    EXPECT_EQ(-ENXIO, machine.vcpu.call(call, &attr));
  }
  attr = {.group = KVM_VCPU_TSC_CTRL + 1, .attr = KVM_VCPU_TSC_OFFSET};
  EXPECT_EQ(-ENXIO, machine.vcpu.call(KVM_HAS_DEVICE_ATTR, &attr));
}

TEST(CreateDevice, NoKindIsThere) {
  const TestMachine machine;
  for (const u32 type : {u32{KVM_DEV_TYPE_VFIO}, u32{KVM_DEV_TYPE_ARM_VGIC_V3}, 1000u}) {
    kvm_create_device device{.type = type, .flags = KVM_CREATE_DEVICE_TEST};
    EXPECT_EQ(-ENODEV, machine.vm.call(KVM_CREATE_DEVICE, &device));
    device.flags = 0;
    EXPECT_EQ(-ENODEV, machine.vm.call(KVM_CREATE_DEVICE, &device));
  }
}

// --- machine checks
// -----------------------------------------------------------------------------------------------------

constexpr u64 mci_valid = 1ull << 63, mci_overflow = 1ull << 62, mci_uncorrected = 1ull << 61, mci_enabled = 1ull << 60,
              mci_corrupt = 1ull << 57;
constexpr u32 mcg_status = 0x17a, bank1_status = 0x405, bank1_addr = 0x406;

struct MceMachine : TestMachine {
  explicit MceMachine(bool with_irqchip = false) {
    if (with_irqchip) {
      EXPECT_EQ(0, vm.call(KVM_CREATE_IRQCHIP));
    }
    add_vcpu();
    u64 capabilities = 0;
    EXPECT_EQ(0, system.call(KVM_X86_GET_MCE_CAP_SUPPORTED, &capabilities));
    capabilities |= 10;
    EXPECT_EQ(0, vcpu.call(KVM_X86_SETUP_MCE, &capabilities));
  }
  long inject(u64 status, u64 addr = 0, u64 mcg = 0, u8 bank = 1) {
    kvm_x86_mce error{.status = status, .addr = addr, .mcg_status = mcg, .bank = bank};
    return vcpu.call(KVM_X86_SET_MCE, &error);
  }
  kvm_vcpu_events events() {
    kvm_vcpu_events events;
    EXPECT_EQ(0, vcpu.call(KVM_GET_VCPU_EVENTS, &events));
    return events;
  }
};

TEST(MachineCheck, SetupTakesWhatIsSupported) {
  MceMachine machine;
  EXPECT_EQ(static_cast<long>(x86::mc_banks), machine.system.call(KVM_CHECK_EXTENSION, u64{KVM_CAP_MCE}));
  for (u64 bad : {u64{0}, u64{33}, u64{10} | u64{1} << 40}) {
    EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_X86_SETUP_MCE, &bad));
  }
  EXPECT_EQ(10u, get_msr(machine, 0x179) & 0xff);
}

TEST(MachineCheck, ACorrectedErrorIsRecorded) {
  MceMachine machine;
  EXPECT_EQ(-EINVAL, machine.inject(mci_valid, 0, 0, 10));  // no such bank
  EXPECT_EQ(-EINVAL, machine.inject(mci_enabled));          // not valid
  EXPECT_EQ(0, machine.inject(mci_valid | 5, 0x1000));
  EXPECT_EQ(mci_valid | 5, get_msr(machine, bank1_status));
  EXPECT_EQ(0x1000u, get_msr(machine, bank1_addr));
  EXPECT_EQ(0, machine.inject(mci_valid | 6, 0x2000));
  EXPECT_EQ(mci_valid | mci_overflow | 6, get_msr(machine, bank1_status));
  EXPECT_FALSE(machine.events().exception.injected);
}

TEST(MachineCheck, AnUncorrectedErrorIsAnException) {
  MceMachine machine;
  kvm_sregs sregs;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_SREGS, &sregs));
  sregs.cr4 |= 1 << 6;
  ASSERT_EQ(0, machine.vcpu.call(KVM_SET_SREGS, &sregs));
  EXPECT_EQ(0, machine.inject(mci_valid | mci_uncorrected | mci_enabled | mci_corrupt, 0x3000, 5));
  EXPECT_EQ(5u, get_msr(machine, mcg_status));
  EXPECT_EQ(0x3000u, get_msr(machine, bank1_addr));
  EXPECT_TRUE(machine.events().exception.injected);
  EXPECT_EQ(18, machine.events().exception.nr);
  // A second one while the first is being handled shuts the machine down.
  EXPECT_EQ(0, machine.inject(mci_valid | mci_uncorrected | mci_enabled | mci_corrupt, 0x4000, 5));
  EXPECT_EQ(0x3000u, get_msr(machine, bank1_addr));
  ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
  EXPECT_EQ(u32{KVM_EXIT_SHUTDOWN}, machine.run->exit_reason);
}

TEST(MachineCheck, AnErrorWithoutActionIsACmciWhereTheBankSignalsIt) {
  constexpr u32 lvt_cmci = 0x2f0, svr = 0xf0, irr_of_vectors_from_e0 = 0x270, bank1_ctl2 = 0x281;
  MceMachine machine{true};
  kvm_lapic_state lapic;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_LAPIC, &lapic));
  lapic.regs[svr + 1] = 1;  // enabled
  const u32 vector = 0xe2;
  std::memcpy(lapic.regs + lvt_cmci, &vector, sizeof vector);
  ASSERT_EQ(0, machine.vcpu.call(KVM_SET_LAPIC, &lapic));
  for (const u64 enable : {u64{0}, u64{1} << 30}) {
    set_msr(machine, bank1_ctl2, enable);
    EXPECT_EQ(0, machine.inject(mci_valid | mci_uncorrected | mci_enabled, 0x5000));
    EXPECT_EQ(0x5000u, get_msr(machine, bank1_addr));
    ASSERT_EQ(0, machine.vcpu.call(KVM_GET_LAPIC, &lapic));
    EXPECT_EQ(enable ? 4 : 0, lapic.regs[irr_of_vectors_from_e0]);
  }
}

TEST(MachineCheck, ADisabledBankReportsNothing) {
  MceMachine machine;
  set_msr(machine, 0x404, 0);
  EXPECT_EQ(0, machine.inject(mci_valid | mci_uncorrected | mci_corrupt, 0, 5));
  EXPECT_EQ(0u, get_msr(machine, bank1_status));
}

TEST(MachineCheck, AnErrorThatNeedsNoActionIsOnlyRecorded) {
  MceMachine machine;
  EXPECT_EQ(0, machine.inject(mci_valid | mci_uncorrected, 0x5000));
  EXPECT_EQ(0x5000u, get_msr(machine, bank1_addr));
  EXPECT_FALSE(machine.events().exception.injected);
}

// --- old forms
// ----------------------------------------------------------------------------------------------------------

TEST(OldCalls, SetCpuidHasNoSubleaves) {
  TestMachine machine;
  machine.add_vcpu();
  Counted<kvm_cpuid, kvm_cpuid_entry> old(2);
  old.header()->nent = 2;
  old.entries()[0] = {.function = 0, .eax = 1, .ebx = 2};
  old.entries()[1] = {.function = 1, .ecx = 4};
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_CPUID, old.header()));
  Counted<kvm_cpuid2, kvm_cpuid_entry2> back(2);
  back.header()->nent = 2;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_CPUID2, back.header()));
  EXPECT_EQ(2u, back.header()->nent);
  EXPECT_EQ(2u, back.entries()[0].ebx);
  EXPECT_EQ(0u, back.entries()[0].flags);
  old.header()->nent = 257;
  EXPECT_EQ(-E2BIG, machine.vcpu.call(KVM_SET_CPUID, old.header()));
  const GuardedPage page;
  auto* cut = page.at_end<kvm_cpuid>(sizeof(kvm_cpuid) + 8);
  cut->nent = 1;
  EXPECT_EQ(-EFAULT, machine.vcpu.call(KVM_SET_CPUID, cut));
}

TEST(OldCalls, CreatePitIsPit2WithASpeaker) {
  const TestMachine machine;
  kvm_pit_state state{};
  EXPECT_EQ(-ENXIO, machine.vm.call(KVM_GET_PIT, &state));
  EXPECT_EQ(-ENXIO, machine.vm.call(KVM_SET_PIT, &state));
  EXPECT_EQ(-ENOENT, machine.vm.call(KVM_CREATE_PIT));
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_IRQCHIP));
  EXPECT_EQ(0, machine.vm.call(KVM_CREATE_PIT));
  EXPECT_EQ(-EEXIST, machine.vm.call(KVM_CREATE_PIT));
  ASSERT_EQ(0, machine.vm.call(KVM_GET_PIT, &state));
  state.channels[2].count = 1234;
  state.channels[2].mode = 3;
  EXPECT_EQ(0, machine.vm.call(KVM_SET_PIT, &state));
  kvm_pit_state2 both;
  ASSERT_EQ(0, machine.vm.call(KVM_GET_PIT2, &both));
  EXPECT_EQ(1234u, both.channels[2].count);
}

TEST(OldCalls, TheShadowMmusSizeIsAHint) {
  const TestMachine machine;
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_SET_NR_MMU_PAGES, 63ul));
  EXPECT_EQ(0, machine.vm.call(KVM_SET_NR_MMU_PAGES, 64ul));
}

TEST(Vapic, ItsWordCarriesTheTprBothWays) {
  static const unsigned char code[] = {
      0x31, 0xc0,                    // xor ax, ax
      0xa0, 0x00, 0x20,              // mov al, [0x2000]
      0xc6, 0x06, 0x00, 0x20, 0x50,  // mov byte [0x2000], 0x50
      0xe6, 0x10,                    // out 0x10, al
  };
  GuestMachine machine(code, true);
  kvm_vapic_addr address{.vapic_addr = 0x2000};
  kvm_lapic_state lapic;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_LAPIC, &lapic));
  lapic.regs[0x80] = 0x35;
  ASSERT_EQ(0, machine.vcpu.call(KVM_SET_LAPIC, &lapic));
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_VAPIC_ADDR, &address));
  ASSERT_EQ(0, machine.vcpu.call(KVM_RUN));
  ASSERT_EQ(u32{KVM_EXIT_IO}, machine.run->exit_reason);
  EXPECT_EQ(0x35, reinterpret_cast<u8*>(machine.run)[machine.run->io.data_offset]);
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_LAPIC, &lapic));
  EXPECT_EQ(0x50, lapic.regs[0x80]);

  address.vapic_addr = 0x100000;  // no RAM
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_SET_VAPIC_ADDR, &address));
  address.vapic_addr = 0;
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_VAPIC_ADDR, &address));
  TestMachine without;
  without.add_vcpu();
  EXPECT_EQ(-EINVAL, without.vcpu.call(KVM_SET_VAPIC_ADDR, &address));
}

TEST(Vapic, TprAccessesNeverExit) {
  TestMachine machine;
  machine.add_vcpu();
  kvm_tpr_access_ctl control{.enabled = 1};
  EXPECT_EQ(0, machine.vcpu.call(KVM_TPR_ACCESS_REPORTING, &control));
  control.flags = 1;
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_TPR_ACCESS_REPORTING, &control));
}

// --- as a kernel built without
// ------------------------------------------------------------------------------------------

TEST(NotThere, AnswersAsAKernelWithoutIt) {
  TestMachine machine;
  machine.add_vcpu();
  char argument[4096] = {};
  EXPECT_EQ(-ENOTTY, machine.vcpu.call(KVM_SMI));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_GET_NESTED_STATE, argument));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_SET_NESTED_STATE, argument));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_GET_SUPPORTED_HV_CPUID, argument));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_GET_SUPPORTED_HV_CPUID, argument));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_XEN_VCPU_GET_ATTR, argument));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_XEN_HVM_CONFIG, argument));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_MEMORY_ENCRYPT_OP, argument));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_SET_PMU_EVENT_FILTER, argument));
  for (const unsigned long capability :
       {KVM_CAP_X86_SMM, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_NESTED_STATE, KVM_CAP_HYPERV, KVM_CAP_XEN_HVM,
        KVM_CAP_PMU_CAPABILITY, KVM_CAP_PMU_EVENT_FILTER, KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_X86_BUS_LOCK_EXIT}) {
    EXPECT_EQ(0, machine.system.call(KVM_CHECK_EXTENSION, capability)) << capability;
    kvm_enable_cap cap{.cap = static_cast<u32>(capability)};
    EXPECT_EQ(-EINVAL, machine.vm.call(KVM_ENABLE_CAP, &cap)) << capability;
    EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_ENABLE_CAP, &cap)) << capability;
  }
}

}  // namespace
}  // namespace anykvm::abi
