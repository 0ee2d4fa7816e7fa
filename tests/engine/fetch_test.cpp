// Where instructions may lie: the end of a code segment.
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "x86/fake_machine.h"

namespace anykvm::engine {
namespace {

using namespace x86;

/// Runs `code` in real mode from CS:IP on to the handler of #GP, a HLT at 0x500; AX then.
u16 run_to_general_protection(u32 ip, std::initializer_list<u8> code) {
  FakeMachine machine;
  Cpu cpu(machine);
  cpu.reset();
  cpu.state.segment[cs].selector = 0;
  cpu.state.segment[cs].base = 0;
  cpu.state.rip = ip;
  cpu.state.gpr[rsp] = 0x8000;
  cpu.update_mode();
  for (u8 byte : code) machine.put<u8>(ip++, byte);
  machine.put<u32>(exception::gp * 4, 0x500);
  machine.put<u8>(0x500, 0xf4);
  const auto engine = make_interpreter();
  engine->run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt);
  EXPECT_EQ(cpu.state.rip, 0x501u);
  return u16(cpu.state.gpr[rax]);
}

TEST(Fetch, AnInstructionThatReachesBehindTheLimitDoesNotRun) {
  EXPECT_EQ(run_to_general_protection(0xfffd, {0xb8, 0x34, 0x12}), 0x1234) << "its last byte is the segment's";
  EXPECT_EQ(run_to_general_protection(0xfffe, {0xb8, 0x34, 0x12}), 0);
  EXPECT_EQ(run_to_general_protection(0xffff, {0xb8, 0x34, 0x12}), 0);
}

}  // namespace
}  // namespace anykvm::engine
