// Repeated string instructions in the reference engine: how much one step does, and what it leaves when it is
// interrupted.
#include <gtest/gtest.h>

#include <cstring>

#include "engine/engine.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

class StringTest : public testing::Test, protected LongMode {
 protected:
  static constexpr Gva data = 0x400000, code = 0x5000;
  static constexpr Gpa data_gpa = 0x200000;
  static constexpr u64 count = page_size + 100;

  StringTest() {
    for (unsigned page = 0; page < 2; ++page)
      map(data + page * page_size, data_gpa + page * page_size, pte::p | pte::w);
    stop_at_exceptions();
    static constexpr u8 rep_stosb[] = {0xf3, 0xaa};
    std::memcpy(machine.base + code, rep_stosb, sizeof rep_stosb);
    cpu.state.rip = code;
    cpu.state.gpr[rdi] = data;
    cpu.state.gpr[rcx] = count;
    cpu.state.gpr[rax] = 7;
  }
  u64 left() { return cpu.state.gpr[rcx]; }

  std::unique_ptr<Engine> engine = make_interpreter();
};

// IRET from a page fault sets RF: what is left then is a whole page as a rule.
TEST_F(StringTest, ResumeFlagDoesNotSlowARepeatDown) {
  cpu.state.other_flags |= flag::rf;
  engine->step(cpu);
  EXPECT_EQ(left(), 0u);
  EXPECT_EQ(cpu.state.rip, code + 2);
  EXPECT_EQ(machine.base[data_gpa + count - 1], 7);
  EXPECT_FALSE(cpu.state.other_flags & flag::rf);
}

TEST_F(StringTest, ResumeFlagStaysWhileARepeatIsInterrupted) {
  cpu.state.other_flags |= flag::rf;
  cpu.attention = 1;
  engine->step(cpu);
  EXPECT_GT(left(), 0u);
  EXPECT_LT(left(), count);
  EXPECT_EQ(cpu.state.rip, code);
  EXPECT_TRUE(cpu.state.other_flags & flag::rf);
}

TEST_F(StringTest, TrapFlagTrapsBehindEachIteration) {
  cpu.state.other_flags |= flag::tf;
  engine->step(cpu);
  EXPECT_EQ(left(), count - 1);
  EXPECT_EQ(cpu.state.rip, 0x6000u + exception::db * 16);
}

}  // namespace
}  // namespace anykvm::engine
