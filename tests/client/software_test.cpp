// The client API on the engine of this library.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>

#include "anykvm/anykvm.h"
#include "client/host_probe.h"

namespace anykvm {
namespace {

using ::testing::ElementsAre;

struct SoftwareTest : ::testing::Test {
  static constexpr std::size_t memory_size = 0x4000;
  Kvm kvm{KvmDevice::software()};
  Vm vm = kvm.create_vm();
  Vm::MemorySlot slot = vm.allocate_memory_slot(memory_size);
  std::uint8_t* memory = static_cast<std::uint8_t*>(
      mmap(nullptr, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::optional<Vcpu> vcpu;

  ~SoftwareTest() override { munmap(memory, memory_size); }

  void run_real_mode(std::initializer_list<std::uint8_t> code) {
    std::copy(code.begin(), code.end(), memory);
    vm.set_up_memory_slot(slot, memory, 0x1000);
    vcpu.emplace(vm.create_vcpu());
    auto sregs = vcpu->sregs();
    sregs.cs.base = sregs.cs.selector = 0;
    vcpu->set_sregs(sregs);
    kvm_regs regs{};
    regs.rip = 0x1000;
    regs.rflags = 2;
    vcpu->set_regs(regs);
  }
};

TEST_F(SoftwareTest, PortsBothWays) {
  run_real_mode({
      0xe4, 0x10,  // in $0x10, %al
      0x40,        // inc %ax
      0xe6, 0x11,  // out %al, $0x11
      0xf4,        // hlt
  });
  const Exit first = vcpu->run();
  std::get<exits::IoIn>(first).data[0] = 41;
  const Exit second = vcpu->run();
  EXPECT_EQ(std::get<exits::IoOut>(second).port, 0x11);
  EXPECT_THAT(std::get<exits::IoOut>(second).data, ElementsAre(42));
  EXPECT_TRUE(std::holds_alternative<exits::Hlt>(vcpu->run()));
}

TEST_F(SoftwareTest, MmioBothWays) {
  run_real_mode({
      0xa1, 0x00, 0x80,  // mov 0x8000, %ax
      0xa3, 0x02, 0x80,  // mov %ax, 0x8002
      0xf4,              // hlt
  });
  const Exit first = vcpu->run();
  const auto& read = std::get<exits::MmioRead>(first);
  EXPECT_EQ(read.gpa, 0x8000u);
  ASSERT_EQ(read.data.size(), 2u);
  read.data[0] = 0x34, read.data[1] = 0x12;
  const Exit second = vcpu->run();
  EXPECT_EQ(std::get<exits::MmioWrite>(second).gpa, 0x8002u);
  EXPECT_THAT(std::get<exits::MmioWrite>(second).data, ElementsAre(0x34, 0x12));
  EXPECT_TRUE(std::holds_alternative<exits::Hlt>(vcpu->run()));
}

TEST_F(SoftwareTest, TripleFaultIsShutdown) {
  run_real_mode({
      0x0f, 0x01, 0x1e, 0x00, 0x20,  // lidt 0x2000: zero limit
      0xcc,                          // int3
  });
  EXPECT_TRUE(std::holds_alternative<exits::Shutdown>(vcpu->run()));
}

TEST_F(SoftwareTest, ImmediateExit) {
  run_real_mode({0xeb, 0xfe});  // jmp .
  vcpu->set_immediate_exit(true);
  EXPECT_TRUE(std::holds_alternative<exits::Interrupted>(vcpu->run()));
}

TEST_F(SoftwareTest, MemoryErrorsAreKvms) {
  vm.set_up_memory_slot(slot, memory, 0x1000);
  const auto second = vm.allocate_memory_slot(memory_size);
  try {
    vm.set_up_memory_slot(second, memory, 0x2000);
    FAIL() << "they overlap";
  } catch (const KvmError& error) {
    EXPECT_EQ(error.error(), EEXIST);
    EXPECT_STREQ(error.call(), "KVM_SET_USER_MEMORY_REGION");
  }
}

TEST_F(SoftwareTest, StateGoesInAndOut) {
  run_real_mode({0xf4});
  auto regs = vcpu->regs();
  regs.r15 = 0x1234567890abcdef;
  vcpu->set_regs(regs);
  EXPECT_EQ(vcpu->regs().r15, regs.r15);
  vcpu->set_cpuid(kvm.supported_cpuid());
  EXPECT_EQ(vcpu->cpuid().size(), kvm.supported_cpuid().size());
  constexpr std::uint32_t lstar = 0xc0000082;
  vcpu->set_msr(lstar, 0xffffffff81000000);
  EXPECT_EQ(vcpu->msr(lstar), 0xffffffff81000000u);
  EXPECT_THROW(vcpu->msr(0x12345678), KvmError);
  vcpu->set_xsave(vcpu->xsave());
  EXPECT_EQ(vcpu->xcrs().nr_xcrs, 1u);
  EXPECT_FALSE(kvm.supported_msrs().empty());
  EXPECT_FALSE(kvm.feature_msrs().empty());
}

TEST(SoftwareProbe, TheProbesGuestRunsHere) {
  EXPECT_EQ(run_probe_guest(KvmDevice::software(), [](char) { return true; }), "");
}

TEST(HostProbe, SaysWhyNot) {
  const auto missing = probe_host_kvm("/dev/no-such-kvm");
  EXPECT_FALSE(missing.serves);
  EXPECT_EQ(missing.reason, "/dev/no-such-kvm: No such file or directory");
  EXPECT_FALSE(probe_host_kvm("/dev/null").serves);
  EXPECT_FALSE(probe_host_kvm().reason.empty());
}

}  // namespace
}  // namespace anykvm
