// Kvm, Vm and Vcpu over a fake device: which ioctl with which structure, which error, which exit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "anykvm/anykvm.h"
#include "client/fake_kvm_device.h"

namespace anykvm {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct ClientTest : ::testing::Test {
  std::shared_ptr<FakeKvmDevice> fake = std::make_shared<FakeKvmDevice>();
};

TEST_F(ClientTest, ErrorNamesTheCallAndCarriesErrno) {
  fake->answers[KVM_CREATE_VM] = [](auto) { return -EMFILE; };
  Kvm kvm(fake);
  try {
    kvm.create_vm();
    FAIL();
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), std::errc::too_many_files_open);
    EXPECT_THAT(error.what(), HasSubstr("KVM_CREATE_VM"));
  }
}

TEST_F(ClientTest, ForeignVersionIsRefused) {
  fake->answers[KVM_GET_API_VERSION] = [](auto) { return 11; };
  EXPECT_THROW(Kvm{fake}, KvmError);
  EXPECT_EQ(fake->opened, fake->closed);
  fake->open_error = EACCES;
  EXPECT_THROW(Kvm{fake}, KvmError);
}

TEST_F(ClientTest, CreateVmTriesAgainAfterASignal) {
  int tries = 0;
  fake->answers[KVM_CREATE_VM] = [&](auto) { return ++tries < 3 ? -EINTR : fake->make_fd(); };
  Kvm(fake).create_vm();
  EXPECT_EQ(tries, 3);
}

TEST_F(ClientTest, EveryDescriptorIsClosedOnce) {
  {
    Kvm kvm(fake);
    Vm vm = kvm.create_vm();
    Vcpu first = vm.create_vcpu(), second = vm.create_vcpu();
    EXPECT_EQ(second.id(), 1u);
    first = std::move(second);
    EXPECT_EQ(first.id(), 1u);
  }
  EXPECT_EQ(fake->opened, 4);
  EXPECT_EQ(fake->closed, 4);
}

TEST_F(ClientTest, CapabilitiesAreAskedByNumber) {
  fake->extensions = {{KVM_CAP_IRQCHIP, 1}, {KVM_CAP_COALESCED_MMIO, 2}, {KVM_CAP_NR_VCPUS, 4}};
  Kvm kvm(fake);
  EXPECT_TRUE(kvm.cap_irq_chip());
  EXPECT_FALSE(kvm.cap_pit2());
  EXPECT_EQ(kvm.cap_coalesced_mmio(), 2);
  EXPECT_EQ(kvm.cap_max_vcpus(), 4) << "an old KVM gives only the recommended number";
}

TEST_F(ClientTest, CpuidBufferGrowsAndIsCached) {
  int asked = 0;
  fake->answers[KVM_GET_SUPPORTED_CPUID] = [&](unsigned long argument) {
    ++asked;
    auto* list = reinterpret_cast<kvm_cpuid2*>(argument);
    if (list->nent < 200) return -E2BIG;
    list->nent = 200;
    for (unsigned i = 0; i < 200; ++i) list->entries[i] = {.function = i};
    return 0;
  };
  Kvm kvm(fake);
  EXPECT_EQ(kvm.supported_cpuid().size(), 200u);
  EXPECT_EQ(kvm.supported_cpuid()[199].function, 199u);
  EXPECT_EQ(asked, 2);
}

TEST_F(ClientTest, MsrListIsSizedByKvm) {
  fake->answers[KVM_GET_MSR_INDEX_LIST] = [&](unsigned long argument) {
    auto* list = reinterpret_cast<kvm_msr_list*>(argument);
    const auto room = list->nmsrs;
    list->nmsrs = 3;
    if (room < 3) return -E2BIG;
    for (unsigned i = 0; i < 3; ++i) list->indices[i] = 0x10 + i;
    return 0;
  };
  Kvm kvm(fake);
  EXPECT_THAT(kvm.supported_msrs(), ElementsAre(0x10, 0x11, 0x12));
  EXPECT_THROW(kvm.feature_msrs(), KvmError);
}

struct MemorySlotTest : ClientTest {
  std::vector<kvm_userspace_memory_region> regions;
  MemorySlotTest() {
    fake->extensions[KVM_CAP_NR_MEMSLOTS] = 2;
    fake->answers[KVM_SET_USER_MEMORY_REGION] = [this](unsigned long argument) {
      regions.push_back(*reinterpret_cast<kvm_userspace_memory_region*>(argument));
      return answer;
    };
  }
  long answer = 0;
  char memory[2];
};

