// Instructions that need privileges or features: who gets #UD, who #GP, and what they do for the others.
#include "engine/one_instruction.h"

namespace anykvm::engine {
namespace {

using x86::rcx;
namespace exception = x86::exception;

class PrivilegedTest : public OneInstruction {
 protected:
  PrivilegedTest() { EXPECT_EQ(cpu.cpuid.set(x86::supported_cpuid()), 0); }
  void become_user() {
    enter(3);
    for (Gva page : {Gva(0x4000), Gva(0x5000)})
      for (unsigned level = 1; level <= 4; ++level)
        machine.put<u64>(entry(page, level), entry_value(page, level) | x86::pte::u);
    cpu.mmu.flush_all();
  }
};

TEST_F(PrivilegedTest, InvpcidIsTheKernels) {
  rax() = 0;
  cpu.state.gpr[rcx] = data;
  machine.put<u64>(data_gpa, 0);
  machine.put<u64>(data_gpa + 8, 0);
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x82, 0x01}), no_fault);  // invpcid rax, [rcx]
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x82, 0xc1}), exception::ud) << "with a register";
  cpu.state.gpr[rcx] = missing;
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x82, 0x01}), exception::pf);
  become_user();
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x82, 0x01}), exception::gp) << "the privilege comes before the operand";
  enter(0);
  kvm_cpuid_entry2 none{};
  ASSERT_EQ(cpu.cpuid.set({&none, 1}), 0);
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x82, 0x01}), exception::ud);
}

// Offered to no guest: KVM makes it undefined, too, where the host has it.
TEST_F(PrivilegedTest, RdpruIsUndefined) {
  EXPECT_EQ(execute({0x0f, 0x01, 0xfd}), exception::ud);
  become_user();
  EXPECT_EQ(execute({0x0f, 0x01, 0xfd}), exception::ud);
}

TEST_F(PrivilegedTest, ClzeroStoresALine) {
  if (!x86::supports(x86::Feature::clzero)) GTEST_SKIP() << "no CLZERO here";
  rax() = data + 0x7f;
  EXPECT_EQ(execute({0x0f, 0x01, 0xfc}), no_fault);
  for (unsigned n = 0; n < 0xc0; ++n) EXPECT_EQ(at(data + n), n >= 0x40 && n < 0x80 ? 0 : n) << n;
  for (u64 address : {missing, read_only}) {
    rax() = address + 0x7f;
    EXPECT_EQ(execute({0x0f, 0x01, 0xfc}), exception::pf);
    EXPECT_EQ(cpu.state.cr2 & ~63ull, address + 0x40);
    EXPECT_EQ(word(cpu.state.gpr[x86::rsp]), address == missing ? 2u : 3u) << "a store's";
  }
  rax() = 1ull << 47;
  EXPECT_EQ(execute({0x0f, 0x01, 0xfc}), exception::gp);
}

}  // namespace
}  // namespace anykvm::engine
