// The x87 unit and MMX in translated code: a few instructions, once on the host's unit as it goes and once by the
// reference engine one at a time, must leave the same, be it that an exception waits, that the operand ends on a page
// that is not there, or that the guest may not use the unit.
#include <Zydis/Zydis.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "engine/native/decoded.h"
#include "engine/patient_translator.h"
#include "engine/side.h"

namespace anykvm::engine {
namespace {

class TranslateX87Test : public testing::Test {
 protected:
  void compare(const std::vector<u8>& bytes, u64 seed) {
    translator.execute(bytes.data(), unsigned(bytes.size()), seed);
    reference.execute(bytes.data(), unsigned(bytes.size()), seed);
    const auto left = translator.outcome(), right = reference.outcome();
    for (unsigned n = 0; n < left.size(); ++n) {
      const auto& [name, mine] = left[n];
      const std::string& theirs = right[n].second;
      ASSERT_EQ(mine, theirs) << name << " of " << hex(bytes.data(), bytes.size()) << ", seed " << seed << '\n'
                              << hex(mine.data(), std::min<std::size_t>(mine.size(), 128)) << '\n'
                              << hex(theirs.data(), std::min<std::size_t>(theirs.size(), 128));
    }
  }
  void set_cr0(u64 value) {
    translator.set_cr0(value);
    reference.set_cr0(value);
  }
  u64 steps() const {
    u64 all = 0;
    translator.engine->for_each_step([](void* sum, const char*, u64 count) { *static_cast<u64*>(sum) += count; }, &all);
    return all;
  }

  Side translator{make_patient_translator(true)}, reference{make_interpreter()};
};

/// An instruction of the x87 unit or of MMX, or one that moves the unit's state; now and then another.
void append_instruction(std::vector<u8>& code, std::mt19937_64& random) {
  for (;;) {
    u8 bytes[15];
    for (u8& byte : bytes) byte = u8(random());
    unsigned at = 0;
    if (random() % 16 == 0) bytes[at++] = random() % 2 ? 0x64 : 0x41;
    switch (random() % 8) {
      case 0:
        bytes[at] = 0x0f;
        bytes[at + 1] = u8(random() % 2 ? 0x60 + random() % 32 : 0xd0 + random() % 48);
        break;
      case 1: {  // what saves and restores, and FWAIT, and flags that are live across
        static constexpr u8 others[][3] = {{0x0f, 0xae, 0x00}, {0x0f, 0xae, 0x08}, {0x9b, 0, 0},       {0xd9, 0x2b, 0},
                                           {0xd9, 0x7b, 0x08}, {0xdf, 0xe0, 0},    {0xdb, 0xe2, 0},    {0x01, 0xd8, 0},
                                           {0x0f, 0x94, 0xc1}, {0x0f, 0x2d, 0xc1}, {0xf3, 0x0f, 0xd6}, {0x11, 0xd8, 0},
                                           {0xf2, 0x0f, 0x2d}};
        std::memcpy(bytes + at, others[random() % std::size(others)], random() % 3 ? 3 : 2);
        break;
      }
      default: bytes[at] = u8(0xd8 + random() % 8); break;
    }
    Decoded decoded;
    if (!ZYAN_SUCCESS(decode_instruction(bytes, sizeof bytes, 64, decoded))) continue;
    const ZydisDecodedInstruction& d = decoded.instruction;
    if (d.attributes & ZYDIS_ATTRIB_HAS_MODRM && d.raw.modrm.mod == 0 && d.raw.modrm.rm == 5) continue;  // the code
    if (d.mnemonic == ZYDIS_MNEMONIC_RDTSC || d.mnemonic == ZYDIS_MNEMONIC_RDRAND ||
        d.mnemonic == ZYDIS_MNEMONIC_RDSEED)
      continue;
    code.insert(code.end(), bytes, bytes + d.length);
    return;
  }
}

TEST_F(TranslateX87Test, DoesWhatTheReferenceDoes) {
  std::mt19937_64 random(11);
  for (unsigned n = 0; n < 6000; ++n) {
    std::vector<u8> bytes;
    for (unsigned count = 1 + unsigned(random() % 8); count; --count) append_instruction(bytes, random);
    compare(bytes, random());
    if (HasFatalFailure()) return;
  }
}

TEST_F(TranslateX87Test, RunsOnTheHostsUnit) {
  // fninit ; then fld1 ; fadd st0, st0 ; fstp qword [rbx] a few times
  std::vector<u8> bytes{0xdb, 0xe3};
  for (unsigned n = 0; n < 8; ++n) bytes.insert(bytes.end(), {0xd9, 0xe8, 0xd8, 0xc0, 0xdd, 0x1b});
  compare(bytes, 1);
  const u64 before = steps();
  compare(bytes, 1);
  EXPECT_LE(steps() - before, 3u);  // FNINIT, HLT, and a page that was not in the TLB
}

TEST_F(TranslateX87Test, IsRefusedWhileAnotherTaskHasTheUnit) {
  const u64 cr0 = translator.cr0();
  // fld1 ; fwait ; paddb mm1, mm2
  const std::vector<u8> x87{0xd9, 0xe8, 0x9b}, mmx{0x0f, 0xfc, 0xca}, wait{0x9b, 0xd9, 0xe8};
  for (const u64 bits : {cr0::ts, cr0::ts | cr0::mp, cr0::em, cr0::em | cr0::mp, u64(0)})
    for (const auto& bytes : {x87, mmx, wait})
      for (const u64 seed : {1, 2, 3, 4, 5, 6}) {
        set_cr0(cr0);
        compare(bytes, seed);
        set_cr0(cr0 | bits);
        compare(bytes, seed);
        if (HasFatalFailure()) return;
      }
  // fninit ; fldz ; mov rax, cr0 ; or eax, TS ; mov cr0, rax ; fld1
  set_cr0(cr0);
  compare({0xdb, 0xe3, 0xd9, 0xee, 0x0f, 0x20, 0xc0, 0x83, 0xc8, 0x08, 0x0f, 0x22, 0xc0, 0xd9, 0xe8}, 1);
  EXPECT_EQ(translator.rip(), 0x6000u + exception::nm * 16 + 1);
}

TEST_F(TranslateX87Test, LeavesTheCallersUnitAsItWas) {
  const u16 mine = 0x027f;  // 53 bits
  const long double third = 1.0L / 3;
  long double sum = 0;
  __asm__ volatile("fldcw %0" ::"m"(mine));
  u16 behind = 0, status = 0;
  // fninit ; fldcw [rbx] with everything unmasked ; fldz ; fld1 ; fdiv st0, st1: an exception waits
  for (u64 seed = 0; seed < 16; ++seed) {
    translator.execute(
        std::vector<u8>{0xdb, 0xe3, 0x66, 0xc7, 0x03, 0x00, 0x03, 0xd9, 0x2b, 0xd9, 0xee, 0xd9, 0xe8, 0xd8, 0xf1}
            .data(),
        15, seed);
    __asm__ volatile("fnstcw %0 ; fnstsw %1" : "=m"(behind), "=m"(status));
    EXPECT_EQ(behind, mine);
    EXPECT_EQ(status & 0xbf, 0);
    sum += third;
  }
  __asm__ volatile("fninit");
  EXPECT_GT(sum, 5.3L);
}

}  // namespace
}  // namespace anykvm::engine
