// Segment loads, system segments, selector probes, far transfers, SYSCALL and SYSENTER.
#include <gtest/gtest.h>

#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

class Segments : public testing::Test, public LongMode {
 protected:
  CpuState& s = cpu.state;
  void expect_fault(Result result, u8 vector, u32 error) {
    ASSERT_EQ(result, Result::fault);
    EXPECT_EQ(cpu.fault.vector, vector);
    EXPECT_EQ(cpu.fault.error, error);
  }
  /// A descriptor in a table grown to hold it.
  u16 describe(u64 low, u64 high = 0) {
    const u16 selector = u16(s.gdtr.limit + 1);
    machine.put<u64>(gdt + selector, low);
    machine.put<u64>(gdt + selector + 8, high);
    s.gdtr.limit += 16;
    return selector;
  }
};

TEST_F(Segments, LoadingDataSegments) {
  ASSERT_EQ(cpu.load_segment(ds, kernel_ss), Result::ok);
  EXPECT_EQ(s.segment[ds].limit, 0xffffffffu);
  ASSERT_EQ(cpu.load_segment(fs, 0), Result::ok);
  EXPECT_TRUE(s.segment[fs].unusable);
  expect_fault(cpu.load_segment(ds, 0x1000), exception::gp, 0x1000);
  expect_fault(cpu.load_segment(ds, tss_selector), exception::gp, tss_selector);
  expect_fault(cpu.load_segment(ds, 4 | 8), exception::gp, 4 | 8);  // no LDT
  const u16 absent = describe(data & ~(1ull << 47));
  expect_fault(cpu.load_segment(ds, absent), exception::np, absent);
  expect_fault(cpu.load_segment(ss, absent), exception::ss, absent);
  const u16 based = describe(0x12cf92345678ffff & ~(1ull << 40));
  ASSERT_EQ(cpu.load_segment(gs, based), Result::ok);
  EXPECT_EQ(s.segment[gs].base, 0x12345678u);
  EXPECT_EQ(machine.get<u64>(gdt + based) >> 40 & 1, 1u) << "the accessed bit";
  EXPECT_EQ(s.segment[gs].type, 3);
  enter(3);
  expect_fault(cpu.load_segment(ds, kernel_ss), exception::gp, kernel_ss);
  ASSERT_EQ(cpu.load_segment(ds, user_ss), Result::ok);
}

TEST_F(Segments, LoadingTheStackSegment) {
  ASSERT_EQ(cpu.load_segment(ss, 0), Result::ok) << "null SS in 64-bit mode at CPL 0";
  EXPECT_EQ(s.cpl, 0);
  expect_fault(cpu.load_segment(ss, 3), exception::gp, 0);
  expect_fault(cpu.load_segment(ss, user_ss), exception::gp, user_ss & ~3u);
  expect_fault(cpu.load_segment(ss, kernel_cs), exception::gp, kernel_cs);
  ASSERT_EQ(cpu.load_segment(ss, kernel_ss), Result::ok);
  enter(3);
  expect_fault(cpu.load_segment(ss, 3), exception::gp, 0);
}

TEST_F(Segments, SystemSegments) {
  const u16 ldt = describe(0x0000820000000fff | 0x5000ull << 16, 0xffff8800);
  ASSERT_EQ(cpu.load_ldtr(ldt), Result::ok);
  EXPECT_EQ(s.ldtr.base, 0xffff8800'00005000u);
  EXPECT_EQ(s.ldtr.limit, 0xfffu);
  ASSERT_EQ(cpu.load_ldtr(0), Result::ok);
  EXPECT_TRUE(s.ldtr.unusable);
  expect_fault(cpu.load_tr(tss_selector), exception::gp, tss_selector);  // busy
  const u16 fresh = describe(0x0000890000000067 | 0x3000ull << 16);
  ASSERT_EQ(cpu.load_tr(fresh), Result::ok);
  EXPECT_EQ(s.tr.type, 0xb);
  EXPECT_EQ(machine.get<u64>(gdt + fresh) >> 40 & 0xf, 0xbu);
  expect_fault(cpu.load_tr(0), exception::gp, 0);
  expect_fault(cpu.load_ldtr(fresh), exception::gp, fresh);
}

TEST_F(Segments, Probes) {
  bool ok;
  u32 value = 0;
  ASSERT_EQ(cpu.probe_selector(user_cs, SelectorProbe::lar, ok, value), Result::ok);
  EXPECT_TRUE(ok);
  EXPECT_EQ(value, 0x00affb00u);
  ASSERT_EQ(cpu.probe_selector(user_ss, SelectorProbe::lsl, ok, value), Result::ok);
  EXPECT_TRUE(ok);
  EXPECT_EQ(value, 0xffffffffu);
  ASSERT_EQ(cpu.probe_selector(kernel_cs, SelectorProbe::verw, ok, value), Result::ok);
  EXPECT_FALSE(ok);
  ASSERT_EQ(cpu.probe_selector(kernel_cs, SelectorProbe::verr, ok, value), Result::ok);
  EXPECT_TRUE(ok);
  enter(3);
  for (auto which : {SelectorProbe::lar, SelectorProbe::lsl, SelectorProbe::verr, SelectorProbe::verw}) {
    for (u16 selector : {u16(0), u16(kernel_ss), u16(0x1000)}) {
      ASSERT_EQ(cpu.probe_selector(selector, which, ok, value), Result::ok);
      EXPECT_FALSE(ok);
    }
  }
}

TEST_F(Segments, FarTransfersInLongMode) {
  expect_fault(cpu.far_jump(0, 0x5000, 4, 0), exception::gp, 0);
  expect_fault(cpu.far_jump(kernel_ss, 0x5000, 4, 0), exception::gp, kernel_ss);
  expect_fault(cpu.far_jump(user_cs, 0x5000, 4, 0), exception::gp, user_cs & ~3u);
  expect_fault(cpu.far_jump(kernel_cs, 1ull << 47, 8, 0), exception::gp, 0);
  ASSERT_EQ(cpu.far_call(kernel_cs, 0x6000, 8, 0x5007), Result::ok);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x5007u);
  EXPECT_EQ(word(s.gpr[rsp], 1), kernel_cs);
  ASSERT_EQ(cpu.far_return(8, 0), Result::ok);
  EXPECT_EQ(s.rip, 0x5007u);
  EXPECT_EQ(s.gpr[rsp], 0x7000u);
}

