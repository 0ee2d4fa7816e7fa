// Code that is written through other addresses than it runs at, by stores that translated code makes.
#include <gtest/gtest.h>

#include <algorithm>

#include "engine/patient_translator.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

class SelfModifyingTest : public testing::Test, protected x86::LongMode {
 protected:
  static constexpr Gva store = 0x5000, written = 0x8000, aliases[] = {written, 0x400000, 0x401000};

  SelfModifyingTest() {
    stop_at_exceptions();
    for (const Gva alias : aliases) map(alias, written, x86::pte::p | x86::pte::w);
    put(store, {
                   0x89, 0x11,        // mov [rcx], edx
                   0x89, 0x51, 0x40,  // mov [rcx + 64], edx
                   0xff, 0xe3,        // jmp rbx
                   0xf4,              // hlt
               });
    put(written, {0xb8, 0, 0, 0, 0, 0xf4});  // mov eax, imm32 ; hlt
  }
  void put(Gpa at, std::initializer_list<u8> bytes) { std::copy(bytes.begin(), bytes.end(), machine.base + at); }
  void run() {
    cpu.state.rip = store;
    engine->keep_code();  // else it compares all code with what it was made from
    engine->run(cpu);
    ASSERT_EQ(cpu.exit.kind, x86::ExitKind::halt);
  }

  std::unique_ptr<Engine> engine = make_patient_translator();
};

TEST_F(SelfModifyingTest, AStoreByAnyAddressIsNoticed) {
  for (u32 n = 1; n < 60; ++n) {
    // Once or twice by the same address: the TLB lets the second through.
    cpu.state.gpr[x86::rcx] = aliases[n / 4 % std::size(aliases)] + 1;
    cpu.state.gpr[x86::rdx] = n;
    for (u32 times = n % 2; times <= 1; ++times) {
      cpu.state.gpr[x86::rbx] = times ? written : store + 7;  // what it has written, or the HLT
      run();
    }
    EXPECT_EQ(cpu.state.gpr[x86::rax], n);
  }
}

}  // namespace
}  // namespace anykvm::engine
