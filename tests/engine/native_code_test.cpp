// 16- and 32-bit code on the host CPU, which executes it in 64-bit mode: what the same bytes mean differently there.
#include "engine/native/native_code.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <initializer_list>
#include <vector>

#include "engine/native/decoded.h"
#include "x86/cpuid.h"

namespace anykvm::engine {
namespace {

class NativeCodeTest : public testing::Test {
 protected:
  NativeCodeTest()
      : code_(static_cast<u8*>(
            mmap(nullptr, page_size, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}
  ~NativeCodeTest() override { munmap(code_, page_size); }

  /// Runs one instruction; the test fails when it is not emitted.
  void run(unsigned bits, std::initializer_list<u8> bytes) {
    std::vector<u8> padded(bytes);
    padded.resize(16);
    Decoded d;
    ASSERT_TRUE(ZYAN_SUCCESS(decode_instruction(padded.data(), 15, bits, d)));
    ASSERT_EQ(d.instruction.length, bytes.size());
    const EmitResult result =
        emit_native(d.instruction, d.all_operands(), padded.data(), bits, {code_, native_code_bytes});
    ASSERT_TRUE(result.emitted);
    reinterpret_cast<NativeCode>(code_)(&state, memory);
  }
  void set_xmm(unsigned n, u8 value) { std::memset(state.fpu.vector[n], value, 16); }

  x86::CpuState state;
  alignas(64) u8 memory[64] = {};

 private:
  u8* code_;
};

TEST_F(NativeCodeTest, RunsOpcode82WhichIs80) {
  state.gpr[x86::rcx] = 0x10;
  run(32, {0x82, 0xc1, 0x05});  // add cl, 5
  EXPECT_EQ(state.gpr[x86::rcx], 0x15u);
  memory[0] = 7;
  run(16, {0x82, 0x2f, 0x05});  // sub byte [bx], 5
  EXPECT_EQ(memory[0], 2);
}

TEST_F(NativeCodeTest, LeavesTheSizeOfMovntiAlone) {
  state.gpr[x86::rax] = 0x11223344;
  run(16, {0x0f, 0xc3, 0x07});  // movnti [bx], eax: 32 bits in 16-bit code, too
  u32 stored;
  std::memcpy(&stored, memory, 4);
  EXPECT_EQ(stored, 0x11223344u);
}

TEST_F(NativeCodeTest, NamesTheStackPointerInFrontOfAnImmediate) {
  state.gpr[x86::rsp] = 0x1000;
  run(16, {0xbc, 0xa5, 0x5c});  // mov sp, 0x5ca5
  EXPECT_EQ(state.gpr[x86::rsp], 0x5ca5u);
  run(64, {0x48, 0xbc, 1, 2, 3, 4, 5, 6, 7, 8});  // mov rsp, imm64
  EXPECT_EQ(state.gpr[x86::rsp], 0x0807060504030201u);
}

TEST_F(NativeCodeTest, DropsTheRegisterBitsThatLegacyModesIgnore) {
  if (!x86::supports(x86::Feature::avx)) GTEST_SKIP() << "no AVX here";
  set_xmm(2, 2);
  set_xmm(3, 3);
  set_xmm(10, 10);
  run(32, {0xc4, 0xe1, 0x29, 0xfc, 0xcb});  // vpaddb xmm1, xmm2, xmm3 with vvvv naming xmm10
  EXPECT_EQ(state.fpu.vector[1][0], 5);
  run(32, {0xc4, 0xc1, 0x69, 0xfc, 0xcb});  // the same with B as for xmm11
  EXPECT_EQ(state.fpu.vector[1][5], 5);
  std::memset(memory, 0x80, 16);
  run(32, {0xc4, 0xe3, 0x69, 0x4c, 0x07, 0xb0});  // vpblendvb xmm0, xmm2, [edi], xmm3 named as xmm11
  EXPECT_EQ(state.fpu.vector[0][0], 2);
}

TEST_F(NativeCodeTest, KeepsGeneralRegistersAt32Bits) {
  if (!x86::supports(x86::Feature::bmi2)) GTEST_SKIP() << "no BMI2 here";
  state.gpr[x86::rcx] = 0xffffffff;
  state.gpr[x86::rdx] = 4;
  run(32, {0xc4, 0xe2, 0xe9, 0xf7, 0xc1});  // shlx eax, ecx, edx: W is ignored
  EXPECT_EQ(state.gpr[x86::rax], 0xfffffff0u);
}

}  // namespace
}  // namespace anykvm::engine
