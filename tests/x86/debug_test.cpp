// #DB in its forms, executed: single steps, breakpoints in DR0-3, RF, shadows, and the client's debugging.
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "x86/debug.h"
#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

class Debug : public testing::Test, public LongMode {
 protected:
  static constexpr u64 handler = 0x6000, start = 0x5000, ud_handler = 0x6100;
  CpuState& s = cpu.state;
  std::unique_ptr<engine::Engine> engine = engine::make_interpreter();

  Debug() {
    gate(exception::db, handler);
    gate(exception::ud, ud_handler);
    gate(0x80, 0x6200);
    gate(exception::bp, 0x6300);
    machine.ports[0x80] = 0;
    s.rip = start;
  }
  void code(std::initializer_list<u8> bytes, Gpa at = start) {
    std::copy(bytes.begin(), bytes.end(), machine.base + at);
  }
  void step() { engine->step(cpu); }
  void set_tf() { s.other_flags |= flag::tf; }
  void breakpoint(unsigned n, u64 address, unsigned kind, unsigned length) {
    s.dr[n] = address;
    s.dr7 |= 2ull << 2 * n | u64(length << 2 | kind) << (16 + 4 * n);
    cpu.update_debug();
  }
  u64 pushed_rip() { return word(s.gpr[rsp], 0); }
  u64 pushed_flags() { return word(s.gpr[rsp], 2); }
  void expect_trap(u64 rip, u64 dr6) {
    EXPECT_EQ(s.rip, handler);
    EXPECT_EQ(pushed_rip(), rip);
    EXPECT_EQ(s.dr6, dr6_fixed | dr6);
  }
};

TEST_F(Debug, ASingleStepTrapsBehindTheInstruction) {
  code({0x90, 0x90});
  set_tf();
  step();
  expect_trap(start + 1, dr6_bs);
  EXPECT_TRUE(pushed_flags() & flag::tf);
  EXPECT_FALSE(s.other_flags & flag::tf);
}

TEST_F(Debug, TheInstructionThatSetsTfIsNotTrapped) {
  code({0x9d, 0x90});  // popf; nop
  s.gpr[rsp] = 0x7000;
  machine.put<u64>(0x7000, flag::tf | flag::fixed1);
  step();
  EXPECT_EQ(s.rip, start + 1);
  step();
  expect_trap(start + 2, dr6_bs);
}

TEST_F(Debug, MovSsLosesTheStepBehindIt) {
  code({0x8e, 0xd0, 0x90});  // mov ss, eax; nop
  s.gpr[rax] = kernel_ss;
  set_tf();
  step();
  EXPECT_EQ(s.rip, start + 2);
  step();
  expect_trap(start + 3, dr6_bs);
}

TEST_F(Debug, ADataBreakpointOfMovSsWaitsForTheNextInstruction) {
  code({0x8e, 0x14, 0x25, 0, 0x78, 0, 0, 0x90});  // mov ss, [0x7800]; nop
  machine.put<u16>(0x7800, kernel_ss);
  breakpoint(0, 0x7800, 3, 1);
  step();
  EXPECT_EQ(s.rip, start + 7);
  step();
  expect_trap(start + 8, 1);
}

TEST_F(Debug, IntClearsTfWithoutATrap) {
  code({0xcd, 0x80});
  set_tf();
  step();
  EXPECT_EQ(s.rip, 0x6200u);
  EXPECT_TRUE(pushed_flags() & flag::tf);
}

TEST_F(Debug, SyscallGoesByTheFlagBehindIt) {
  code({0x0f, 0x05});
  s.msr.lstar = 0x6400;
  s.msr.star = u64(kernel_cs) << 32;
  set_tf();
  s.msr.sfmask = flag::tf;
  step();
  EXPECT_EQ(s.rip, 0x6400u);
  s.rip = start;
  s.msr.sfmask = 0;
  set_tf();
  step();
  expect_trap(0x6400, dr6_bs);
}

TEST_F(Debug, RepTrapsBehindEachElement) {
  code({0xf3, 0xaa});  // rep stosb
  s.gpr[rcx] = 3;
  s.gpr[rdi] = 0x7800;
  set_tf();
  step();
  expect_trap(start, dr6_bs);
  EXPECT_EQ(s.gpr[rcx], 2u);
}

TEST_F(Debug, ACodeBreakpointFaultsUnlessRfIsSet) {
  code({0x90, 0x90});
  breakpoint(1, start, 0, 0);
  step();
  expect_trap(start, 2);
  EXPECT_FALSE(pushed_flags() & flag::rf) << "an instruction breakpoint's frame has RF clear";
  machine.put<u64>(s.gpr[rsp] + 16, pushed_flags() | flag::rf);
  code({0x48, 0xcf}, handler);  // iretq
  step();
  EXPECT_EQ(s.rip, start);
  EXPECT_TRUE(s.other_flags & flag::rf);
  step();
  EXPECT_EQ(s.rip, start + 1);
  EXPECT_FALSE(s.other_flags & flag::rf) << "RF is for one instruction";
}