TEST_F(Segments, ACallGateLeadsInwardAndRetOutward) {
  map(0x8000'0000, 0x7000, pte::p | pte::w | pte::u);
  const u16 gate_selector = describe(0x6000 | u64(kernel_cs) << 16 | 0xecull << 40, 0);
  enter(3);
  s.gpr[rsp] = 0x8000'0800;
  ASSERT_EQ(cpu.far_call(gate_selector, 0, 8, 0x5007), Result::ok);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_EQ(s.rip, 0x6000u);
  EXPECT_EQ(s.gpr[rsp], stack_top - 32);
  EXPECT_EQ(word(s.gpr[rsp], 0), 0x5007u);
  EXPECT_EQ(word(s.gpr[rsp], 1), user_cs);
  EXPECT_EQ(word(s.gpr[rsp], 2), 0x8000'0800u);
  EXPECT_EQ(word(s.gpr[rsp], 3), user_ss);
  ASSERT_EQ(cpu.far_return(8, 0), Result::ok);
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.gpr[rsp], 0x8000'0800u);
  expect_fault(cpu.far_jump(gate_selector, 0, 8, 0), exception::gp, kernel_cs);
}

TEST_F(Segments, SyscallAndSysret) {
  enter(3);
  s.msr.star = u64(kernel_cs) << 32 | u64(0x18 | 3) << 48;
  s.msr.lstar = 0xffffffff81000000;
  s.msr.cstar = 0xffffffff82000000;
  s.msr.sfmask = flag::if_ | flag::df | flag::tf;
  s.set_rflags(flag::if_ | flag::df | flag::cf | flag::rf | 2);
  ASSERT_EQ(cpu.syscall(0x400002), Result::ok);
  EXPECT_EQ(s.rip, s.msr.lstar);
  EXPECT_EQ(s.gpr[rcx], 0x400002u);
  EXPECT_EQ(s.gpr[r11], flag::if_ | flag::df | flag::cf | 2);
  EXPECT_EQ(s.rflags(), flag::cf | 2);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_EQ(s.segment[cs].selector, kernel_cs);
  EXPECT_EQ(s.segment[ss].selector, kernel_ss);
  EXPECT_EQ(s.code_bits, 64);
  ASSERT_EQ(cpu.sysret(8), Result::ok);
  EXPECT_EQ(s.rip, 0x400002u);
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.segment[cs].selector, user_cs);
  EXPECT_EQ(s.segment[ss].selector, user_ss);
  EXPECT_EQ(s.rflags(), flag::if_ | flag::df | flag::cf | 2);
  EXPECT_EQ(machine.windows, 1u);
  expect_fault(cpu.sysret(8), exception::gp, 0);

  enter(0);
  s.gpr[rcx] = 0xf'0040'0002;
  ASSERT_EQ(cpu.sysret(4), Result::ok);
  EXPECT_EQ(s.code_bits, 32);
  EXPECT_EQ(s.rip, 0x400002u);
  ASSERT_EQ(cpu.syscall(0x400010), Result::ok);
  EXPECT_EQ(s.rip, s.msr.cstar) << "from compatibility mode";

  s.msr.efer &= ~efer::sce;
  EXPECT_EQ(cpu.syscall(0), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ud);
}

TEST_F(Segments, SysenterAndSysexit) {
  enter(3);
  expect_fault(cpu.sysenter(0x400002), exception::gp, 0);
  s.msr.sysenter_cs = kernel_cs;
  s.msr.sysenter_eip = 0xffffffff81000000;
  s.msr.sysenter_esp = 0xffff880000001000;
  s.set_rflags(flag::if_ | 2);
  ASSERT_EQ(cpu.sysenter(0x400002), Result::ok);
  EXPECT_EQ(s.cpl, 0);
  EXPECT_EQ(s.rip, s.msr.sysenter_eip);
  EXPECT_EQ(s.gpr[rsp], s.msr.sysenter_esp);
  EXPECT_EQ(s.rflags(), 2u);
  s.gpr[rdx] = 0x400002;
  s.gpr[rcx] = 0x7fff0000;
  ASSERT_EQ(cpu.sysexit(8), Result::ok);
  EXPECT_EQ(s.cpl, 3);
  EXPECT_EQ(s.segment[cs].selector, user_cs);
  EXPECT_EQ(s.code_bits, 64);
}

}  // namespace
}  // namespace anykvm::x86
