// AVX-512 and masked accesses in the reference engine: what a mask leaves out, what a fault in the middle leaves, which
// control registers allow it. What the instructions compute is the host's; tests/isa compares.
#include "engine/one_instruction.h"

namespace anykvm::engine {
namespace {

using namespace x86;
namespace xf = xfeature;

constexpr u64 avx512_components = xf::x87 | xf::sse | xf::avx | xf::opmask | xf::zmm_hi256 | xf::hi16_zmm;

class Avx512Test : public OneInstruction {
 protected:
  void SetUp() override {
    if (!supports(Feature::avx512f)) GTEST_SKIP() << "no AVX-512 here";
  }
};

TEST_F(Avx512Test, ReachesAllRegisters) {
  std::memset(vector(17), 3, 64);
  std::memset(vector(30), 4, 64);
  opmask(3) = 0x00ff00ff00ff00ff;
  EXPECT_EQ(execute({0x62, 0x01, 0x75, 0xc3, 0xfc, 0xfe}), no_fault);  // vpaddb zmm31{k3}{z}, zmm17, zmm30
  for (unsigned n = 0; n < 64; ++n) EXPECT_EQ(vector(31)[n], n / 8 % 2 ? 0 : 7) << n;
}

TEST_F(Avx512Test, NeedsItsComponents) {
  cpu.state.xcr0 = xf::x87 | xf::sse | xf::avx;
  EXPECT_EQ(execute({0x62, 0xf1, 0x75, 0x48, 0xfc, 0xc2}), exception::ud);  // vpaddb zmm0, zmm1, zmm2
  EXPECT_EQ(execute({0xc5, 0xf4, 0x41, 0xc2}), exception::ud);              // kandw k0, k1, k2
  EXPECT_EQ(execute({0xc5, 0xf5, 0xfc, 0xc2}), no_fault);                   // vpaddb ymm0, ymm1, ymm2
  cpu.state.xcr0 = avx512_components;
  EXPECT_EQ(execute({0x62, 0xf1, 0x75, 0x48, 0xfc, 0xc2}), no_fault);
  cpu.state.cr0 |= cr0::ts;
  EXPECT_EQ(execute({0xc5, 0xf4, 0x41, 0xc2}), exception::nm);
  cpu.state.cr0 &= ~cr0::ts;
  cpu.state.cr4 &= ~cr4::osxsave;
  EXPECT_EQ(execute({0xc5, 0xf4, 0x41, 0xc2}), exception::ud);
}

TEST_F(Avx512Test, ScalesDisplacements) {
  rax() = data - 128;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7c, 0x48, 0x10, 0x48, 0x03}), no_fault);  // vmovups zmm1, [rax + 3 * 64]
  EXPECT_EQ(vector(1)[0], at(data + 64));
  EXPECT_EQ(execute({0x62, 0xf1, 0x7c, 0x58, 0x58, 0x50, 0x21}), no_fault);  // vaddps zmm2, zmm0, [rax+33*4]{1to16}
  EXPECT_EQ(element(2, 15), element(2, 0));
}

TEST_F(Avx512Test, LoadsOnlyWhatTheMaskChooses) {
  rax() = missing - 16;
  opmask(1) = 0x5555;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x08}), no_fault);  // vmovdqu8 zmm1{k1}{z}, [rax]
  for (unsigned n = 0; n < 64; ++n) EXPECT_EQ(vector(1)[n], n < 16 && n % 2 == 0 ? at(missing - 16 + n) : 0) << n;

  opmask(1) = 1 << 20;
  std::memset(vector(1), 0xee, 64);
  EXPECT_EQ(execute({0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x08}), exception::pf);
  EXPECT_EQ(cpu.state.cr2 & page_mask, missing);
  EXPECT_EQ(vector(1)[0], 0xee);
}

TEST_F(Avx512Test, ExpandsAsManyElementsAsThereAre) {
  rax() = missing - 8;
  opmask(1) = 0x8001;                                                  // two elements, the last two of the page
  EXPECT_EQ(execute({0x62, 0xf2, 0x7d, 0xc9, 0x89, 0x08}), no_fault);  // vpexpandd zmm1{k1}{z}, [rax]
  EXPECT_EQ(u8(element(1, 15)), at(missing - 4));
  opmask(1) = 0x8003;
  EXPECT_EQ(execute({0x62, 0xf2, 0x7d, 0xc9, 0x89, 0x08}), exception::pf);
}

