// Every ioctl's way in and out: what a good call does, and which errno a bad one gets.
#include <asm/ioctls.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "abi/client.h"
#include "abi/ioctl_table.h"
#include "x86/cpuid.h"
#include "x86/msr.h"

namespace anykvm::abi {
namespace {

using Cpuid = Counted<kvm_cpuid2, kvm_cpuid_entry2>;
using Msrs = Counted<kvm_msrs, kvm_msr_entry>;

// --- any descriptor
// -----------------------------------------------------------------------------------------------------

TEST(Ioctl, UnknownNumbersGetTheKernelsErrorOfEachDescriptor) {
  TestMachine machine;
  machine.add_vcpu();
  for (const u32 number : {u32{_IO(KVMIO, 0xff)}, u32{KVM_S390_INTERRUPT}, u32{_IO('x', 1)}}) {
    EXPECT_EQ(-EINVAL, machine.system.call(number)) << std::hex << number;
    EXPECT_EQ(-ENOTTY, machine.vm.call(number)) << std::hex << number;
    EXPECT_EQ(-EINVAL, machine.vcpu.call(number)) << std::hex << number;
  }
}

TEST(Ioctl, CallsOfAnotherKindOfDescriptorAreUnknown) {
  TestMachine machine;
  machine.add_vcpu();
  kvm_regs regs;
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_GET_REGS, &regs));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_GET_REGS, &regs));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_CREATE_IRQCHIP));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_CREATE_IRQCHIP));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_CREATE_VM));
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_GET_API_VERSION));
  EXPECT_EQ(-ENOTTY, machine.vm.call(KVM_RUN));
}

TEST(Ioctl, ForeignDescriptorsAreRefused) {
  EXPECT_EQ(-EBADF, abi::ioctl(0, KVM_GET_API_VERSION, 0));
  EXPECT_EQ(-EBADF, abi::ioctl(-1, KVM_GET_API_VERSION, 0));
  EXPECT_FALSE(abi::owns(0));
}

TEST(Ioctl, OnlyTheLow32BitsOfTheNumberCount) {
  const TestMachine machine;
  EXPECT_EQ(KVM_API_VERSION, machine.system.call(0xffffffff'00000000ul | KVM_GET_API_VERSION));
}

TEST(Ioctl, TheDescriptorsOwnRequestsWork) {
  const TestMachine machine;
  EXPECT_TRUE(fcntl(machine.vm.get(), F_GETFD) & FD_CLOEXEC);
  EXPECT_EQ(0, machine.vm.call(FIONCLEX));
  EXPECT_FALSE(fcntl(machine.vm.get(), F_GETFD) & FD_CLOEXEC);
}

TEST(Ioctl, ABadPointerIsEfaultWhereverTheKernelLooksAtIt) {
  // Every row with a structure. Some look at the machine first, and say what is missing there.
  TestMachine machine;
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_IRQCHIP));
  kvm_pit_config pit{};
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_PIT2, &pit));
  machine.add_vcpu();
  const GuardedPage page;
  for (const Ioctl& row : ioctls()) {
    if (row.argument == Argument::none || row.argument == Argument::value) continue;
    if (row.number == KVM_SET_IDENTITY_MAP_ADDR) continue;  // EINVAL once there are vCPUs
    const TestFd& fd = row.fd == FdKind::system ? machine.system : row.fd == FdKind::vm ? machine.vm : machine.vcpu;
    EXPECT_EQ(-EFAULT, fd.call(row.number, page.bad())) << row.name;
    if (row.number != KVM_SET_SIGNAL_MASK) {
      EXPECT_EQ(-EFAULT, fd.call(row.number, 0ul)) << row.name;
    }
    if (row.size > 1) {  // the last byte is out of reach
      u8* const end = page.at_end<u8>(row.size - 1);
      std::memset(end, 0, row.size - 1);
      EXPECT_EQ(-EFAULT, fd.call(row.number, end)) << row.name;
    }
  }
}

// --- the system
// ---------------------------------------------------------------------------------------------------------

TEST(SystemIoctl, ApiVersionAndSizesTakeNoArgument) {
  const TestMachine machine;
  EXPECT_EQ(12, machine.system.call(KVM_GET_API_VERSION));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_GET_API_VERSION, 1ul));
  EXPECT_EQ(3 * 4096, machine.system.call(KVM_GET_VCPU_MMAP_SIZE));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_GET_VCPU_MMAP_SIZE, 1ul));
}

TEST(SystemIoctl, CreateVmTakesTypeZero) {
  const TestMachine machine;
  EXPECT_GE(machine.vm.get(), 0);
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_CREATE_VM, 1ul));
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_CREATE_VM, ~0ul));
}

