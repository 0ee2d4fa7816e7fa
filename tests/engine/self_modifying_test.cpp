// Code that is written through other addresses than it runs at, by stores that translated code makes.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>

#include "engine/patient_translator.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using translate::SharedCode;

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

/// Pages are told apart by the low 32 bits of the host's address.
TEST_F(SelfModifyingTest, AStoreToAPageThatSharesItsStateIsNoticed) {
  constexpr u64 distance = SharedCode::address_bits + 1;
  void* const far = mmap(machine.base + distance, 16 * page_size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(far, machine.base + distance) << "something is there";
  machine.size = distance + 16 * page_size;
  constexpr Gva twin = aliases[1];
  map(twin, written + distance, x86::pte::p | x86::pte::w);
  put(written + distance, {0xb8, 0, 0, 0, 0, 0xf4});
  for (u32 n = 1; n < 60; ++n) {
    // The one is written, the other translated, then the one, and written again.
    for (const u32 value : {n, n + 100}) {
      cpu.state.gpr[x86::rcx] = twin + 1;
      cpu.state.gpr[x86::rdx] = value;
      cpu.state.gpr[x86::rbx] = value == n ? written : twin;
      run();
      cpu.state.gpr[x86::rbx] = twin;
      cpu.state.gpr[x86::rcx] = 0x9000;
      run();
      EXPECT_EQ(cpu.state.gpr[x86::rax], value);
    }
  }
  munmap(far, 16 * page_size);
}

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
