// Events through the IDT and IVT, double and triple faults, and the way back with IRET.
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

class Exceptions : public testing::Test, public LongMode {
 protected:
  static constexpr u64 handler = 0x6000;
  CpuState& s = cpu.state;
};

TEST_F(Exceptions, AFaultAtCpl0PushesTheWholeFrame) {
  gate(exception::gp, handler);
  s.gpr[rsp] = 0x7009;  // the frame is aligned to 16
  s.set_rflags(flag::if_ | flag::tf | flag::cf | flag::nt | flag::fixed1);
  (void)cpu.raise(exception::gp, 0x1234);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.rip, handler);
  EXPECT_EQ(s.gpr[rsp], 0x7000u - 48);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x1234u);
  EXPECT_EQ(word(s.gpr[rsp], 1), 0x5000u);
  EXPECT_EQ(word(s.gpr[rsp], 2), kernel_cs);
  EXPECT_EQ(word(s.gpr[rsp], 3), flag::if_ | flag::tf | flag::cf | flag::nt | flag::fixed1 | flag::rf);
  EXPECT_EQ(word(s.gpr[rsp], 4), 0x7009u);
  EXPECT_EQ(word(s.gpr[rsp], 5), kernel_ss);
  EXPECT_EQ(s.rflags(), flag::cf | flag::fixed1);
  EXPECT_EQ(s.segment[ss].selector, kernel_ss) << "same privilege keeps SS";
}

TEST_F(Exceptions, FromUserToTheStackOfTheTss) {
  enter(3);
  gate(exception::pf, handler, 15);
  s.set_rflags(flag::if_ | flag::fixed1);
  (void)cpu.raise_page_fault(0xdead000, 4);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.cr2, 0xdead000u);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_EQ(s.segment[cs].selector, kernel_cs);
  EXPECT_EQ(s.segment[ss].selector, 0);
  EXPECT_EQ(s.gpr[rsp], stack_top - 48);
  EXPECT_EQ(word(s.gpr[rsp], 0), 4u);
  EXPECT_EQ(word(s.gpr[rsp], 2), user_cs);
  EXPECT_EQ(word(s.gpr[rsp], 5), user_ss);
  EXPECT_TRUE(s.rflags() & flag::if_) << "a trap gate keeps IF";
  EXPECT_EQ(cpu.data_privilege, Privilege::supervisor_ac);
}

TEST_F(Exceptions, IstIsUsedWithoutAPrivilegeChange) {
  gate(exception::nmi, handler, 14, 0, 1);
  ASSERT_EQ(cpu.deliver_nmi(), Result::ok);
  EXPECT_EQ(s.gpr[rsp], ist_top - 40);
  EXPECT_EQ(word(s.gpr[rsp], 3), 0x7000u);
  EXPECT_TRUE(s.event.nmi_masked);
  EXPECT_FALSE(word(s.gpr[rsp], 2) & flag::rf);
  const unsigned before = machine.windows;
  ASSERT_EQ(cpu.iret(8, 0), Result::ok);
  EXPECT_FALSE(s.event.nmi_masked);
  EXPECT_GT(machine.windows, before);
  EXPECT_EQ(s.gpr[rsp], 0x7000u);
  EXPECT_EQ(s.rip, 0x5000u);
}

TEST_F(Exceptions, SoftwareInterruptsObeyTheGatesDpl) {
  enter(3);
  gate(0x80, handler, 14, 3);
  gate(0x81, handler, 14, 0);
  ASSERT_EQ(cpu.software_interrupt(0x81, 0x5002), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  EXPECT_EQ(cpu.fault.error, 0x81u * 8 + 2);
  EXPECT_EQ(s.rip, 0x5000u);
  ASSERT_EQ(cpu.software_interrupt(0x80, 0x5002), Result::ok);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x5002u);
  EXPECT_FALSE(word(s.gpr[rsp], 2) & flag::rf);
}

TEST_F(Exceptions, ExternalInterruptsIgnoreTheGatesDpl) {
  enter(3);
  gate(0x31, handler);
  ASSERT_EQ(cpu.deliver_interrupt(0x31), Result::ok);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x5000u);
  EXPECT_EQ(s.cpl, 0);
}

