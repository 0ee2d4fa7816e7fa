// 16- and 32-bit code under the translator: stretches of the reference engine, and what is translated.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <initializer_list>
#include <thread>

#include "engine/engine.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

class LegacyCodeTest : public testing::Test, protected LongMode {
 protected:
  static constexpr Gva code = 0x5000;

  /// A code segment of this size at 0; the stack and the data have 4 GiB.
  void enter_legacy(unsigned bits) {
    CpuState& s = cpu.state;
    s.segment[cs].l = false;
    s.segment[cs].db = bits == 32;
    cpu.update_mode();
    ASSERT_EQ(s.code_bits, bits);
  }
  void put(Gpa at, std::initializer_list<u8> bytes) { std::memcpy(machine.base + at, bytes.begin(), bytes.size()); }
  u64 steps() const {
    u64 all = 0;
    engine->for_each_step([](void* sum, const char*, u64 count) { *static_cast<u64*>(sum) += count; }, &all);
    return all;
  }

  std::unique_ptr<Engine> engine = make_translator();
};

TEST_F(LegacyCodeTest, CountsWhatTheReferenceEngineExecutesInStretches) {
  enter_legacy(16);
  put(code, {0x31, 0xc0,                           // xor ax, ax
             0xb9, 0xe8, 0x03,                     // mov cx, 1000
             0x01, 0xc8,                           // add ax, cx
             0x49,                                 // dec cx
             0x75, 0xfb,                           // jnz -5
             0xea, 0x00, 0x51, kernel_cs, 0x00});  // jmp 8:0x5100
  put(code + 0x100, {0x48, 0xff, 0xc3,             // inc rbx
                     0x48, 0xff, 0xc3, 0xf4});     // hlt
  cpu.state.gpr[rbx] = 0;
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt);
  EXPECT_EQ(cpu.state.code_bits, 64);
  EXPECT_EQ(cpu.state.gpr[rax] & 0xffff, 1000 * 1001 / 2 % 65536);
  EXPECT_EQ(cpu.state.gpr[rbx], 2u);
  EXPECT_EQ(steps(), 2u + 3000 + 1 + 1);  // and the HLT, which belongs to a block
}

TEST_F(LegacyCodeTest, AttentionEndsAnEndlessLoop) {
  enter_legacy(16);
  put(code, {0xeb, 0xfe});  // jmp $
  std::jthread kick([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    cpu.attention.store(1);
  });
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::attention);
  EXPECT_EQ(cpu.state.rip, code);
  EXPECT_GT(steps(), 64u);
}

}  // namespace
}  // namespace anykvm::engine
