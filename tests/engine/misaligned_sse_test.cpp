// SSE operands that are not aligned: #GP, unless MXCSR.MM lets them lie anywhere. Reference: AMD64 manual volume
// 1, 4.2.2.
#include "engine/one_instruction.h"

namespace anykvm::engine {
namespace {

namespace exception = x86::exception;

class MisalignedSseTest : public OneInstruction {
 protected:
  MisalignedSseTest() { rax() = data + 1; }
  void SetUp() override {
    if (!x86::supports(x86::Feature::misalignsse)) GTEST_SKIP() << "no MISALIGNSSE here";
  }
  void set_mm() { cpu.state.fpu.mxcsr |= 1u << 17; }
};

TEST_F(MisalignedSseTest, FaultsWithoutMm) {
  EXPECT_EQ(execute({0x66, 0x0f, 0xfc, 0x00}), exception::gp);  // paddb xmm0, [rax]
  EXPECT_EQ(execute({0x0f, 0x58, 0x00}), exception::gp);        // addps xmm0, [rax]
  EXPECT_EQ(execute({0x0f, 0x10, 0x00}), no_fault);             // movups xmm0, [rax]
}

TEST_F(MisalignedSseTest, MmLetsComputationsLoadFromAnywhere) {
  set_mm();
  for (Gva from : {data + 1, missing - 16}) {
    rax() = from;
    std::memset(vector(0), 0, 16);
    EXPECT_EQ(execute({0x66, 0x0f, 0xfc, 0x00}), no_fault);  // paddb xmm0, [rax]
    for (unsigned n = 0; n < 16; ++n) EXPECT_EQ(vector(0)[n], at(from + n));
  }
  rax() = data + 1;
  EXPECT_EQ(execute({0x0f, 0x58, 0x00}), no_fault);                 // addps xmm0, [rax]
  EXPECT_EQ(execute({0x66, 0x0f, 0x2d, 0x00}), no_fault);           // cvtpd2pi mm0, [rax]
  EXPECT_EQ(execute({0x66, 0x0f, 0x3a, 0x0f, 0x00, 3}), no_fault);  // palignr xmm0, [rax], 3
  rax() = missing - 15;
  EXPECT_EQ(execute({0x66, 0x0f, 0xfc, 0x00}), exception::pf);
  EXPECT_EQ(cpu.state.cr2, missing);
}

TEST_F(MisalignedSseTest, MovesThatSayAlignedFaultAllTheSame) {
  set_mm();
  EXPECT_EQ(execute({0x0f, 0x28, 0x00}), exception::gp);              // movaps xmm0, [rax]
  EXPECT_EQ(execute({0x66, 0x0f, 0x6f, 0x00}), exception::gp);        // movdqa xmm0, [rax]
  EXPECT_EQ(execute({0x66, 0x0f, 0x7f, 0x00}), exception::gp);        // movdqa [rax], xmm0
  EXPECT_EQ(execute({0x66, 0x0f, 0xe7, 0x00}), exception::gp);        // movntdq [rax], xmm0
  EXPECT_EQ(execute({0x66, 0x0f, 0x38, 0x2a, 0x00}), exception::gp);  // movntdqa xmm0, [rax]
}

TEST_F(MisalignedSseTest, LdmxcsrTakesMm) {
  machine.put<u32>(data_gpa + 4, 0x21f80);
  rax() = data + 4;
  EXPECT_EQ(execute({0x0f, 0xae, 0x10}), no_fault);  // ldmxcsr [rax]
  EXPECT_EQ(cpu.state.fpu.mxcsr, 0x21f80u);
}

}  // namespace
}  // namespace anykvm::engine
