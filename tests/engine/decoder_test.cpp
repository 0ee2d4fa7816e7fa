// What the translator's decoder remembers has to be what Zydis says of each instruction.
#include "engine/translate/decoder.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "engine/patient_translator.h"
#include "engine/side.h"

namespace anykvm::engine::translate {
namespace {

/// As Decoder::decode(), by Zydis alone.
bool decode_afresh(const u8* bytes, CodeKind code, GuestInstruction& out) {
  Decoded d;
  if (!ZYAN_SUCCESS(decode_instruction(bytes, 15, code.bits(), d))) return false;
  analyse(d, bytes, code, out);
  settle(out);
  return true;
}

class DecoderTest : public testing::Test {
 protected:
  /// false: undefined.
  bool expect_the_same(const u8 (&bytes)[15], CodeKind code) {
    GuestInstruction found{}, wanted{};
    const bool defined = decode_afresh(bytes, code, wanted);
    const bool decoded = decoder.decode(bytes, sizeof bytes, code, found);
    EXPECT_EQ(decoded, defined) << hex(bytes, sizeof bytes);
    if (decoded && found.is_substituted) {
      EXPECT_EQ(found.length, wanted.length) << hex(bytes, wanted.length);
      EXPECT_EQ(found.mnemonic, wanted.mnemonic) << hex(bytes, wanted.length);
    } else if (decoded && defined) {
      const auto name = ZydisMnemonicGetString(ZydisMnemonic(wanted.mnemonic));
      EXPECT_TRUE(found == wanted) << name << ' ' << hex(bytes, wanted.length);
    }
    return defined;
  }
  Decoder decoder;
  std::mt19937 random{11};
};

// Each opcode with prefixes, and then all ModRMs one after another, so that most are made of what was remembered.
TEST_F(DecoderTest, SaysOfEveryFormWhatZydisSays) {
  static constexpr u8 prefixes[] = {0x66, 0xf2, 0xf3, 0xf0, 0x64, 0x65, 0x67, 0x2e};
  unsigned defined = 0;
  for (unsigned opcode = 0; opcode < 512; ++opcode) {
    for (unsigned round = 0; round < 8; ++round) {
      u8 bytes[15] = {};
      unsigned first = 0;
      while (random() % 2 && first < 4) bytes[first++] = prefixes[random() % (random() % 8 ? 6 : 8)];
      const u8 rex = random() % 2 ? u8(0x40 | (random() % 2 << 3)) : 0;
      const CodeKind code{.supervisor = random() % 2 != 0, .narrow = random() % 3 == 0};
      for (unsigned modrm = 0; modrm < 256 && !HasFailure(); ++modrm) {
        unsigned at = first;
        if (rex) bytes[at++] = u8(rex | random() % 8);
        if (opcode >= 256) bytes[at++] = 0x0f;
        bytes[at++] = u8(opcode);
        bytes[at++] = u8(modrm);
        for (unsigned n = at; n < sizeof bytes; ++n) bytes[n] = u8(random());
        if (random() % 4 == 0) bytes[at] = u8((bytes[at] & 0xc0) | (random() % 2 ? 0x24 : 0x25));  // SIB without index
        if (random() % 4 == 0) bytes[at + random() % 5] = 0;                                       // a shift by nothing
        defined += expect_the_same(bytes, code);
      }
    }
  }
  EXPECT_GT(defined, 250'000u);
}

TEST_F(DecoderTest, SaysOfRandomBytesWhatZydisSays) {
  for (unsigned n = 0; n < 300'000 && !HasFailure(); ++n) {
    u8 bytes[15];
    for (u8& byte : bytes) byte = u8(random());
    expect_the_same(bytes, {.supervisor = random() % 2 != 0, .narrow = random() % 3 == 0});
  }
}

TEST_F(DecoderTest, LooksAtNothingBehindWhatIsThere) {
  void* const map = mmap(nullptr, 2 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(map, MAP_FAILED);
  u8* const end = static_cast<u8*>(map) + page_size;
  ASSERT_EQ(mprotect(end, page_size, PROT_NONE), 0);
  static constexpr u8 prefixes[] = {0x66, 0xf2, 0xf0, 0x64};
  GuestInstruction g;
  for (unsigned n = 0; n < 100'000; ++n) {
    u8* const bytes = end - random() % 16;
    for (u8* byte = bytes; byte < end; ++byte) *byte = u8(random());
    for (unsigned at = 0, many = random() % 5; at < many && bytes + at < end; ++at) bytes[at] = prefixes[at];
    const bool decoded =
        decoder.decode(bytes, unsigned(end - bytes), {.supervisor = false, .narrow = random() % 2 != 0}, g);
    EXPECT_TRUE(!decoded || g.length <= end - bytes);
  }
  static constexpr u8 move[] = {0x48, 0x8b, 0x84, 0x88, 0x78, 0x56, 0x34, 0x12};  // mov rax, [rax + rcx * 4 + ...]
  for (unsigned available = 0; available <= sizeof move; ++available) {
    std::copy_n(move, available, end - available);
    EXPECT_EQ(decoder.decode(end - available, available, {}, g), available == sizeof move);
  }
  // xacquire lock add qword fs:[rax], imm32 is remembered; with [rsp + disp32] it would have 16 bytes.
  static constexpr u8 add[15] = {0x66, 0xf2, 0xf0, 0x64, 0x48, 0x81, 0x00},
                      too_long[15] = {0x66, 0xf2, 0xf0, 0x64, 0x48, 0x81, 0x84, 0x24};
  std::ranges::copy(add, end - sizeof add);
  EXPECT_TRUE(decoder.decode(end - sizeof add, sizeof add, {}, g));
  std::ranges::copy(too_long, end - sizeof too_long);
  EXPECT_FALSE(decoder.decode(end - sizeof too_long, sizeof too_long, {}, g));
  munmap(map, 2 * page_size);
}

}  // namespace
}  // namespace anykvm::engine::translate