TEST_F(MemorySlotTest, LifeOfASlot) {
  Vm vm = Kvm(fake).create_vm();
  const auto slot = vm.allocate_memory_slot(0x3000);
  const auto other = vm.allocate_memory_slot(0x1000);
  EXPECT_NE(slot.number(), other.number());
  EXPECT_THROW(vm.allocate_memory_slot(0x1000), KvmError) << "beyond what KVM has";
  EXPECT_THROW(vm.allocate_memory_slot(0x1001), KvmError);

  vm.set_up_memory_slot(slot, memory, 0x10000, KVM_MEM_READONLY);
  ASSERT_EQ(regions.size(), 1u);
  EXPECT_EQ(regions[0].memory_size, 0x3000u);
  EXPECT_EQ(regions[0].flags, unsigned{KVM_MEM_READONLY});
  vm.set_up_memory_slot(slot, memory, 0x20000);
  EXPECT_EQ(regions.size(), 2u) << "a move is one call";
  vm.set_up_memory_slot(slot, memory + 1, 0x20000);
  ASSERT_EQ(regions.size(), 4u) << "other memory needs the slot made anew";
  EXPECT_EQ(regions[2].memory_size, 0u);

  vm.free_memory_slot(slot);
  EXPECT_EQ(regions.back().memory_size, 0u);
  const auto calls = regions.size();
  vm.disable_memory_slot(other);
  EXPECT_EQ(regions.size(), calls) << "it was not set up";
  EXPECT_THROW(vm.set_up_memory_slot(slot, memory, 0), KvmError);
  EXPECT_EQ(vm.allocate_memory_slot(0x1000).number(), slot.number());
}

TEST_F(MemorySlotTest, RefusedSetUpLeavesTheSlotDown) {
  Vm vm = Kvm(fake).create_vm();
  const auto slot = vm.allocate_memory_slot(0x1000);
  answer = -EEXIST;
  EXPECT_THROW(vm.set_up_memory_slot(slot, memory, 0), KvmError);
  answer = 0;
  const auto calls = regions.size();
  vm.free_memory_slot(slot);
  EXPECT_EQ(regions.size(), calls);
}

TEST_F(ClientTest, InterruptCalls) {
  kvm_irq_level line{};
  fake->answers[KVM_CREATE_IRQCHIP] = [](auto) { return 0; };
  fake->answers[KVM_IRQ_LINE] = [&](unsigned long argument) {
    line = *reinterpret_cast<kvm_irq_level*>(argument);
    return 0;
  };
  kvm_ioeventfd event{};
  fake->answers[KVM_IOEVENTFD] = [&](unsigned long argument) {
    event = *reinterpret_cast<kvm_ioeventfd*>(argument);
    return 0;
  };
  Vm vm = Kvm(fake).create_vm();
  EXPECT_FALSE(vm.has_irq_chip());
  vm.create_irq_chip();
  EXPECT_TRUE(vm.has_irq_chip());
  vm.set_irq_line(9, true);
  EXPECT_EQ(line.irq, 9u);
  EXPECT_EQ(line.level, 1u);
  vm.attach_ioeventfd(7, {.address = 0x64, .size = 2, .is_port = true, .match = 5});
  EXPECT_EQ(event.flags, unsigned{KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH});
  EXPECT_EQ(event.datamatch, 5u);
  vm.detach_ioeventfd(7, {.address = 0x1000});
  EXPECT_EQ(event.flags, unsigned{KVM_IOEVENTFD_FLAG_DEASSIGN});
}

struct ExitTest : ClientTest {
  std::function<long(kvm_run&)> on_run;
  std::optional<Kvm> kvm;
  std::optional<Vm> vm;
  std::optional<Vcpu> vcpu;
  ExitTest() {
    fake->answers[KVM_RUN] = [this](auto) { return on_run(vcpu->run_area()); };
    kvm.emplace(fake);
    vm.emplace(kvm->create_vm());
    vcpu.emplace(vm->create_vcpu());
  }
};