TEST_F(Exceptions, BadGatesRaiseErrorsThatNameThem) {
  enter(3);
  struct {
    u64 low;
    u8 vector;
    u32 error;
  } cases[] = {
      {0, exception::gp, 0x20 * 8 + 2},                                                               // not a gate
      {handler | u64(kernel_cs) << 16 | 0x0eull << 40 | 3ull << 45, exception::np, 0x20 * 8 + 2},     // not present
      {handler | 0x8eull << 40 | 3ull << 45, exception::gp, 0},                                       // null selector
      {handler | 0x100ull << 16 | 0x8eull << 40 | 3ull << 45, exception::gp, 0x100},                  // outside the GDT
      {handler | u64(kernel_ss) << 16 | 0x8eull << 40 | 3ull << 45, exception::gp, kernel_ss},        // data
      {handler | u64(user_cs32) << 16 | 0x8eull << 40 | 3ull << 45, exception::gp, user_cs32 & ~3u},  // not 64-bit
  };
  for (const auto& c : cases) {
    machine.put<u64>(idt + 0x20 * 16, c.low);
    machine.put<u64>(idt + 0x20 * 16 + 8, 0);
    ASSERT_EQ(cpu.software_interrupt(0x20, 0x5002), Result::fault);
    EXPECT_EQ(cpu.fault.vector, c.vector) << std::hex << c.low;
    EXPECT_EQ(cpu.fault.error, c.error) << std::hex << c.low;
  }
  s.idtr.limit = 0x20 * 16 + 14;
  ASSERT_EQ(cpu.software_interrupt(0x20, 0x5002), Result::fault);
  EXPECT_EQ(cpu.fault.error, 0x20u * 8 + 2);
}

TEST_F(Exceptions, AGatesUpperHalfIsItsOffsetAndNothingElse) {
  gate(0x20, handler);
  machine.put<u64>(idt + 0x20 * 16 + 8, ~0ull << 32);
  ASSERT_EQ(cpu.software_interrupt(0x20, 0x5002), Result::ok);
  EXPECT_EQ(s.rip, handler);
}

TEST_F(Exceptions, AnErrorDuringAnExternalEventHasExtSet) {
  gate(exception::gp, handler);
  ASSERT_EQ(cpu.deliver_interrupt(0x44), Result::ok) << "no gate: #GP is delivered in its place";
  EXPECT_EQ(s.rip, handler);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x44u * 8 + 2 + 1);
}

TEST_F(Exceptions, DoubleAndTripleFault) {
  gate(exception::df, handler, 14, 0, 1);
  (void)cpu.raise_page_fault(0x1234, 2);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok) << "#PF without a gate: #GP, that is a double fault";
  EXPECT_EQ(s.rip, handler);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0u);
  EXPECT_EQ(word(s.gpr[rsp], 1), 0x5000u);
  EXPECT_EQ(s.cr2, 0x1234u);

  s.idtr.limit = 0;
  (void)cpu.raise(exception::ud);
  ASSERT_EQ(cpu.deliver_fault(), Result::exit);
  EXPECT_EQ(cpu.exit.kind, ExitKind::shutdown);
}

TEST_F(Exceptions, APageFaultOnTheStackBecomesADoubleFault) {
  gate(exception::pf, handler);
  gate(exception::df, handler + 8, 14, 0, 1);
  s.gpr[rsp] = 0x40'0000'0000;  // not mapped
  (void)cpu.raise_page_fault(0x1234, 0);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.rip, handler + 8);
  EXPECT_EQ(s.cr2, 0x40'0000'0000u - 8) << "CR2 is the second fault's, of the first push";
}

TEST_F(Exceptions, APageFaultAfterABenignOneIsDeliveredAlone) {
  gate(exception::ud, handler);
  gate(exception::pf, handler + 8, 14, 0, 1);
  s.gpr[rsp] = 0x40'0000'0000;
  (void)cpu.raise(exception::ud);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.rip, handler + 8);
  EXPECT_EQ(word(s.gpr[rsp], 0), 2u);
}

TEST_F(Exceptions, DebugExceptionsFillDr6) {
  gate(exception::db, handler);
  (void)cpu.raise(exception::db);
  cpu.fault.payload = 1 << 14;
  cpu.fault.trap = true;
  s.dr7 |= 1 << 13;
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.dr6, 0xffff0ff0u | 1 << 14);
  EXPECT_FALSE(s.dr7 & 1 << 13);
  EXPECT_FALSE(word(s.gpr[rsp], 2) & flag::rf);
}