TEST(SystemIoctl, ExtensionsAreTheSameOnTheSystemAndOnAVm) {
  const TestMachine machine;
  for (unsigned long number = 0; number < 300; ++number)
    EXPECT_EQ(machine.system.call(KVM_CHECK_EXTENSION, number), machine.vm.call(KVM_CHECK_EXTENSION, number)) << number;
  EXPECT_EQ(0, machine.system.call(KVM_CHECK_EXTENSION, 12345ul));
}

TEST(SystemIoctl, MsrListsReportTheirSizeAndThenTheirContents) {
  const TestMachine machine;
  for (const unsigned long number : {KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST}) {
    const auto expected = number == KVM_GET_MSR_INDEX_LIST ? x86::msr_index_list() : x86::msr_feature_index_list();
    kvm_msr_list probe{.nmsrs = 0};
    EXPECT_EQ(expected.empty() ? 0 : -E2BIG, machine.system.call(number, &probe));
    EXPECT_EQ(expected.size(), probe.nmsrs);

    Counted<kvm_msr_list, u32> list(probe.nmsrs + 3);
    list.header()->nmsrs = probe.nmsrs + 3;
    EXPECT_EQ(0, machine.system.call(number, list.header()));
    EXPECT_EQ(expected.size(), list.header()->nmsrs);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), list.entries()));

    list.header()->nmsrs = probe.nmsrs - 1;
    EXPECT_EQ(-E2BIG, machine.system.call(number, list.header()));
    EXPECT_EQ(expected.size(), list.header()->nmsrs);
  }
}

TEST(SystemIoctl, SupportedCpuidWantsRoomForAllAndLeavesTheCountWhenThereIsTooLittle) {
  const TestMachine machine;
  const u32 needed = static_cast<u32>(x86::supported_cpuid().size());
  for (const u32 room : {0u, 1u, needed - 1}) {
    Cpuid cpuid(room);
    cpuid.header()->nent = room;
    EXPECT_EQ(-E2BIG, machine.system.call(KVM_GET_SUPPORTED_CPUID, cpuid.header())) << room;
    EXPECT_EQ(room, cpuid.header()->nent);
  }
  for (const u32 room : {needed, needed + 1, 100'000u}) {
    Cpuid cpuid(needed);  // a client may claim more room than it has
    cpuid.header()->nent = room;
    EXPECT_EQ(0, machine.system.call(KVM_GET_SUPPORTED_CPUID, cpuid.header())) << room;
    EXPECT_EQ(needed, cpuid.header()->nent);
    EXPECT_EQ(0, std::memcmp(cpuid.entries(), x86::supported_cpuid().data(), needed * sizeof(kvm_cpuid_entry2)));
  }
}

TEST(SystemIoctl, SupportedCpuidIntoAReadOnlyEndIsEfault) {
  const TestMachine machine;
  const GuardedPage page;
  auto* header = page.at_end<kvm_cpuid2>(sizeof(kvm_cpuid2) + sizeof(kvm_cpuid_entry2));
  header->nent = 256;
  EXPECT_EQ(-EFAULT, machine.system.call(KVM_GET_SUPPORTED_CPUID, header));
}

TEST(SystemIoctl, EmulatedCpuidInsistsOnCleanPadding) {
  const TestMachine machine;
  Cpuid cpuid(256);
  cpuid.header()->nent = 256;
  EXPECT_EQ(0, machine.system.call(KVM_GET_EMULATED_CPUID, cpuid.header()));
  EXPECT_EQ(x86::emulated_cpuid().size(), cpuid.header()->nent);
  cpuid.header()->nent = 256;
  cpuid.entries()[3].padding[1] = 1;
  EXPECT_EQ(-EINVAL, machine.system.call(KVM_GET_EMULATED_CPUID, cpuid.header()));
}

TEST(SystemIoctl, FeatureMsrsCanBeRead) {
  const TestMachine machine;
  const auto features = x86::msr_feature_index_list();
  Msrs msrs(static_cast<u32>(features.size()) + 1);
  for (std::size_t i = 0; i < features.size(); ++i) msrs.entries()[i].index = features[i];
  msrs.entries()[features.size()].index = 0xdead'0000;
  msrs.header()->nmsrs = static_cast<u32>(features.size()) + 1;
  EXPECT_EQ(static_cast<long>(features.size()), machine.system.call(KVM_GET_MSRS, msrs.header()));
}

// --- a VM
// ---------------------------------------------------------------------------------------------------------------

TEST(VmIoctl, CreateVcpuChecksItsId) {
  const TestMachine machine;
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_CREATE_VCPU, 4096ul));
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_CREATE_VCPU, 1ul << 32));
  const TestFd first(machine.vm.call(KVM_CREATE_VCPU, 5ul));
  EXPECT_GE(first.get(), 0);
  EXPECT_EQ(-EEXIST, machine.vm.call(KVM_CREATE_VCPU, 5ul));
  EXPECT_TRUE(fcntl(first.get(), F_GETFD) & FD_CLOEXEC);
}

