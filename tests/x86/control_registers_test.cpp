// Values that control registers refuse, what their changes entail, and the way from reset to long mode.
#include "x86/control_registers.h"

#include <gtest/gtest.h>

#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

class ControlRegisters : public testing::Test, public LongMode {
 protected:
  CpuState& s = cpu.state;
  void refused(unsigned index, u64 value) {
    const CpuState before = s;
    ASSERT_EQ(cpu.write_cr(index, value), Result::fault) << "CR" << index << " = " << std::hex << value;
    EXPECT_EQ(cpu.fault.vector, exception::gp);
    EXPECT_EQ(cpu.fault.error, 0u);
    EXPECT_EQ(s.cr0, before.cr0);
    EXPECT_EQ(s.cr3, before.cr3);
    EXPECT_EQ(s.cr4, before.cr4);
    EXPECT_EQ(s.msr.efer, before.msr.efer);
  }
};

TEST_F(ControlRegisters, RefusedValues) {
  refused(0, 1ull << 32 | s.cr0);
  refused(0, s.cr0 | cr0::nw);
  refused(0, cr0::pg);
  refused(0, cr0::pe);  // leaving paging from 64-bit code
  refused(3, 1ull << 36);
  refused(4, s.cr4 & ~cr4::pae);
  refused(4, s.cr4 | cr4::vmxe);
  refused(4, s.cr4 | cr4::la57);
  refused(4, s.cr4 | 1ull << 40);
  refused(8, 16);
  s.cr3 |= 1;
  refused(4, s.cr4 | cr4::pcide);
  s.cr3 &= ~1ull;
  EXPECT_EQ(cpu.write_cr(4, s.cr4 | cr4::pcide), Result::ok);
  EXPECT_EQ(cpu.write_cr(1, 0), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ud);
}

TEST_F(ControlRegisters, LongModeBeginsWithA16BitTaskOnAmdsAlone) {
  const u64 paged = s.cr0;
  s.cr0 &= ~cr0::pg;
  s.msr.efer &= ~efer::lma;
  s.segment[cs].l = false;
  s.tr.type = 3;
  cpu.update_mode();
  kvm_cpuid_entry2 vendor = {.function = 0, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69};
  ASSERT_EQ(cpu.cpuid.set({&vendor, 1}), 0);
  refused(0, paged);
  vendor.ebx = 0x68747541, vendor.ecx = 0x444d4163, vendor.edx = 0x69746e65;
  ASSERT_EQ(cpu.cpuid.set({&vendor, 1}), 0);
  EXPECT_EQ(cpu.write_cr(0, paged), Result::ok);
  EXPECT_TRUE(s.long_mode());
}

TEST_F(ControlRegisters, CpuidReservesBits) {
  // Before KVM_SET_CPUID2: what KVM_GET_SUPPORTED_CPUID does not offer.
  EXPECT_EQ(!(cr4_reserved(cpu) & cr4::la57), supports(Feature::la57));
  EXPECT_EQ(!(cr4_reserved(cpu) & cr4::pke), supports(Feature::pku));
  EXPECT_EQ(cr4_reserved(cpu) & ~(cr4::la57 | cr4::pke), ~cr4_supported);
  kvm_cpuid_entry2 leaf = {.function = 1, .ecx = 1u << 17};
  ASSERT_EQ(cpu.cpuid.set({&leaf, 1}), 0);
  EXPECT_EQ(cr4_reserved(cpu),
            ~cr4_supported | cr4::osxsave | cr4::smep | cr4::smap | cr4::fsgsbase | cr4::umip | cr4::pke | cr4::la57);
}

TEST_F(ControlRegisters, Cr8IsTheMachines) {
  ASSERT_EQ(cpu.write_cr(8, 5), Result::ok);
  EXPECT_EQ(machine.cr8, 5u);
  u64 value;
  ASSERT_EQ(cpu.read_cr(8, value), Result::ok);
  EXPECT_EQ(value, 5u);
}