TEST_F(ExitTest, PortIo) {
  on_run = [](kvm_run& run) {
    run.exit_reason = KVM_EXIT_IO;
    run.io = {.direction = KVM_EXIT_IO_OUT, .size = 2, .port = 0x3f8, .count = 2, .data_offset = 4096};
    std::memcpy(reinterpret_cast<char*>(&run) + 4096, "abcd", 4);
    return 0;
  };
  const Exit exit = vcpu->run();
  const auto& out = std::get<exits::IoOut>(exit);
  EXPECT_EQ(out.port, 0x3f8);
  EXPECT_THAT(out.data, ElementsAre('a', 'b', 'c', 'd'));

  on_run = [](kvm_run& run) {
    run.io.direction = KVM_EXIT_IO_IN;
    return 0;
  };
  const Exit second = vcpu->run();
  std::get<exits::IoIn>(second).data[0] = 'x';
  EXPECT_EQ(reinterpret_cast<char*>(&vcpu->run_area())[4096], 'x');
}

TEST_F(ExitTest, Mmio) {
  on_run = [](kvm_run& run) {
    run.exit_reason = KVM_EXIT_MMIO;
    run.mmio = {.phys_addr = 0xd0000000, .data = {1, 2, 3, 4}, .len = 4, .is_write = 1};
    return 0;
  };
  const Exit exit = vcpu->run();
  EXPECT_EQ(std::get<exits::MmioWrite>(exit).gpa, 0xd0000000u);
  EXPECT_THAT(std::get<exits::MmioWrite>(exit).data, ElementsAre(1, 2, 3, 4));
}

TEST_F(ExitTest, InternalErrorCarriesTheInstruction) {
  on_run = [](kvm_run& run) {
    run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
    run.emulation_failure = {.suberror = KVM_INTERNAL_ERROR_EMULATION,
                             .ndata = 3,
                             .flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES};
    run.emulation_failure.insn_size = 2;
    run.emulation_failure.insn_bytes[0] = 0x0f;
    run.emulation_failure.insn_bytes[1] = 0x0b;
    return 0;
  };
  const Exit exit = vcpu->run();
  EXPECT_THAT(std::get<exits::InternalError>(exit).instruction, ElementsAre(0x0f, 0x0b));
  EXPECT_EQ(std::get<exits::InternalError>(exit).data.size(), 3u);
}

TEST_F(ExitTest, ErrorsThatAreExitsAndThoseThatThrow) {
  on_run = [](auto&) { return -EINTR; };
  EXPECT_TRUE(std::holds_alternative<exits::Interrupted>(vcpu->run()));
  on_run = [](auto&) { return -EAGAIN; };
  EXPECT_TRUE(std::holds_alternative<exits::NotStarted>(vcpu->run()));
  on_run = [](auto&) { return -EFAULT; };
  EXPECT_THROW(vcpu->run(), KvmError);
  on_run = [](kvm_run& run) { return run.exit_reason = 999, 0; };
  EXPECT_EQ(std::get<exits::Other>(vcpu->run()).reason, 999u);
}

TEST_F(ExitTest, CoalescedWritesComeInOrder) {
  auto* ring = reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<char*>(&vcpu->run_area()) + 2 * 4096);
  const auto capacity = (4096 - sizeof *ring) / sizeof(kvm_coalesced_mmio);
  ring->first = unsigned(capacity - 1);  // over the end
  ring->last = 1;
  ring->coalesced_mmio[capacity - 1] = {.phys_addr = 0x1000, .len = 4};
  ring->coalesced_mmio[0] = {.phys_addr = 0x1004, .len = 4};
  std::vector<std::uint64_t> addresses;
  EXPECT_EQ(vcpu->drain_coalesced_mmio([&](const auto& write) { addresses.push_back(write.address); }), 2u);
  EXPECT_THAT(addresses, ElementsAre(0x1000, 0x1004));
  EXPECT_EQ(ring->first, 1u);
}

TEST_F(ExitTest, MsrsStopAtTheFirstRefused) {
  fake->answers[KVM_SET_MSRS] = [](unsigned long argument) -> long {
    return reinterpret_cast<kvm_msrs*>(argument)->entries[0].index == 0x10 ? 1 : 0;
  };
  const kvm_msr_entry entries[] = {{.index = 0x10}, {.index = 0x11}};
  EXPECT_EQ(vcpu->set_msrs(entries), 1u);
  EXPECT_THROW(vcpu->set_msr(0x11, 0), KvmError);
}

TEST(HostDevice, ThatIsNotThereSaysSo) {
  try {
    Kvm kvm(KvmDevice::host("/dev/no-such-kvm"));
    FAIL();
  } catch (const KvmError& error) {
    EXPECT_EQ(error.error(), ENOENT);
  }
}

}  // namespace
}  // namespace anykvm