TEST_F(Exceptions, ANonCanonicalStackIsAStackFault) {
  gate(exception::ud, handler);
  gate(exception::ss, handler + 8, 14, 0, 1);
  s.gpr[rsp] = 0x8000'0000'0000 + 0x1000;
  (void)cpu.raise(exception::ud);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.rip, handler + 8);
  EXPECT_EQ(word(s.gpr[rsp], 0), 1u) << "EXT";
}

class Iret : public Exceptions {
 protected:
  void frame(u64 rip, u64 code, u64 flags, u64 stack, u64 stack_segment) {
    s.gpr[rsp] = 0x7000;
    const u64 words[] = {rip, code, flags, stack, stack_segment};
    for (unsigned i = 0; i < 5; ++i) machine.put<u64>(0x7000 + 8 * i, words[i]);
  }
  void expect_fault(u8 vector, u32 error) {
    ASSERT_EQ(cpu.iret(8, 0), Result::fault);
    EXPECT_EQ(cpu.fault.vector, vector);
    EXPECT_EQ(cpu.fault.error, error);
    EXPECT_EQ(s.rip, 0x5000u);
    EXPECT_EQ(s.gpr[rsp], 0x7000u);
    EXPECT_EQ(s.cpl, 0);
  }
};

TEST_F(Iret, ToUser) {
  frame(0x400000, user_cs, flag::if_ | flag::zf | flag::rf | 2, 0x7fff0000, user_ss);
  ASSERT_EQ(cpu.iret(8, 0), Result::ok);
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.rip, 0x400000u);
  EXPECT_EQ(s.gpr[rsp], 0x7fff0000u);
  EXPECT_EQ(s.rflags(), flag::if_ | flag::zf | flag::rf | 2);
  EXPECT_EQ(cpu.data_privilege, Privilege::user);
  EXPECT_TRUE(s.segment[ds].unusable) << "kernel data segments do not survive";
  EXPECT_EQ(machine.windows, 1u) << "IF was set";
}

TEST_F(Iret, ToCompatibilityMode) {
  frame(0x400000, user_cs32, 2, 0x1'0000'1000, user_ss);
  ASSERT_EQ(cpu.iret(8, 0), Result::ok);
  EXPECT_EQ(s.code_bits, 32);
  EXPECT_EQ(s.gpr[rsp], 0x1000u);
}

TEST_F(Iret, SamePrivilegeAlsoLoadsTheStack) {
  frame(0x5100, kernel_cs, 2, 0x6008, 0);
  ASSERT_EQ(cpu.iret(8, 0), Result::ok);
  EXPECT_EQ(s.gpr[rsp], 0x6008u);
  EXPECT_EQ(s.segment[ss].selector, 0) << "a null SS is allowed at CPL 0";
  EXPECT_EQ(s.cpl, 0);
}

TEST_F(Iret, Errors) {
  frame(0x5100, 0, 2, 0x6000, 0);
  expect_fault(exception::gp, 0);
  frame(0x5100, 0x100, 2, 0x6000, 0);
  expect_fault(exception::gp, 0x100);
  frame(0x5100, kernel_ss, 2, 0x6000, 0);
  expect_fault(exception::gp, kernel_ss);
  frame(0x5100, kernel_cs | 3, 2, 0x6000, user_ss);
  expect_fault(exception::gp, kernel_cs);
  frame(0x5100, user_cs, 2, 0x6000, 0);
  expect_fault(exception::gp, 0);
  frame(0x5100, user_cs, 2, 0x6000, kernel_ss | 3);
  expect_fault(exception::gp, kernel_ss);
  frame(1ull << 47, user_cs, 2, 0x6000, user_ss);
  expect_fault(exception::gp, 0);
  frame(1ull << 32, user_cs32, 2, 0x6000, user_ss);
  expect_fault(exception::gp, 0);
  frame(0x5100, kernel_cs, 2, 0x6000, 0);
  s.other_flags |= flag::nt;
  expect_fault(exception::gp, 0);
}

TEST_F(Iret, LetsNmisInEvenIfItFaults) {
  s.event.nmi_masked = true;
  frame(0x5100, 0, 2, 0x6000, 0);
  expect_fault(exception::gp, 0);
  EXPECT_FALSE(s.event.nmi_masked);
}

