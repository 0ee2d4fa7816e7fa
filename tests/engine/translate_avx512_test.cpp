// AVX-512 in translated code: the same instruction, once emitted for the host and once by the reference engine, must
// leave the same registers and memory, where all is mapped and where the operand ends on a page that is not there.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <random>

#include "engine/native/decoded.h"
#include "engine/patient_translator.h"
#include "engine/side.h"

namespace anykvm::engine {
namespace {

class TranslateAvx512Test : public testing::Test {
 protected:
  void SetUp() override {
    if (!supports(Feature::avx512f) || !supports(Feature::avx512bw)) GTEST_SKIP() << "no AVX-512 here";
  }
  Side translator{make_patient_translator(true)}, reference{make_interpreter()};
};

TEST_F(TranslateAvx512Test, DoesWhatTheReferenceDoes) {
  std::mt19937_64 random(7);
  for (unsigned tried = 0; tried < 3000;) {
    u8 bytes[15];
    for (u8& byte : bytes) byte = u8(random());
    if (random() % 8) {
      bytes[0] = 0x62;
      bytes[1] = u8((bytes[1] & 0xf0) | (1 + random() % 3));
      bytes[2] |= 4;
      if (random() % 2) bytes[6] = 0x24;  // a SIB without an index that is of no use
      if (random() % 4 == 0) {  // of those with general registers: conversions, extractions, insertions, broadcasts
        static constexpr u8 opcodes[] = {0x2a, 0x2c, 0x2d, 0x78, 0x79, 0x7a, 0x7b, 0x7c,
                                         0x6e, 0x7e, 0x14, 0x16, 0x20, 0x22, 0xc4, 0xc5};
        bytes[4] = opcodes[random() % std::size(opcodes)];
        bytes[5] |= 0xc0;
        bytes[2] |= 0x78;  // vvvv is not used by most
        bytes[3] = u8((bytes[3] & 0x68) | 8);
      }
    } else {  // an opmask instruction
      const u8 choice[] = {0xc5, u8(0x78 | (random() & 0x83)), u8(0x41 + random() % 11)};
      std::memcpy(bytes, choice, sizeof choice);
      if (random() % 2) bytes[2] = u8(0x90 + random() % 4);
    }
    Decoded d;
    if (!ZYAN_SUCCESS(decode_instruction(bytes, sizeof bytes, 64, d))) continue;
    const unsigned length = d.instruction.length;
    ++tried;
    const u64 seed = random();
    translator.execute(bytes, length, seed);
    reference.execute(bytes, length, seed);
    const auto left = translator.outcome(), right = reference.outcome();
    for (unsigned n = 0; n < left.size(); ++n)
      ASSERT_TRUE(left[n] == right[n]) << ZydisMnemonicGetString(d.mnemonic()) << ' ' << hex(bytes, length) << ", try "
                                       << tried << ": " << left[n].first << '\n'
                                       << hex(left[n].second.data(), std::min<std::size_t>(left[n].second.size(), 64))
                                       << '\n'
                                       << hex(right[n].second.data(),
                                              std::min<std::size_t>(right[n].second.size(), 64));
  }
}

// The code was made while XCR0 let it run.
TEST_F(TranslateAvx512Test, EndsWithItsComponents) {
  static constexpr u8 vpaddb[] = {0x62, 0xf1, 0x75, 0x48, 0xfc, 0xc2};  // vpaddb zmm0, zmm1, zmm2
  translator.execute(vpaddb, sizeof vpaddb, 1);
  EXPECT_EQ(translator.rip(), code + sizeof vpaddb + 1);
  translator.set_xcr0(xfeature::x87 | xfeature::sse | xfeature::avx);
  translator.execute(vpaddb, sizeof vpaddb, 1);
  EXPECT_EQ(translator.rip(), 0x6000u + exception::ud * 16 + 1);
  translator.set_xcr0(supported_xcr0());
  translator.execute(vpaddb, sizeof vpaddb, 1);
  EXPECT_EQ(translator.rip(), code + sizeof vpaddb + 1);
}

}  // namespace
}  // namespace anykvm::engine