TEST_F(Avx512Test, StoresOnlyWhatTheMaskChooses) {
  map(missing, data_gpa + page_size, pte::p | pte::w);
  std::memset(machine.base + data_gpa + page_size, 0x11, 64);
  rax() = missing - 2;
  std::memset(vector(1), 0xaa, 64);
  vector(1)[3] = 0;
  opmask(1) = 0b1101;
  const u8 before = at(missing - 1);
  EXPECT_EQ(execute({0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x08}), no_fault);  // vmovdqu8 [rax]{k1}, zmm1
  EXPECT_EQ(at(missing - 2), 0xaa);
  EXPECT_EQ(at(missing - 1), before);
  EXPECT_EQ(at(missing), 0xaa);
  EXPECT_EQ(at(missing + 1), 0x00);
  EXPECT_EQ(at(missing + 2), 0x11);
}

TEST_F(Avx512Test, MayStoreNothingWhereNothingCanBeStored) {
  rax() = read_only;
  opmask(1) = 0;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x08}), no_fault);
  opmask(1) = 2;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x08}), exception::pf);
  EXPECT_EQ(cpu.state.cr2 & page_mask, read_only);
}

TEST_F(Avx512Test, ChecksAlignmentOfWhatIsAccessed) {
  rax() = data + 4;
  opmask(1) = 1;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7c, 0x49, 0x28, 0x08}), exception::gp);  // vmovaps zmm1{k1}, [rax]
  rax() = data + 64;
  EXPECT_EQ(execute({0x62, 0xf1, 0x7c, 0x49, 0x28, 0x08}), no_fault);
}

TEST_F(Avx512Test, DevicesSeeWhatTheMaskChooses) {
  for (unsigned n = 0; n < 16; ++n) set_element(1, n, 0x1000 + n);
  rax() = device;
  opmask(1) = 0b100010;
  machine.mmio_sinks = {device_gpa + 4, device_gpa + 20};
  EXPECT_EQ(execute({0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x08}), no_fault);  // vmovdqu32 [rax]{k1}, zmm1
  const std::vector<FakeMachine::Access> expected = {{device_gpa + 4, 4, 0x1001}, {device_gpa + 20, 4, 0x1005}};
  EXPECT_EQ(machine.mmio_writes, expected);

  opmask(1) = 0;                                                       // no device is asked
  EXPECT_EQ(execute({0x62, 0xf1, 0x7e, 0x49, 0x6f, 0x08}), no_fault);  // vmovdqu32 zmm1{k1}, [rax]
  EXPECT_EQ(cpu.exit.kind, ExitKind::none);
}

TEST_F(Avx512Test, GatherKeepsWhatItHadBeforeTheFault) {
  rax() = data;
  for (unsigned n = 0; n < 16; ++n) set_element(2, n, n == 3 ? page_size : n * 8), set_element(1, n, 0xc0de);
  opmask(1) = 0xfffd;
  EXPECT_EQ(execute({0x62, 0xf2, 0x7d, 0x49, 0x90, 0x0c, 0x10}), exception::pf);  // vpgatherdd zmm1{k1}, [rax+zmm2]
  EXPECT_EQ(cpu.state.cr2, missing);
  EXPECT_EQ(opmask(1), 0xfff8u);
  EXPECT_EQ(element(1, 0), machine.get<u32>(data_gpa));
  EXPECT_EQ(element(1, 1), 0xc0deu);
  EXPECT_EQ(element(1, 2), machine.get<u32>(data_gpa + 16));
  EXPECT_EQ(element(1, 4), 0xc0deu);
  set_element(2, 3, 8);
  EXPECT_EQ(execute({0x62, 0xf2, 0x7d, 0x49, 0x90, 0x0c, 0x10}), no_fault);
  EXPECT_EQ(opmask(1), 0u);
  EXPECT_EQ(element(1, 15), machine.get<u32>(data_gpa + 120));
}