TEST(VmIoctl, GsiRoutingChecksItsHeaderAndItsEntries) {
  const TestMachine machine;
  using Routing = Counted<kvm_irq_routing, kvm_irq_routing_entry>;
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_IRQCHIP));
  Routing routing(2);
  routing.entries()[0] = {.gsi = 3, .type = KVM_IRQ_ROUTING_IRQCHIP};
  routing.entries()[0].u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = 3};
  routing.entries()[1] = {.gsi = 30, .type = KVM_IRQ_ROUTING_MSI};
  routing.header()->nr = 2;
  EXPECT_EQ(0, machine.vm.call(KVM_SET_GSI_ROUTING, routing.header()));
  routing.header()->flags = 1;
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_SET_GSI_ROUTING, routing.header()));
  routing.header()->flags = 0;
  routing.header()->nr = 4097;
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_SET_GSI_ROUTING, routing.header()));
  routing.header()->nr = 0;
  EXPECT_EQ(0, machine.vm.call(KVM_SET_GSI_ROUTING, routing.header()));
  const GuardedPage page;
  auto* short_list = page.at_end<kvm_irq_routing>(sizeof(kvm_irq_routing) + sizeof(kvm_irq_routing_entry));
  *short_list = {.nr = 2};
  EXPECT_EQ(-EFAULT, machine.vm.call(KVM_SET_GSI_ROUTING, short_list));
}

TEST(VmIoctl, IrqLineStatusReportsAndIrqLineDoesNot) {
  const TestMachine machine;
  kvm_irq_level level{.irq = 4, .level = 1};
  EXPECT_EQ(-ENXIO, machine.vm.call(KVM_IRQ_LINE, &level));
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_IRQCHIP));
  EXPECT_EQ(0, machine.vm.call(KVM_IRQ_LINE, &level));
  EXPECT_EQ(1u, level.level);
  EXPECT_EQ(0, machine.vm.call(KVM_IRQ_LINE_STATUS, &level));
}

// --- a vCPU
// -------------------------------------------------------------------------------------------------------------

TEST(VcpuIoctl, RunTakesNoArgument) {
  TestMachine machine;
  machine.add_vcpu();
  EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_RUN, 1ul));
  machine.run->immediate_exit = 1;
  EXPECT_EQ(-EINTR, machine.vcpu.call(KVM_RUN));
}

TEST(VcpuIoctl, RegistersGoInAndOut) {
  TestMachine machine;
  machine.add_vcpu();
  kvm_regs regs{};
  regs.rax = 0x1122334455667788, regs.r15 = 15, regs.rip = 0x1000, regs.rflags = 2;
  ASSERT_EQ(0, machine.vcpu.call(KVM_SET_REGS, &regs));
  kvm_regs back;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &back));
  EXPECT_EQ(0, std::memcmp(&regs, &back, sizeof regs));
}

TEST(VcpuIoctl, ABadSetChangesNothing) {
  TestMachine machine;
  machine.add_vcpu();
  kvm_regs before, after;
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &before));
  const GuardedPage page;
  auto* cut = page.at_end<u8>(sizeof(kvm_regs) - 8);
  std::memset(cut, 0x55, sizeof(kvm_regs) - 8);
  EXPECT_EQ(-EFAULT, machine.vcpu.call(KVM_SET_REGS, cut));
  ASSERT_EQ(0, machine.vcpu.call(KVM_GET_REGS, &after));
  EXPECT_EQ(0, std::memcmp(&before, &after, sizeof before));
}

TEST(VcpuIoctl, CpuidGoesInAndOut) {
  TestMachine machine;
  machine.add_vcpu();
  const auto supported = x86::supported_cpuid();
  const u32 count = static_cast<u32>(supported.size());
  Cpuid cpuid(count);
  cpuid.header()->nent = count;
  std::copy(supported.begin(), supported.end(), cpuid.entries());
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_CPUID2, cpuid.header()));
  cpuid.header()->nent = count - 1;
  EXPECT_EQ(-E2BIG, machine.vcpu.call(KVM_GET_CPUID2, cpuid.header()));
  EXPECT_EQ(count - 1, cpuid.header()->nent);
  Cpuid back(count);
  back.header()->nent = 200'000;
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_CPUID2, back.header()));
  EXPECT_EQ(count, back.header()->nent);
  EXPECT_EQ(supported[0].ebx, back.entries()[0].ebx);
  back.header()->nent = 257;
  EXPECT_EQ(-E2BIG, machine.vcpu.call(KVM_SET_CPUID2, back.header()));
}

