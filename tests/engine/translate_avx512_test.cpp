// AVX-512 in translated code: the same instruction, once emitted for the host and once by the reference engine, must
// leave the same registers and memory, where all is mapped and where the operand ends on a page that is not there.
#include <Zydis/Zydis.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

constexpr Gva code = 0x5000, data_at = 0x400000;
constexpr Gpa data_gpa = 0x200000;

std::string hex(const void* bytes, std::size_t size) {
  std::string text;
  for (std::size_t n = 0; n < size; ++n) {
    char byte[3];
    std::snprintf(byte, sizeof byte, "%02x", static_cast<const u8*>(bytes)[n]);
    text += byte;
  }
  return text;
}

/// An engine with a machine to itself.
class Side : LongMode {
 public:
  explicit Side(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    static const u8 never = 0;
    cpu.immediate_exit = &never;
    cpu.state.cr4 |= cr4::osxsave | cr4::osxmmexcpt;
    cpu.state.xcr0 = supported_xcr0();
    for (unsigned vector = 0; vector < 32; ++vector) {
      gate(u8(vector), 0x6000 + vector * 16);
      machine.base[0x6000 + vector * 16] = 0xf4;
    }
    map(data_at, data_gpa, pte::p | pte::w);
    start = cpu.state;
  }

  void execute(const u8* bytes, unsigned length, u64 seed) {
    std::mt19937_64 random(seed);
    cpu.state = start;
    cpu.update_mode();
    for (auto& vector : cpu.state.fpu.vector)
      for (u8& byte : vector) byte = u8(random() % 3 ? random() : 0x3f);
    for (u64& mask : cpu.state.fpu.opmask) mask = random() % 2 ? random() : random() & random() & random();
    for (u64& gpr : cpu.state.gpr)
      gpr = data_at + (random() % 4 ? 1024 + 64 * (random() % 16) : page_size - 80 + random() % 90);
    cpu.state.gpr[rsp] = 0x7000;
    for (unsigned n = 0; n < page_size; n += 8) machine.put<u64>(data_gpa + n, random());
    std::memcpy(machine.base + code, bytes, length);
    machine.base[code + length] = 0xf4;  // hlt
    cpu.state.rip = code;
    engine->run(cpu);
  }

  /// What there is to compare, and what it is called.
  std::vector<std::pair<const char*, std::string>> outcome() const {
    std::vector<std::pair<const char*, std::string>> parts;
    const auto add = [&parts](const char* name, const void* bytes, unsigned size) {
      parts.emplace_back(name, std::string(static_cast<const char*>(bytes), size));
    };
    const CpuState& s = cpu.state;
    add("exit", &cpu.exit.kind, sizeof cpu.exit.kind);
    add("rip", &s.rip, sizeof s.rip);
    const u64 flags = s.rflags();
    add("flags", &flags, sizeof flags);
    add("gpr", s.gpr, sizeof s.gpr);
    for (const auto& vector : s.fpu.vector) add("vector", vector, sizeof vector);
    add("masks", s.fpu.opmask, sizeof s.fpu.opmask);
    add("mxcsr", &s.fpu.mxcsr, sizeof s.fpu.mxcsr);
    add("memory", machine.base + data_gpa, page_size);
    return parts;
  }

  void set_xcr0(u64 value) { start.xcr0 = value; }
  u64 rip() const { return cpu.state.rip; }

  std::unique_ptr<Engine> engine;

 private:
  CpuState start;
};

class TranslateAvx512Test : public testing::Test {
 protected:
  void SetUp() override {
    if (!supports(Feature::avx512f) || !supports(Feature::avx512bw)) GTEST_SKIP() << "no AVX-512 here";
  }
  Side translator{make_translator()}, reference{make_interpreter()};
};

TEST_F(TranslateAvx512Test, DoesWhatTheReferenceDoes) {
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
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
    ZydisDecodedInstruction instruction;
    ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, bytes, sizeof bytes, &instruction, operands))) continue;
    ++tried;
    const u64 seed = random();
    translator.execute(bytes, instruction.length, seed);
    reference.execute(bytes, instruction.length, seed);
    const auto left = translator.outcome(), right = reference.outcome();
    for (unsigned n = 0; n < left.size(); ++n)
      ASSERT_TRUE(left[n] == right[n]) << ZydisMnemonicGetString(instruction.mnemonic) << ' '
                                       << hex(bytes, instruction.length) << ", try " << tried << ": " << left[n].first
                                       << '\n'
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