TEST_F(Iret, UserCannotRaiseIoplOrIf) {
  enter(3);
  map(0x8000'0000, 0x7000, pte::p | pte::w | pte::u);
  frame(0x400000, user_cs, flag::if_ | flag::iopl | flag::ac | 2, 0x1000, user_ss);
  s.gpr[rsp] = 0x8000'0000;
  map(gdt, gdt, pte::p | pte::w);
  ASSERT_EQ(cpu.iret(8, 0), Result::ok);
  EXPECT_EQ(s.rflags(), flag::ac | 2);
}

// ---------------------------------------------------------------------------------------------------------------

TEST(RealMode, InterruptsGoThroughTheIvtAndBack) {
  FakeMachine machine;
  Cpu cpu(machine);
  CpuState& s = cpu.state;
  s.segment[cs].base = 0x10000;
  s.segment[cs].selector = 0x1000;
  s.segment[ss].base = 0x20000;
  s.segment[ss].selector = 0x2000;
  s.rip = 0x123;
  s.gpr[rsp] = 0xaaaa0000;  // SP wraps within the segment
  s.set_rflags(flag::if_ | flag::cf | flag::fixed1);
  machine.put<u32>(0x21 * 4, 0x30000456);
  ASSERT_EQ(cpu.software_interrupt(0x21, 0x125), Result::ok);
  EXPECT_EQ(s.rip, 0x456u);
  EXPECT_EQ(s.segment[cs].base, 0x30000u);
  EXPECT_EQ(s.gpr[rsp], 0xaaaafffau);
  EXPECT_EQ(machine.get<u16>(0x2fffa), 0x125);
  EXPECT_EQ(machine.get<u16>(0x2fffc), 0x1000);
  EXPECT_EQ(machine.get<u16>(0x2fffe), flag::if_ | flag::cf | flag::fixed1);
  EXPECT_FALSE(s.rflags() & flag::if_);
  ASSERT_EQ(cpu.iret(2, 0), Result::ok);
  EXPECT_EQ(s.rip, 0x125u);
  EXPECT_EQ(s.segment[cs].selector, 0x1000);
  EXPECT_EQ(s.gpr[rsp], 0xaaaa0000u);
  EXPECT_EQ(s.rflags(), flag::if_ | flag::cf | flag::fixed1);
  s.idtr.limit = 0x21 * 4 + 2;
  EXPECT_EQ(cpu.software_interrupt(0x21, 0x125), Result::fault);
}

/// 32-bit protected mode without paging.
class ProtectedMode : public testing::Test {
 protected:
  static constexpr Gpa gdt = 0x1000, idt = 0x2000, tss = 0x3000;
  FakeMachine machine;
  Cpu cpu{machine};
  CpuState& s = cpu.state;

  ProtectedMode() {
    const u64 descriptors[] = {0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff};
    for (unsigned i = 0; i < 5; ++i) machine.put<u64>(gdt + 8 * i, descriptors[i]);
    s.cr0 = cr0::pe | cr0::et;
    s.gdtr = {gdt, 5 * 8 - 1};
    s.idtr = {idt, 0x7ff};
    s.tr = {.base = tss, .limit = 0x67, .selector = 0x28, .type = 0xb, .present = true};
    machine.put<u32>(tss + 4, 0x9000);
    machine.put<u16>(tss + 8, 0x10);
    enter(0);
    s.rip = 0x5000;
    s.gpr[rsp] = 0x7000;
  }
  void enter(u8 cpl) {
    s.segment[cs] = {.limit = 0xffffffff,
                     .selector = u16(cpl ? 0x1b : 0x08),
                     .type = 0xb,
                     .dpl = cpl,
                     .present = true,
                     .s = true,
                     .db = true,
                     .g = true};
    s.segment[ss] = {.limit = 0xffffffff,
                     .selector = u16(cpl ? 0x23 : 0x10),
                     .type = 3,
                     .dpl = cpl,
                     .present = true,
                     .s = true,
                     .db = true,
                     .g = true};
    s.segment[ds] = s.segment[es] = s.segment[fs] = s.segment[gs] = s.segment[ss];
    cpu.update_mode();
  }
  void gate(u8 vector, u32 offset, u8 type = 14, u8 dpl = 0) {
    machine.put<u64>(idt + 8 * vector, (offset & 0xffff) | 8u << 16 | u64(type) << 40 | u64(dpl) << 45 | 1ull << 47 |
                                           u64(offset >> 16) << 48);
  }
  u32 word(unsigned index) { return machine.get<u32>(s.gpr[rsp] + 4 * index); }
};

TEST_F(ProtectedMode, ThroughAGateToAnInnerStackAndBack) {
  enter(3);
  s.set_rflags(flag::if_ | 2);
  gate(exception::gp, 0x6000);
  (void)cpu.raise(exception::gp, 0x18);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(s.gpr[rsp], 0x9000u - 24);
  EXPECT_EQ(word(0), 0x18u);
  EXPECT_EQ(word(1), 0x5000u);
  EXPECT_EQ(word(2), 0x1bu);
  EXPECT_EQ(word(3), flag::if_ | flag::rf | 2);
  EXPECT_EQ(word(4), 0x7000u);
  EXPECT_EQ(word(5), 0x23u);
  EXPECT_EQ(s.segment[ss].selector, 0x10);
  s.gpr[rsp] += 4;
  ASSERT_EQ(cpu.iret(4, 0), Result::ok);
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.rip, 0x5000u);
  EXPECT_EQ(s.gpr[rsp], 0x7000u);
  EXPECT_EQ(s.segment[ss].selector, 0x23);
  EXPECT_FALSE(s.segment[ds].unusable) << "a user data segment survives";
}