TEST(VcpuIoctl, MsrListsEndAtTheFirstThatFails) {
  TestMachine machine;
  machine.add_vcpu();
  Msrs msrs(3);
  msrs.header()->nmsrs = 3;
  msrs.entries()[0] = {.index = 0x174, .data = 0x10};  // IA32_SYSENTER_CS
  msrs.entries()[1] = {.index = 0xdead'0000, .data = 1};
  msrs.entries()[2] = {.index = 0x175, .data = 0x20};
  EXPECT_EQ(1, machine.vcpu.call(KVM_SET_MSRS, msrs.header()));
  msrs.entries()[0].data = 0;
  EXPECT_EQ(1, machine.vcpu.call(KVM_GET_MSRS, msrs.header()));
  EXPECT_EQ(0x10u, msrs.entries()[0].data);
  msrs.header()->nmsrs = 0;
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_MSRS, msrs.header()));
  msrs.header()->nmsrs = 256;
  EXPECT_EQ(-E2BIG, machine.vcpu.call(KVM_GET_MSRS, msrs.header()));
  EXPECT_EQ(-E2BIG, machine.vcpu.call(KVM_SET_MSRS, msrs.header()));
}

TEST(VcpuIoctl, ASignalMaskHasTheKernelsSize) {
  TestMachine machine;
  machine.add_vcpu();
  Counted<kvm_signal_mask, u64> mask(1);
  mask.header()->len = 8;
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_SIGNAL_MASK, mask.header()));
  for (const u32 length : {0u, 4u, 16u, 128u}) {
    mask.header()->len = length;
    EXPECT_EQ(-EINVAL, machine.vcpu.call(KVM_SET_SIGNAL_MASK, mask.header()));
  }
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_SIGNAL_MASK, 0ul));
}

TEST(VcpuIoctl, XsaveIsAtLeastAPage) {
  TestMachine machine;
  machine.add_vcpu();
  std::vector<u8> area(static_cast<std::size_t>(machine.vm.call(KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_XSAVE2)));
  ASSERT_GE(area.size(), sizeof(kvm_xsave));
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_XSAVE2, area.data()));
  EXPECT_EQ(0, machine.vcpu.call(KVM_SET_XSAVE, area.data()));
  auto xsave = std::make_unique<kvm_xsave>();
  EXPECT_EQ(0, machine.vcpu.call(KVM_GET_XSAVE, xsave.get()));
  EXPECT_EQ(0, std::memcmp(area.data(), xsave.get(), sizeof *xsave));
}

TEST(VcpuIoctl, EveryStateThatIsReadCanBeSetAgain) {
  TestMachine machine;
  ASSERT_EQ(0, machine.vm.call(KVM_CREATE_IRQCHIP));
  machine.add_vcpu();
  const struct {
    unsigned long get, set;
  } pairs[] = {
      {KVM_GET_REGS, KVM_SET_REGS},           {KVM_GET_SREGS, KVM_SET_SREGS},
      {KVM_GET_SREGS2, KVM_SET_SREGS2},       {KVM_GET_FPU, KVM_SET_FPU},
      {KVM_GET_XCRS, KVM_SET_XCRS},           {KVM_GET_LAPIC, KVM_SET_LAPIC},
      {KVM_GET_MP_STATE, KVM_SET_MP_STATE},   {KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS},
      {KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS},
  };
  for (const auto& pair : pairs) {
    const Ioctl& row = *find_ioctl(FdKind::vcpu, static_cast<u32>(pair.get));
    alignas(16) u8 first[4096] = {}, second[4096] = {};
    EXPECT_EQ(0, machine.vcpu.call(pair.get, first)) << row.name;
    EXPECT_EQ(0, machine.vcpu.call(pair.set, first)) << row.name;
    EXPECT_EQ(0, machine.vcpu.call(pair.get, second)) << row.name;
    EXPECT_EQ(0, std::memcmp(first, second, sizeof first)) << row.name;
  }
}

TEST(Ioctl, MemoryRegion2IsTheSameWithoutGuestMemfd) {
  EXPECT_EQ(0x40a0ae49u, KVM_SET_USER_MEMORY_REGION2);
  TestMachine machine;
  void* ram = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  kvm_userspace_memory_region2 region{
      .slot = 5, .guest_phys_addr = 1 << 20, .memory_size = 4096, .userspace_addr = reinterpret_cast<u64>(ram)};
  EXPECT_EQ(0, machine.vm.call(KVM_SET_USER_MEMORY_REGION2, &region));
  region.slot = 6;
  EXPECT_EQ(-EEXIST, machine.vm.call(KVM_SET_USER_MEMORY_REGION2, &region));
  region.guest_phys_addr += 4096;
  region.flags = 1 << 2;  // KVM_MEM_GUEST_MEMFD
  EXPECT_EQ(-EINVAL, machine.vm.call(KVM_SET_USER_MEMORY_REGION2, &region));
  munmap(ram, 4096);
}

}  // namespace
}  // namespace anykvm::abi
