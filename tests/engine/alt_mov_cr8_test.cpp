// LOCK MOV CR0: AMD's access to CR8, in every mode, where CPUID offers it.
// Reference: AMD64 manual volume 3, "MOV CRn"; CPUID 8000_0001h ECX[4].
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "x86/fake_machine.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

class AltMovCr8 : public testing::TestWithParam<unsigned>, protected LongMode {
 protected:
  static constexpr u64 code = 0x5000;

  AltMovCr8() {
    stop_at_exceptions();
    CpuState& s = cpu.state;
    if (GetParam() != 64) {
      s.cr0 &= ~cr0::pg;
      s.msr.efer = 0;
      s.segment[cs].l = false;
      s.segment[cs].db = GetParam() == 32;
      cpu.update_mode();
    }
    offer(true);
  }
  void offer(bool on) {
    const kvm_cpuid_entry2 entries[] = {{.function = 0x80000000, .eax = 0x80000001},
                                        {.function = 0x80000001, .ecx = on ? 1u << 4 : 0}};
    cpu.cpuid.set(entries);
  }
  bool runs(std::initializer_list<u8> bytes) {
    cpu.state.rip = code;
    for (u64 at = code; const u8 byte : bytes) machine.put<u8>(at++, byte);
    make_interpreter()->step(cpu);
    return cpu.state.rip == code + bytes.size();
  }
};

TEST_P(AltMovCr8, WritesAndReads) {
  cpu.state.gpr[rbx] = 9;
  EXPECT_TRUE(runs({0xf0, 0x0f, 0x22, 0xc3}));  // lock mov cr0, ebx
  EXPECT_EQ(machine.cr8, 9u);
  EXPECT_EQ(cpu.state.cr0 & cr0::pe, cr0::pe);
  machine.cr8 = 5;
  cpu.state.gpr[rcx] = ~0ull;
  EXPECT_TRUE(runs({0x2e, 0xf0, 0x0f, 0x20, 0xc1}));  // lock mov ecx, cr0
  EXPECT_EQ(u32(cpu.state.gpr[rcx]), 5u);
}

TEST_P(AltMovCr8, IsUndefinedElsewhere) {
  machine.cr8 = 5;
  EXPECT_FALSE(runs({0xf0, 0x0f, 0x20, 0xd1}));  // lock mov ecx, cr2
  offer(false);
  cpu.state.gpr[rcx] = 3;
  EXPECT_FALSE(runs({0xf0, 0x0f, 0x20, 0xc1}));
  EXPECT_FALSE(runs({0xf0, 0x0f, 0x22, 0xc1}));
  EXPECT_EQ(cpu.state.gpr[rcx], 3u);
  EXPECT_EQ(machine.cr8, 5u);
}

using AltMovCr8InUserCode = AltMovCr8;
TEST_P(AltMovCr8InUserCode, IsPrivileged) {
  map(code, code, pte::p | pte::w | pte::u);
  enter(3);
  EXPECT_FALSE(runs({0xf0, 0x0f, 0x22, 0xc3}));
  EXPECT_EQ(cpu.state.rip, 0x6000u + exception::gp * 16);
  offer(false);
  enter(3);
  EXPECT_FALSE(runs({0xf0, 0x0f, 0x22, 0xc3}));
  EXPECT_EQ(cpu.state.rip, 0x6000u + exception::ud * 16);
}

std::string name_of(const testing::TestParamInfo<unsigned>& info) { return "Code" + std::to_string(info.param); }
INSTANTIATE_TEST_SUITE_P(Modes, AltMovCr8, testing::Values(16, 32, 64), name_of);
INSTANTIATE_TEST_SUITE_P(Modes, AltMovCr8InUserCode, testing::Values(64), name_of);

}  // namespace
}  // namespace anykvm::engine