TEST_F(ProtectedMode, SamePrivilegeAnd16BitGates) {
  gate(0x30, 0x1'6000, 6);
  ASSERT_EQ(cpu.deliver_interrupt(0x30), Result::ok);
  EXPECT_EQ(s.rip, 0x6000u) << "16-bit gates have 16-bit offsets";
  EXPECT_EQ(s.gpr[rsp], 0x7000u - 6);
  EXPECT_EQ(machine.get<u16>(s.gpr[rsp]), 0x5000);
  ASSERT_EQ(cpu.iret(2, 0), Result::ok);
  EXPECT_EQ(s.rip, 0x5000u);
}

TEST_F(ProtectedMode, AVirtual8086TaskIsLeftAndEntered) {
  for (Segment& segment : s.segment) {
    segment = {.base = 0x11110, .limit = 0xffff, .selector = 0x1111, .type = 3, .dpl = 3, .present = true, .s = true};
  }
  s.set_rflags(flag::vm | flag::if_ | 2);
  cpu.update_mode();
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(cpu.software_interrupt(0x30, 0x5002), Result::fault) << "IOPL < 3";
  gate(0x30, 0x6000);
  ASSERT_EQ(cpu.deliver_interrupt(0x30), Result::ok);
  EXPECT_EQ(s.gpr[rsp], 0x9000u - 36);
  EXPECT_EQ(word(8), 0x1111u);
  EXPECT_TRUE(s.segment[gs].unusable);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_FALSE(s.v86());
  ASSERT_EQ(cpu.iret(4, 0), Result::ok);
  EXPECT_TRUE(s.v86());
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.segment[gs].base, 0x11110u);
  EXPECT_EQ(s.gpr[rsp], 0x7000u);
}

TEST_F(ProtectedMode, ABadInnerStackIsAnInvalidTss) {
  enter(3);
  gate(0x30, 0x6000, 14, 3);
  machine.put<u16>(tss + 8, 0x20 | 3);
  ASSERT_EQ(cpu.software_interrupt(0x30, 0x5002), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ts);
  EXPECT_EQ(cpu.fault.error, 0x20u);
}

class Tasks : public ProtectedMode {
 protected:
  static constexpr Gpa other = 0x3800;
  static constexpr u16 this_task = 0x28, other_task = 0x30, task_gate = 0x38;
  Tasks() {
    machine.put<u64>(gdt + this_task, 0x67 | u64(tss) << 16 | 0x8bull << 40);
    machine.put<u64>(gdt + other_task, 0x67 | u64(other) << 16 | 0x89ull << 40);
    machine.put<u64>(gdt + task_gate, u64(other_task) << 16 | 0xe5ull << 40);
    s.gdtr.limit = 0x3f;
    machine.put<u32>(other + 0x20, 0x6000);
    machine.put<u32>(other + 0x24, 2);
    machine.put<u32>(other + 0x38, 0x7800);  // ESP
    for (unsigned i = 0; i < 6; ++i) machine.put<u32>(other + 0x48 + 4 * i, i == cs ? 0x08 : 0x10);
  }
  unsigned type_of(u16 selector) { return machine.get<u8>(gdt + selector + 5) & 15; }
};