TEST_F(Avx512Test, ScatterKeepsWhatItHadBeforeTheFault) {
  rax() = data;
  for (unsigned n = 0; n < 8; ++n) {
    const u64 index = n == 2 ? page_size : n * 16;
    std::memcpy(vector(2) + n * 8, &index, 8);
    set_element(1, n, 0xbeef0000 + n);
  }
  opmask(1) = 0xff;
  const u32 before = machine.get<u32>(data_gpa + 48);
  EXPECT_EQ(execute({0x62, 0xf2, 0x7d, 0x49, 0xa1, 0x0c, 0x10}), exception::pf);  // vpscatterqd [rax+zmm2]{k1}, ymm1
  EXPECT_EQ(opmask(1), 0xfcu);
  EXPECT_EQ(machine.get<u32>(data_gpa + 16), 0xbeef0001u);
  EXPECT_EQ(machine.get<u32>(data_gpa + 48), before);
}

TEST_F(Avx512Test, XsaveHasTheComponents) {
  std::memset(vector(1), 0x77, 64);
  std::memset(vector(20), 0x88, 64);
  opmask(5) = 0x123456789abcdef0;
  const CpuState saved = cpu.state;
  std::memset(machine.base + data_gpa, 0, page_size);
  rax() = 0xffffffff;
  cpu.state.gpr[rdx] = 0xffffffff;
  cpu.state.gpr[rdi] = data;
  EXPECT_EQ(execute({0x0f, 0xae, 0x27}), no_fault);  // xsave [rdi]
  EXPECT_EQ(machine.get<u64>(data_gpa + 512) & avx512_components, avx512_components & ~xf::x87);
  cpu.state.fpu = {};
  EXPECT_EQ(execute({0x0f, 0xae, 0x2f}), no_fault);  // xrstor [rdi]
  EXPECT_EQ(std::memcmp(cpu.state.fpu.vector, saved.fpu.vector, sizeof saved.fpu.vector), 0);
  EXPECT_EQ(opmask(5), saved.fpu.opmask[5]);
}

// --- before AVX-512
// ----------------------------------------------------------------------------------------------------
class MaskedMoveTest : public OneInstruction {
 protected:
  void SetUp() override {
    if (!supports(Feature::avx)) GTEST_SKIP() << "no AVX here";
  }
};

TEST_F(MaskedMoveTest, VmaskmovTouchesOnlyTheChosen) {
  rax() = missing - 4;
  set_element(2, 0, 0x80000000);
  set_element(1, 0, 0xcafe);
  EXPECT_EQ(execute({0xc4, 0xe2, 0x6d, 0x2e, 0x08}), no_fault);  // vmaskmovps [rax], ymm2, ymm1
  EXPECT_EQ(machine.get<u32>(data_gpa + page_size - 4), 0xcafeu);
  EXPECT_EQ(execute({0xc4, 0xe2, 0x6d, 0x2c, 0x18}), no_fault);  // vmaskmovps ymm3, ymm2, [rax]
  EXPECT_EQ(element(3, 0), 0xcafeu);
  EXPECT_EQ(element(3, 1), 0u);
  set_element(2, 1, 0x80000000);
  EXPECT_EQ(execute({0xc4, 0xe2, 0x6d, 0x2c, 0x18}), exception::pf);
  EXPECT_EQ(cpu.state.cr2, missing);
}

TEST_F(MaskedMoveTest, MaskmovStoresWhereRdiAndTheSegmentSay) {
  cpu.state.segment[fs].base = 0x100;
  cpu.state.gpr[rdi] = data;
  for (unsigned n = 0; n < 16; ++n) vector(1)[n] = u8(0xa0 + n), vector(2)[n] = n % 3 ? 0 : 0x80;
  const u8 before = at(data + 0x101);
  EXPECT_EQ(execute({0x64, 0x66, 0x0f, 0xf7, 0xca}), no_fault);  // maskmovdqu fs:[rdi], xmm1, xmm2
  EXPECT_EQ(at(data + 0x100), 0xa0);
  EXPECT_EQ(at(data + 0x101), before);
  EXPECT_EQ(at(data + 0x103), 0xa3);
}

}  // namespace
}  // namespace anykvm::engine