TEST_F(Debug, AFaultKeepsTheBreakpointFromComingBack) {
  code({0x0f, 0x0b});  // ud2
  breakpoint(0, start, 0, 0);
  s.other_flags |= flag::rf;
  step();
  EXPECT_EQ(s.rip, ud_handler);
  EXPECT_TRUE(pushed_flags() & flag::rf);
}

TEST_F(Debug, DataBreakpointsTrapBehindTheAccess) {
  code({0x89, 0x04, 0x25, 0x02, 0x78, 0, 0, 0x8b, 0x04, 0x25, 0x02, 0x78, 0,
        0});  // mov [0x7802], eax; mov eax, [0x7802]
  breakpoint(0, 0x7804, 1, 3);
  step();
  expect_trap(start + 7, 1);
  EXPECT_EQ(machine.get<u32>(0x7802), u32(s.gpr[rax])) << "the store is done";
  s.rip = start + 7;
  step();
  EXPECT_EQ(s.rip, start + 14) << "a write breakpoint does not see reads";
  s.dr7 = 0x400;
  breakpoint(2, 0x7804, 3, 3);
  s.rip = start + 7;
  step();
  expect_trap(start + 14, 4);
}

TEST_F(Debug, DataBreakpointsAreSeenInRepAndBehindCachedPages) {
  code({0xf3, 0x48, 0xab});  // rep stosq
  s.gpr[rdi] = 0x7800;
  s.gpr[rcx] = 1;
  step();  // the page is in the TLB now
  breakpoint(0, 0x7810, 1, 2);
  s.rip = start, s.gpr[rdi] = 0x7800, s.gpr[rcx] = 8;
  while (s.rip == start) step();
  expect_trap(start, 1);
  EXPECT_EQ(s.gpr[rcx], 5u) << "three elements are stored";
}

TEST_F(Debug, IoBreakpointsNeedDe) {
  code({0xe6, 0x80});  // out 0x80, al
  breakpoint(3, 0x80, 2, 0);
  step();
  EXPECT_EQ(s.rip, start + 2);
  s.cr4 |= cr4::de;
  cpu.update_debug();
  s.rip = start;
  step();
  expect_trap(start + 2, 8);
}

TEST_F(Debug, GeneralDetect) {
  code({0x0f, 0x21, 0xc0});  // mov rax, dr0
  s.dr7 |= dr7_gd;
  step();
  expect_trap(start, dr6_bd);
  EXPECT_TRUE(pushed_flags() & flag::rf);
  EXPECT_FALSE(s.dr7 & dr7_gd);
}

TEST_F(Debug, GeneralDetectGuardsEveryMove) {
  for (unsigned index = 0; index < 8; ++index)
    for (u8 direction : {0x21, 0x23}) {
      code({0x0f, direction, u8(0xc0 | index << 3)});
      s.rip = start, s.gpr[rsp] = 0x7000;
      s.dr6 = dr6_fixed, s.dr7 = dr7_fixed | dr7_gd;
      s.gpr[rax] = ~0ull;  // reserved bits come later
      step();
      expect_trap(start, dr6_bd);
    }
}

TEST_F(Debug, GeneralDetectComesBehindPrivilegeAndReservedRegisters) {
  gate(exception::gp, 0x6400);
  s.dr7 |= dr7_gd;
  s.cr4 |= cr4::de;
  code({0x0f, 0x21, 0xe0});  // mov rax, dr4
  step();
  EXPECT_EQ(s.rip, ud_handler);
  code({0x0f, 0x21, 0xc0});  // mov rax, dr0
  enter(3);
  for (unsigned level = 1; level <= 4; ++level)
    machine.put<u64>(entry(start, level), entry_value(start, level) | pte::u);
  cpu.mmu.flush_all();
  s.rip = start;
  step();
  EXPECT_EQ(s.rip, 0x6400u);
  EXPECT_TRUE(s.dr7 & dr7_gd);
}

TEST_F(Debug, AnInstructionsBreakpointComesBeforeGeneralDetect) {
  code({0x0f, 0x21, 0xc0});  // mov rax, dr0
  breakpoint(0, start, 0, 0);
  s.dr7 |= dr7_gd;
  step();
  expect_trap(start, 1);
  EXPECT_FALSE(s.dr7 & dr7_gd) << "every #DB's handler may use the registers";
}

TEST_F(Debug, AFaultHasNoStep) {
  code({0x0f, 0x0b});  // ud2
  set_tf();
  step();
  EXPECT_EQ(s.rip, ud_handler);
  EXPECT_TRUE(pushed_flags() & flag::tf);
  EXPECT_EQ(s.dr6, dr6_fixed);
}