TEST_F(Tasks, ADoubleFaultThroughATaskGate) {
  machine.put<u64>(idt + 8 * exception::df, u64(other_task) << 16 | 0x85ull << 40);
  s.idtr.limit = 8 * exception::df + 7;
  s.gpr[rax] = 0x1234;
  (void)cpu.raise(exception::gp, 0);
  ASSERT_EQ(cpu.deliver_fault(), Result::ok);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(s.gpr[rsp], 0x7800u - 4);
  EXPECT_EQ(word(0), 0u) << "the error code";
  EXPECT_TRUE(s.other_flags & flag::nt);
  EXPECT_TRUE(s.cr0 & cr0::ts);
  EXPECT_EQ(machine.get<u16>(other), this_task) << "the link";
  EXPECT_EQ(machine.get<u32>(tss + 0x20), 0x5000u);
  EXPECT_EQ(machine.get<u32>(tss + 0x28), 0x1234u);
  EXPECT_TRUE(machine.get<u32>(tss + 0x24) & flag::rf);
  EXPECT_EQ(type_of(this_task), 11u);
  EXPECT_EQ(type_of(other_task), 11u);
  ASSERT_EQ(cpu.iret(4, 0x6001), Result::ok);
  EXPECT_EQ(s.rip, 0x5000u);
  EXPECT_EQ(s.gpr[rax], 0x1234u);
  EXPECT_EQ(s.tr.selector, this_task);
  EXPECT_EQ(type_of(other_task), 9u);
  EXPECT_EQ(machine.get<u32>(other + 0x20), 0x6001u) << "where it goes on";
  EXPECT_FALSE(machine.get<u32>(other + 0x24) & flag::nt);
}

TEST_F(Tasks, JumpsLeaveNoLink) {
  ASSERT_EQ(cpu.far_jump(task_gate, 0, 4, 0x5007), Result::ok);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_FALSE(s.other_flags & flag::nt);
  EXPECT_EQ(type_of(this_task), 9u);
  EXPECT_EQ(machine.get<u32>(tss + 0x20), 0x5007u);
  ASSERT_EQ(cpu.far_jump(other_task, 0, 4, 0), Result::fault) << "busy";
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  EXPECT_EQ(cpu.fault.error, other_task);
}

TEST_F(Tasks, AFaultInTheNewTaskIsItsOwn) {
  machine.put<u16>(other + 0x48 + 4 * fs, 0x18);
  machine.put<u64>(gdt + 0x18, 0x00cf7b000000ffff);  // absent code
  ASSERT_EQ(cpu.far_call(other_task, 0, 4, 0x5007), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::np);
  EXPECT_EQ(cpu.fault.error, 0x18u);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(s.tr.selector, other_task);
}

TEST_F(Tasks, SixteenBitAndTheTrapFlagOfTheTss) {
  machine.put<u64>(gdt + other_task, 0x2b | u64(other) << 16 | 0x81ull << 40);
  machine.put<u16>(other + 0x0e, 0x6000);
  machine.put<u16>(other + 0x10, 2);
  machine.put<u16>(other + 0x12, 0xabcd);
  const u16 selectors[] = {0x10, 0x08, 0x10, 0x10, 0};
  for (unsigned i = 0; i < 5; ++i) machine.put<u16>(other + 0x22 + 2 * i, selectors[i]);
  ASSERT_EQ(cpu.far_jump(other_task, 0, 4, 0x5007), Result::ok);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(s.gpr[rax] & 0xffff, 0xabcdu);
  EXPECT_EQ(s.segment[ds].selector, 0x10);
  machine.put<u8>(tss + 0x64, 1);
  machine.put<u32>(tss + 0x20, 0x5000);
  for (unsigned i = 0; i < 6; ++i) machine.put<u32>(tss + 0x48 + 4 * i, i == cs ? 0x08 : 0x10);
  machine.put<u32>(tss + 0x60, 0);
  ASSERT_EQ(cpu.far_jump(this_task, 0, 4, 0x6007), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::db);
  EXPECT_EQ(cpu.fault.payload, 1u << 15);
  EXPECT_EQ(s.rip, 0x5000u);
}

