// The line about an internal error.
#include "vcpu/internal_error.h"

#include <gtest/gtest.h>

#include <string>

#include "x86/fake_machine.h"

namespace anykvm::vcpu {
namespace {

std::string describe(const x86::Cpu& cpu) {
  char line[512];
  return {line, describe_internal_error(cpu, 3, line)};
}

TEST(InternalError, TheLineNamesWhereAndWhat) {
  x86::FakeMachine machine;
  x86::Cpu cpu(machine);
  cpu.update_mode();
  cpu.state.rip = 0x1234;
  cpu.state.segment[x86::cs].base = 0xf0000;
  cpu.exit.kind = x86::ExitKind::internal_error;
  cpu.exit.reason = "a far jump through MMIO";
  EXPECT_EQ(describe(cpu),
            "anykvm: internal error on vcpu-3: a far jump through MMIO; RIP 0x1234, CS base 0xf0000, real mode, CPL 0, "
            "bytes unknown\n");
  cpu.exit.bytes[0] = 0x0f;
  cpu.exit.bytes[1] = 0xa2;
  cpu.exit.byte_count = 2;
  cpu.exit.reason = nullptr;
  EXPECT_EQ(
      describe(cpu),
      "anykvm: internal error on vcpu-3: an instruction that is not emulated; RIP 0x1234, CS base 0xf0000, real mode, "
      "CPL 0, bytes 0f a2 (cpuid)\n");
}

}  // namespace
}  // namespace anykvm::vcpu