TEST_F(ControlRegisters, DebugRegisters) {
  u64 value;
  ASSERT_EQ(cpu.write_dr(4, 0xffff'ffff), Result::ok) << "DR4 is DR6";
  EXPECT_EQ(s.dr6, 0xffffefffu);
  ASSERT_EQ(cpu.write_dr(7, 0), Result::ok);
  EXPECT_EQ(s.dr7, 0x400u);
  EXPECT_EQ(cpu.write_dr(7, 1ull << 32), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  s.cr4 |= cr4::de;
  EXPECT_EQ(cpu.read_dr(5, value), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ud);
  ASSERT_EQ(cpu.write_dr(7, 1 << 13), Result::ok);
  EXPECT_EQ(cpu.read_dr(0, value), Result::fault) << "DR7.GD";
  EXPECT_EQ(cpu.fault.vector, exception::db);
}

TEST_F(ControlRegisters, Xcr0) {
  EXPECT_EQ(cpu.write_xcr(0, 3), Result::fault) << "CR4.OSXSAVE is clear";
  EXPECT_EQ(cpu.fault.vector, exception::ud);
  s.cr4 |= cr4::osxsave;
  EXPECT_EQ(cpu.write_xcr(0, 3), Result::ok);
  EXPECT_EQ(s.xcr0, 3u);
  for (u64 value : {0ull, 2ull, 5ull, 1ull << 63 | 1, 3ull | 1 << 5}) {
    EXPECT_EQ(cpu.write_xcr(0, value), Result::fault) << value;
    EXPECT_EQ(cpu.fault.vector, exception::gp);
  }
  EXPECT_EQ(cpu.write_xcr(1, 3), Result::fault);
  enter(3);
  EXPECT_EQ(cpu.write_xcr(0, 3), Result::fault);
}

TEST_F(ControlRegisters, IfOpensTheInterruptWindow) {
  cpu.write_rflags(flag::if_, flag::if_);
  EXPECT_EQ(machine.windows, 1u);
  cpu.write_rflags(flag::if_, flag::if_);
  cpu.write_rflags(0, flag::if_);
  EXPECT_EQ(machine.windows, 1u);
  cpu.write_rflags(~0ull, flag::arithmetic);
  EXPECT_EQ(s.rflags(), flag::arithmetic | flag::fixed1);
}

/// What a boot loader does: real mode, protected mode, PAE, EFER.LME, paging, a far jump to 64-bit code and back.
TEST(ModeSwitch, FromResetToLongModeAndBack) {
  FakeMachine machine;
  Cpu cpu(machine);
  CpuState& s = cpu.state;
  EXPECT_EQ(s.code_bits, 16);
  EXPECT_EQ(s.segment[cs].base + s.rip, 0xfffffff0u);
  machine.put<u64>(0x1008, 0x00cf9b000000ffff);
  machine.put<u64>(0x1010, 0x00af9b000000ffff);
  machine.put<u64>(0x1018, 0x00cf93000000ffff);
  s.gdtr = {0x1000, 31};
  ASSERT_EQ(cpu.far_jump(0, 0x5000, 2, 0), Result::ok);
  EXPECT_EQ(s.segment[cs].base, 0u);

  ASSERT_EQ(cpu.write_cr(0, cr0::pe | cr0::et), Result::ok);
  EXPECT_EQ(s.code_bits, 16) << "until CS is loaded";
  ASSERT_EQ(cpu.far_jump(8, 0x5100, 4, 0), Result::ok);
  EXPECT_EQ(s.code_bits, 32);
  for (SegmentName name : {ss, ds, es}) ASSERT_EQ(cpu.load_segment(name, 0x18), Result::ok);

  machine.put<u64>(0x10000, 0x11000 | 3);
  machine.put<u64>(0x11000, 0x12000 | 3);
  machine.put<u64>(0x12000, 0x83);
  s.msr.efer |= efer::lme;
  ASSERT_EQ(cpu.write_cr(3, 0x10000), Result::ok);
  EXPECT_EQ(cpu.write_cr(0, s.cr0 | cr0::pg), Result::fault) << "long mode needs PAE";
  ASSERT_EQ(cpu.write_cr(4, cr4::pae), Result::ok);
  ASSERT_EQ(cpu.write_cr(0, s.cr0 | cr0::pg), Result::ok);
  EXPECT_TRUE(s.long_mode());
  EXPECT_EQ(s.code_bits, 32) << "compatibility mode";
  ASSERT_EQ(cpu.far_jump(0x10, 0x5200, 4, 0), Result::ok);
  EXPECT_EQ(s.code_bits, 64);
  u64 value;
  machine.put<u64>(0x5000, 0x77);
  ASSERT_EQ(cpu.read(0x5000, value), Result::ok);
  EXPECT_EQ(value, 0x77u);
  EXPECT_EQ(cpu.read(0x20'0000, value), Result::fault);

  ASSERT_EQ(cpu.far_jump(8, 0x5300, 4, 0), Result::ok);
  ASSERT_EQ(cpu.write_cr(0, s.cr0 & ~cr0::pg), Result::ok);
  EXPECT_FALSE(s.long_mode());
  EXPECT_TRUE(s.msr.efer & efer::lme);
  ASSERT_EQ(cpu.read(0x20'0000, value), Result::ok);
}

TEST(Reset, PowerOnInitAndStartUp) {
  FakeMachine machine;
  Cpu cpu(machine);
  CpuState& s = cpu.state;
  EXPECT_EQ(s.cr0, 0x60000010u);
  EXPECT_EQ(s.rflags(), 2u);
  EXPECT_EQ(s.fpu.x87[0] | s.fpu.x87[1] << 8, 0x37f);
  s.cr0 = cr0::pe;
  s.msr.star = 5;
  s.fpu.vector[3][0] = 9;
  s.gpr[rbx] = 1;
  cpu.init();
  EXPECT_EQ(s.cr0, cr0::et);
  EXPECT_EQ(s.gpr[rbx], 0u);
  EXPECT_EQ(s.fpu.vector[3][0], 9) << "INIT leaves the FPU alone";
  EXPECT_EQ(s.msr.star, 5u);
  cpu.start_up(0x9a);
  EXPECT_EQ(s.segment[cs].selector, 0x9a00);
  EXPECT_EQ(s.segment[cs].base, 0x9a000u);
  EXPECT_EQ(s.rip, 0u);
  cpu.reset();
  EXPECT_EQ(s.msr.star, 0u);
  EXPECT_EQ(s.fpu.vector[3][0], 0);
}

}  // namespace
}  // namespace anykvm::x86
