// The images of FNSTENV and FLDENV in their four layouts, and what the save instructions keep of the pointers.
#include "x86/x87_environment.h"

#include <gtest/gtest.h>

#include <cstring>

#include "x86/xsave_parts.h"

namespace anykvm::x86 {
namespace {

class X87EnvironmentTest : public testing::Test {
 protected:
  X87EnvironmentTest() {
    init_x87(fpu);
    note_x87_instruction(fpu,
                         {.opcode = 0x5e8,
                          .code_selector = 0x1234,
                          .rip = 0x56789,
                          .has_operand = true,
                          .data_selector = 0x4321,
                          .offset = 0xabcde},
                         x87_exception_waits(fpu));
    // What the processor under us does not update by itself.
    const u16 opcode = 0x5e8;
    const u64 operand = 0xabcde;
    std::memcpy(fpu.x87 + 6, &opcode, 2);
    std::memcpy(fpu.x87 + 16, &operand, 8);
    fpu.x87_code_selector = 0x1234;
    fpu.x87_data_selector = 0x4321;
  }
  void push(u16 sign_and_exponent, u64 significand) {
    const unsigned top = ((fpu.x87[3] >> 3 & 7) - 1) & 7;
    std::memmove(fpu.x87 + 48, fpu.x87 + 32, 112);
    std::memcpy(fpu.x87 + 32, &significand, 8);
    std::memcpy(fpu.x87 + 40, &sign_and_exponent, 2);
    fpu.x87[3] = u8(top << 3);
    fpu.x87[4] |= u8(1 << top);
  }
  template <unsigned n>
  void expect(X87Format format, const u16 (&words)[n]) {
    u16 image[14] = {};
    store_x87_environment(fpu, format, reinterpret_cast<u8*>(image));
    for (unsigned k = 0; k < n; ++k) EXPECT_EQ(image[k], words[k]) << "word " << k;
  }

  FpuState fpu;
};

TEST_F(X87EnvironmentTest, ProtectedMode) {
  expect({true, true},
         {0x37f, 0xffff, 0, 0xffff, 0xffff, 0xffff, 0x6789, 0x5, 0x1234, 0x5e8, 0xbcde, 0xa, 0x4321, 0xffff});
  expect({false, true}, {0x37f, 0, 0xffff, 0x6789, 0x1234, 0xbcde, 0x4321});
}

TEST_F(X87EnvironmentTest, RealModeHasLinearAddresses) {
  // 0x12340 + 0x56789 = 0x68ac9, 0x43210 + 0xabcde = 0xeeeee
  expect({true, false},
         {0x37f, 0xffff, 0, 0xffff, 0xffff, 0xffff, 0x8ac9, 0xffff, 0x65e8, 0, 0xeeee, 0xffff, 0xe000, 0});
  expect({false, false}, {0x37f, 0, 0xffff, 0x8ac9, 0x65e8, 0xeeee, 0xe000});
}

TEST_F(X87EnvironmentTest, TagsSayWhatARegisterHolds) {
  push(0x3fff, 1ull << 63);  // 1.0 in register 7
  push(0, 0);                // 0 in 6
  push(0x7fff, 1ull << 63);  // infinity in 5
  push(0, 1);                // a denormal in 4
  push(0x3fff, 1);           // unnormal in 3
  u16 image[7];
  store_x87_environment(fpu, {false, true}, reinterpret_cast<u8*>(image));
  EXPECT_EQ(image[2], 0x1abf);  // 00 01 10 10, 10 11 11 11
}

TEST_F(X87EnvironmentTest, LoadsWhatItStored) {
  push(0x3fff, 1ull << 63);
  for (const X87Format format : {X87Format{true, true}, {false, true}, {true, false}, {false, false}}) {
    u8 image[28], again[28];
    store_x87_environment(fpu, format, image);
    if (!x87_behaviour().keeps_selectors) fpu.x87_code_selector = fpu.x87_data_selector = 0;
    FpuState other = fpu;
    std::memset(other.x87, 0, 24);
    load_x87_environment(other, format, image);
    store_x87_environment(other, format, again);
    EXPECT_EQ(std::memcmp(image, again, format.size()), 0) << format.wide << format.protected_mode;
  }
}

TEST_F(X87EnvironmentTest, SavedPointersFollowTheProcessor) {
  u8 control[24];
  const auto word = [&](unsigned at) {
    u64 value;
    std::memcpy(&value, control + at, 8);
    return value;
  };
  store_x87_control(fpu, true, control);
  EXPECT_EQ(word(8), x87_behaviour().drops_pointers ? 0 : 0x56789u);
  fpu.x87[0] = 0x7e, fpu.x87[2] = 0x81;  // an unmasked exception waits
  store_x87_control(fpu, true, control);
  EXPECT_EQ(word(8), 0x56789u);
  EXPECT_EQ(word(16), 0xabcdeu);
  store_x87_control(fpu, false, control);
  EXPECT_EQ(word(8), 0x123400056789u);
}

}  // namespace
}  // namespace anykvm::x86