class Virtual8086 : public ProtectedMode {
 protected:
  std::unique_ptr<engine::Engine> engine = engine::make_interpreter();
  Virtual8086() {
    const u16 selectors[] = {0, 0, 0x700, 0, 0, 0};
    for (unsigned i = 0; i < 6; ++i) {
      s.segment[i] = {.base = selectors[i] * 16u,
                      .limit = 0xffff,
                      .selector = selectors[i],
                      .type = 3,
                      .dpl = 3,
                      .present = true,
                      .s = true};
    }
    s.gpr[rsp] = 0x100;
    s.set_rflags(flag::vm | flag::if_ | 2);
    s.tr.limit = 0x200;
    machine.put<u16>(tss + 0x66, 0x90);  // the redirection bitmap lies 32 bytes before
    cpu.update_mode();
    for (unsigned vector : {13u, 0x21u}) gate(u8(vector), 0x6000);
    machine.put<u32>(0x21 * 4, 0x0200'0010);
  }
  bool faults(std::initializer_list<u8> bytes) {
    std::copy(bytes.begin(), bytes.end(), machine.base + 0x5000);
    s.rip = 0x5000;
    engine->step(cpu);
    return !s.v86();
  }
};

TEST_F(Virtual8086, SensitiveInstructionsFaultWithoutVme) {
  for (u8 opcode : {0xfa, 0xfb, 0x9c, 0x9d, 0xcf}) {
    EXPECT_TRUE(faults({opcode})) << unsigned(opcode);
    ASSERT_EQ(cpu.iret(4, 0), Result::fault);  // the frame has an error code on top
    s.gpr[rsp] += 4;
    ASSERT_EQ(cpu.iret(4, 0), Result::ok);
  }
}

TEST_F(Virtual8086, VmeGivesItAnInterruptFlagOfItsOwn) {
  s.cr4 |= cr4::vme;
  EXPECT_FALSE(faults({0xfb}));
  EXPECT_TRUE(s.other_flags & flag::vif);
  EXPECT_FALSE(faults({0x9c}));
  EXPECT_EQ(machine.get<u16>(0x7000 + 0xfe), flag::if_ | flag::iopl | 2);
  EXPECT_FALSE(faults({0xfa}));
  EXPECT_FALSE(s.other_flags & flag::vif);
  EXPECT_TRUE(s.other_flags & flag::if_) << "the machine's";
  EXPECT_FALSE(faults({0x9d}));
  EXPECT_TRUE(s.other_flags & flag::vif);
  EXPECT_FALSE(s.other_flags & flag::iopl);
  EXPECT_FALSE(faults({0xcd, 0x21})) << "redirected to the program's handler";
  EXPECT_EQ(s.rip, 0x10u);
  EXPECT_EQ(s.segment[cs].base, 0x2000u);
  EXPECT_FALSE(s.other_flags & flag::vif);
  machine.put<u8>(0x2010, 0xcf);
  engine->step(cpu);
  EXPECT_EQ(s.rip, 0x5002u);
  EXPECT_TRUE(s.other_flags & flag::vif);
  s.other_flags |= flag::vip;
  EXPECT_TRUE(faults({0xfb})) << "an interrupt waits for the program";
}

TEST_F(Virtual8086, TheBitmapLeavesInterruptsToTheMonitor) {
  s.cr4 |= cr4::vme;
  machine.put<u8>(tss + 0x90 - 32 + 0x21 / 8, 1 << (0x21 % 8));
  EXPECT_TRUE(faults({0xcd, 0x21}));
  EXPECT_EQ(word(0), 0u) << "#GP(0)";
}

TEST_F(ProtectedMode, PviGivesUserCodeAnInterruptFlagOfItsOwn) {
  enter(3);
  std::unique_ptr<engine::Engine> engine = engine::make_interpreter();
  s.set_rflags(flag::if_ | 2);
  s.cr4 |= cr4::pvi;
  machine.put<u16>(0x5000, 0xfafb);  // sti; cli
  engine->step(cpu);
  EXPECT_EQ(s.other_flags & (flag::vif | flag::if_), flag::vif | flag::if_);
  engine->step(cpu);
  EXPECT_EQ(s.other_flags & (flag::vif | flag::if_), flag::if_);
}

}  // namespace
}  // namespace anykvm::x86