TEST_F(Debug, AStepAndADataBreakpointAreOneTrap) {
  code({0x89, 0x04, 0x25, 0x00, 0x78, 0, 0, 0x90});  // mov [0x7800], eax; nop
  breakpoint(3, 0x7800, 1, 3);
  breakpoint(0, start + 7, 0, 0);
  set_tf();
  step();
  expect_trap(start + 7, dr6_bs | 8);
  EXPECT_FALSE(pushed_flags() & flag::rf);
  // Back behind the trap, the next instruction's own breakpoint is met.
  code({0x48, 0xcf}, handler);  // iretq
  s.dr6 = dr6_fixed;
  step();
  EXPECT_EQ(s.rip, start + 7);
  step();
  expect_trap(start + 7, 1);
}

TEST_F(Debug, ShadowsOfMovSsAndSti) {
  code({0xfb, 0x90});  // sti; nop
  set_tf();
  step();
  expect_trap(start + 1, dr6_bs);

  code({0x8e, 0xd0, 0x90, 0x90});  // mov ss, eax; nop; nop
  s.gpr[rax] = kernel_ss;
  s.other_flags &= ~flag::tf;
  s.rip = start;
  breakpoint(0, start + 2, 0, 0);
  breakpoint(1, start + 3, 0, 0);
  step();
  EXPECT_EQ(s.rip, start + 2);
  step();
  EXPECT_EQ(s.rip, start + 3) << "the breakpoint behind MOV SS is held back";
  s.dr6 = dr6_fixed;
  step();
  expect_trap(start + 3, 2);
}

TEST_F(Debug, IcebpTakesTheStepWithItAndLeavesDr7) {
  code({0xf1});
  set_tf();
  s.dr6 = dr6_fixed | dr6_bt;
  s.dr7 |= dr7_gd;
  step();
  expect_trap(start + 1, dr6_bt);
  EXPECT_TRUE(pushed_flags() & flag::tf);
  EXPECT_FALSE(pushed_flags() & flag::rf);
  EXPECT_TRUE(s.dr7 & dr7_gd);
}

TEST_F(Debug, IcebpLeavesDr6AndIgnoresTheGatesDpl) {
  code({0xf1});
  enter(3);
  map(start, start, pte::p | pte::w | pte::u);
  for (unsigned level = 2; level <= 4; ++level)
    machine.put<u64>(entry(start, level), entry_value(start, level) | pte::u);
  step();
  expect_trap(start + 1, 0);
}

TEST_F(Debug, BranchStepsTrapBehindTakenBranches) {
  code({0x90, 0xeb, 0x02, 0x90, 0x90, 0x90});  // nop; jmp +2
  s.msr.debugctl = debugctl_btf;
  set_tf();
  step();
  EXPECT_EQ(s.rip, start + 1);
  step();
  expect_trap(start + 5, dr6_bs);
  EXPECT_EQ(s.msr.debugctl, 0u);
}

TEST_F(Debug, AStepBehindHltWakes) {
  code({0xf4});
  set_tf();
  step();
  EXPECT_EQ(cpu.exit.kind, ExitKind::none);
  expect_trap(start + 1, dr6_bs);
}

TEST_F(Debug, TheClientSteps) {
  code({0x90, 0xcc});
  cpu.guest_debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  cpu.update_debug();
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::debug);
  EXPECT_EQ(cpu.exit.debug_pc, start + 1);
  EXPECT_EQ(cpu.exit.dr6, 0xffff4ff0u);
  EXPECT_EQ(s.rip, start + 1);
  EXPECT_EQ(s.dr6, dr6_fixed) << "the guest's is untouched";
  engine->run(cpu);
  EXPECT_EQ(s.rip, 0x6300u) << "the step ends in the handler";
}

TEST_F(Debug, TheClientsStepBehindAPortAccessComesSecond) {
  code({0xe6, 0x81});
  u8 data[8];
  cpu.pio_data = data;
  cpu.guest_debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  cpu.update_debug();
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::pio);
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::debug);
  EXPECT_EQ(cpu.exit.debug_pc, start + 2);
}

TEST_F(Debug, TheClientsBreakpoints) {
  code({0x90, 0xcc});
  cpu.guest_debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
  cpu.update_debug();
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::debug);
  EXPECT_EQ(cpu.exit.debug_vector, 3);
  EXPECT_EQ(cpu.exit.debug_pc, start + 1);
  EXPECT_EQ(s.rip, start + 1) << "on INT3";

  s.rip = start;
  cpu.guest_debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, .dr = {start + 1}, .dr7 = 0x402};
  cpu.update_debug();
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::debug);
  EXPECT_EQ(cpu.exit.debug_vector, 1);
  EXPECT_EQ(cpu.exit.dr6, 0xffff0ff1u);
  EXPECT_EQ(cpu.exit.dr7, 0x402u);
  EXPECT_EQ(s.rip, start + 1);
}

}  // namespace
}  // namespace anykvm::x86
