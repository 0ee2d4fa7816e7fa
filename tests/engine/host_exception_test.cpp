// What the host raises in an instruction of the guest's, and what single instructions leave behind.
#include "engine/one_instruction.h"
#include "fuzz/host_fpu.h"

namespace anykvm::engine {
namespace {

using namespace x86;

class HostExceptionTest : public OneInstruction {
 protected:
  /// A single-precision value in an xmm register's element.
  void set(unsigned n, unsigned index, float value) { std::memcpy(vector(n) + index * 4, &value, 4); }
};

TEST_F(HostExceptionTest, DivisionLeavesTheRegisters) {
  rax() = 5;
  cpu.state.gpr[rdx] = 7;
  cpu.state.gpr[rcx] = 7;
  EXPECT_EQ(execute({0x48, 0xf7, 0xf1}), exception::de);  // div rcx
  EXPECT_EQ(rax(), 5u);
  EXPECT_EQ(cpu.state.gpr[rdx], 7u);
  cpu.state.gpr[rdx] = 6;
  EXPECT_EQ(execute({0x48, 0xf7, 0xf1}), no_fault);
  rax() = 0x8000;
  cpu.state.gpr[rcx] = data;
  std::memset(machine.base + data_gpa, 0xff, 8);
  cpu.state.gpr[rdx] = 0xffff;
  EXPECT_EQ(execute({0x66, 0xf7, 0x39}), exception::de);  // idiv word [rcx]: -32768 / -1
}

TEST_F(HostExceptionTest, OnlyTheFlagsOfWhatCameFirst) {
  // Element 0 divides by zero, which is unmasked, element 1 rounds: no result, so nothing was rounded.
  set(0, 0, 1), set(0, 1, 1), set(0, 2, 1), set(0, 3, 1);
  set(1, 0, 0), set(1, 1, 3), set(1, 2, 1), set(1, 3, 1);
  u8 before[16];
  std::memcpy(before, vector(0), 16);
  cpu.state.fpu.mxcsr = 0x1f80 & ~0x200u;
  EXPECT_EQ(execute({0x0f, 0x5e, 0xc1}), exception::xm);  // divps xmm0, xmm1
  EXPECT_EQ(cpu.state.fpu.mxcsr, (0x1f80u & ~0x200u) | 4);
  EXPECT_EQ(std::memcmp(before, vector(0), 16), 0);

  cpu.state.fpu.mxcsr = 0x1f80 & ~0x200u;
  cpu.state.cr4 &= ~cr4::osxmmexcpt;
  EXPECT_EQ(execute({0x0f, 0x5e, 0xc1}), exception::ud);
}

TEST_F(HostExceptionTest, ConversionToMmxEntersMmxMode) {
  EXPECT_EQ(execute({0xdb, 0xe3}), no_fault);  // fninit
  EXPECT_EQ(execute({0xd9, 0xe8}), no_fault);  // fld1
  set(0, 0, 1e20f);
  set(0, 1, 1);
  cpu.state.fpu.mxcsr = 0x1f80 & ~0x80u;
  EXPECT_EQ(execute({0x0f, 0x2d, 0xc0}), exception::xm);  // cvtps2pi mm0, xmm0
  EXPECT_EQ(cpu.state.fpu.mxcsr & 0x3f, 1u);
  EXPECT_EQ(cpu.state.fpu.x87[4], 0xff);         // all registers in use
  EXPECT_EQ(cpu.state.fpu.x87[3] >> 3 & 7, 0u);  // top
}

TEST_F(HostExceptionTest, TheHostsX87UnitIsEmptyAgain) {
  const fuzz::HostFpu before = fuzz::HostFpu::now();
  EXPECT_EQ(execute({0xd9, 0xe8}), no_fault);  // fld1
  EXPECT_EQ(fuzz::HostFpu::now(), before);
  EXPECT_EQ(execute({0x0f, 0xfc, 0xc1}), no_fault);  // paddb mm0, mm1
  EXPECT_EQ(fuzz::HostFpu::now(), before);
  cpu.state.gpr[rdi] = data;
  EXPECT_EQ(execute({0x0f, 0xf7, 0xc1}), no_fault);  // maskmovq mm0, mm1
  EXPECT_EQ(fuzz::HostFpu::now(), before);
}

TEST_F(HostExceptionTest, TheHostRoundsAsBefore) {
  // MMX and MXCSR in one instruction; the next x87 instruction must not bring the guest's MXCSR back.
  u32 host_before, host_after;
  __asm__ volatile("stmxcsr %0" : "=m"(host_before));
  cpu.state.fpu.mxcsr = 0x7f80;
  EXPECT_EQ(execute({0x0f, 0x2a, 0xc0}), no_fault);  // cvtpi2ps xmm0, mm0
  u32 image;
  std::memcpy(&image, cpu.state.fpu.x87 + 24, 4);
  EXPECT_EQ(image & 0x6000, host_before & 0x6000);
  __asm__ volatile("stmxcsr %0" : "=m"(host_after));
  EXPECT_EQ(host_before, host_after);
}

TEST_F(HostExceptionTest, X87StoreThatIsInvalidStoresNothing) {
  map(missing, data_gpa + page_size, pte::p | pte::w);
  EXPECT_EQ(execute({0xdb, 0xe3}), no_fault);  // fninit
  const u16 control = 0x37e;                   // an empty register is an unmasked exception
  std::memcpy(cpu.state.fpu.x87, &control, 2);
  rax() = missing - 2;
  const u32 before = machine.get<u32>(data_gpa + page_size - 2);
  EXPECT_EQ(execute({0xd9, 0x10}), no_fault);  // fst dword [rax], across two pages
  EXPECT_EQ(machine.get<u32>(data_gpa + page_size - 2), before);
  EXPECT_EQ(cpu.state.fpu.x87[2] & 0x81, 0x81);
  EXPECT_EQ(execute({0x9b}), exception::mf);  // fwait
}

TEST_F(HostExceptionTest, FnstenvShowsTheGuestsPointers) {
  EXPECT_EQ(execute({0xdb, 0xe3}), no_fault);  // fninit
  rax() = data + 32;
  EXPECT_EQ(execute({0xdd, 0x00}), no_fault);  // fld qword [rax]
  rax() = data + 64;
  EXPECT_EQ(execute({0xd9, 0x30}), no_fault);  // fnstenv [rax]
  EXPECT_EQ(machine.get<u32>(data_gpa + 64 + 12), 0x5000u);
  EXPECT_EQ(machine.get<u32>(data_gpa + 64 + 8), 0xffff3fffu);
  cpu.state.gpr[rdi] = data;
  EXPECT_EQ(execute({0x0f, 0xf7, 0xc9}), no_fault);  // maskmovq mm1, mm1
  EXPECT_EQ(execute({0xd9, 0x30}), no_fault);
  EXPECT_EQ(machine.get<u32>(data_gpa + 64 + 12), 0x5000u);  // neither has moved them
}

TEST_F(HostExceptionTest, FisttpLeavesTheGuestsPointers) {
  u8* x87 = cpu.state.fpu.x87;
  EXPECT_EQ(execute({0xdb, 0xe3}), no_fault);  // fninit
  EXPECT_EQ(execute({0xd9, 0xe8}), no_fault);  // fld1
  rax() = data + 32;
  EXPECT_EQ(execute({0xdb, 0x08}), no_fault);  // fisttp dword [rax]
  EXPECT_EQ(machine.get<u32>(data_gpa + 32), 1u);
  u64 instruction, operand;
  std::memcpy(&instruction, x87 + 8, 8);
  std::memcpy(&operand, x87 + 16, 8);
  EXPECT_EQ(instruction, 0x5000u);
  EXPECT_EQ(operand, data + 32);
}

TEST_F(HostExceptionTest, SibWithoutABaseIgnoresTheExtensionBit) {
  cpu.state.gpr[r13] = 0x1000000;
  cpu.state.gpr[rbx] = data;
  EXPECT_EQ(execute({0x67, 0x41, 0x8b, 0x04, 0x1d, 0x10, 0, 0, 0}), no_fault);  // mov eax, [ebx + 0x10]
  EXPECT_EQ(u32(rax()), machine.get<u32>(data_gpa + 16));
}

}  // namespace
}  // namespace anykvm::engine
