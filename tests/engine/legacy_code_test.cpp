// 16- and 32-bit code under the translator: stretches of the reference engine, and what is translated.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <utility>

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

/// 32-bit code on flat segments, in an engine with a machine to itself.
class Flat : LongMode {
 public:
  static constexpr Gva code = 0x5000, data_at = 0xd000;

  explicit Flat(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    stop_at_exceptions();
    map(top, 0x20000, pte::p | pte::w);
    CpuState& s = cpu.state;
    s.segment[cs].l = false;
    s.segment[cs].db = true;
    cpu.update_mode();
    for (unsigned n = 0; n < page_size; n += 4) machine.put<u32>(data_at + n, n * 0x9e3779b9);
  }
  static constexpr Gva top = 0xfffff000;  ///< the last page of 4 GiB
  CpuState& state() { return cpu.state; }
  void set_mode() { cpu.update_mode(); }
  void put(Gva at, std::initializer_list<u8> bytes) {
    std::memcpy(machine.base + (at >= top ? at - top + 0x20000 : at), bytes.begin(), bytes.size());
  }
  void put_halt(Gva at) { put(at, {0xf4}); }
  void run() {
    engine->run(cpu);
    EXPECT_EQ(cpu.exit.kind, ExitKind::halt);
  }
  u64 steps() const {
    u64 all = 0;
    engine->for_each_step([](void* sum, const char*, u64 count) { *static_cast<u64*>(sum) += count; }, &all);
    return all;
  }
  /// Below 64 KiB, and the last page.
  std::string memory() const {
    const auto at = [this](Gpa gpa) { return reinterpret_cast<const char*>(machine.base + gpa); };
    return std::string(at(0), 0x10000) + std::string(at(0x20000), page_size);
  }

 private:
  std::unique_ptr<Engine> engine;
};

class FlatCodeTest : public testing::Test {
 protected:
  template <class Body>
  void both(Body body) {
    body(translator);
    body(reference);
  }
  void put(Gva at, std::initializer_list<u8> bytes) {
    both([&](Flat& flat) { flat.put(at, bytes); });
  }
  void run_and_compare() {
    both([](Flat& flat) { flat.run(); });
    const CpuState &left = translator.state(), &right = reference.state();
    EXPECT_EQ(left.rip, right.rip);
    EXPECT_EQ(left.rflags(), right.rflags());
    EXPECT_EQ(left.cr2, right.cr2);
    for (unsigned n = 0; n < 16; ++n) EXPECT_EQ(left.gpr[n], right.gpr[n]) << "register " << n;
    EXPECT_TRUE(translator.memory() == reference.memory());
  }

  Flat translator{make_translator()}, reference{make_interpreter()};
};

TEST_F(FlatCodeTest, IsTranslated) {
  put(Flat::code, {0xb9, 0xe8, 0x03, 0x00, 0x00,        // mov ecx, 1000
                   0xa1, 0x10, 0xd0, 0x00, 0x00,        // mov eax, [0xd010]
                   0x40, 0x66, 0x43,                    // inc eax; inc bx
                   0x50, 0x6a, 0xfe, 0x5a,              // push eax; push -2; pop edx
                   0xe8, 0x0e, 0x00, 0x00, 0x00,        // call
                   0x5e,                                // pop esi
                   0x8d, 0x7c, 0x8e, 0x04,              // lea edi, [esi + ecx * 4 + 4]
                   0xa3, 0x14, 0xd0, 0x00, 0x00,        // mov [0xd014], eax
                   0x49, 0x75, 0xe2,                    // dec ecx; jnz
                   0xf4,                                // hlt
                   0x55, 0x89, 0xe5, 0x01, 0x45, 0x08,  // push ebp; mov ebp, esp; add [ebp + 8], eax
                   0xc9, 0xc3});                        // leave; ret
  run_and_compare();
  EXPECT_EQ(translator.state().gpr[rcx], 0u);
  EXPECT_LT(translator.steps(), 8u);  // HLT, and where the TLB has not seen a page yet
}

TEST_F(FlatCodeTest, WrapsAddressesAt4GiB) {
  put(Flat::code, {0xbb, 0xf8, 0xff, 0xff, 0xff,        // mov ebx, -8
                   0x8b, 0x83, 0x18, 0xd0, 0x00, 0x00,  // mov eax, [ebx + 0xd018]
                   0x8b, 0x4c, 0x1b, 0x20,              // mov ecx, [ebx + ebx + 0x20]
                   0xbc, 0xfc, 0xff, 0xff, 0xff, 0x5d,  // mov esp, -4; pop ebp
                   0xe9, 0xd6, 0xaf, 0xff, 0xff});      // jmp 0xfffffff0
  put(0, {0xba, 0x78, 0x56, 0x34, 0x12, 0x50, 0xf4});   // mov edx, 0x12345678; push eax; hlt
  for (unsigned pass = 0; pass < 4; ++pass) {
    put(Flat::top + 0xff0, {0x90, 0x41, 0x90, 0x41, 0x90, 0x41, 0x90, 0x41, 0x90, 0x41, 0x90, 0x41, 0x90, 0x41, 0x90,
                            0x41});  // nop; inc ecx; ...
    both([](Flat& flat) { flat.state().rip = Flat::code; });
    run_and_compare();
    EXPECT_EQ(translator.state().gpr[rax], 0x10 * 0x9e3779b9u);
    EXPECT_EQ(translator.state().gpr[rdx], 0x12345678u);
    EXPECT_EQ(translator.state().gpr[rsp], 0xfffffffcu);
    EXPECT_EQ(translator.state().rip, 7u);
  }
}

TEST_F(FlatCodeTest, HeedsTheLimitsOfSegmentsThatAreNotFlat) {
  put(Flat::code, {0x64, 0xa1, 0x04, 0xd0, 0x00, 0x00,                // mov eax, fs:[0xd004]
                   0x65, 0x8b, 0x1d, 0xfc, 0xff, 0xff, 0xff, 0xf4});  // mov ebx, gs:[-4]
  both([](Flat& flat) {
    flat.state().segment[gs].base = Flat::data_at + 0x20;
    flat.state().segment[fs].limit = 0xd007;
  });
  run_and_compare();
  EXPECT_EQ(translator.state().gpr[rax], 4 * 0x9e3779b9u);
  EXPECT_EQ(translator.state().gpr[rbx], 0x1c * 0x9e3779b9u);
  for (const SegmentName name : {fs, gs, ds, cs}) {
    both([&](Flat& flat) {
      flat.state().rip = Flat::code;
      flat.state().gpr[rsp] = 0x7000;
      flat.state().segment[fs].limit = name == fs ? 0xd006 : ~0u;
      if (name == gs) flat.state().segment[gs] = {.unusable = true};
      if (name == ds) flat.state().segment[ds].base = 0x10;  // nobody is asked for it
      if (name == cs) flat.state().segment[cs].limit = Flat::code + 4;
    });
    run_and_compare();
  }
}

TEST_F(FlatCodeTest, LeavesWhatIsAboveTheRegistersToTheReferenceEngine) {
  put(Flat::code, {0x8b, 0x03, 0x89, 0xdb, 0x43, 0xf4});  // mov eax, [ebx]; mov ebx, ebx; inc ebx
  both([](Flat& flat) { flat.state().gpr[rbx] = 0x700000000 + Flat::data_at; });
  run_and_compare();
}

// Accesses that are checked together are added up in 64 bits: not where one of them would wrap.
TEST_F(FlatCodeTest, WrapsAccessesThatLieTogether) {
  put(Flat::code, {0x50, 0x53, 0x59, 0x5a, 0x50, 0x50,  // push eax; push ebx; pop ecx; pop edx; push eax; push eax
                   0x83, 0xc4, 0x0c,                    // add esp, 12
                   0x8b, 0x44, 0x24, 0xf0,              // mov eax, [esp - 16]
                   0x83, 0xc3, 0x64,                    // add ebx, 100
                   0x8b, 0x4b, 0x9c, 0x89, 0x4b, 0xa0,  // mov ecx, [ebx - 100]; mov [ebx - 96], ecx
                   0x31, 0xf6, 0xf4});                  // xor esi, esi; hlt
  for (const u32 stack : {0x7000u, 0x10u, 8u, 4u, 0u, 0xfffffffcu, 0xfffff800u, 0xfffff010u})
    for (const u32 base : {0xd000u, 0x20u, 0xfffffff0u, 0xffffff9cu, 0xfffff100u})
      for (unsigned pass = 0; pass < 3; ++pass) {
        both([&](Flat& flat) {
          flat.state().rip = Flat::code;
          flat.state().gpr[rsp] = stack;
          flat.state().gpr[rbx] = base;
        });
        run_and_compare();
      }
}

// One page runs as 64-bit code, as 32-bit code, and again.
TEST_F(FlatCodeTest, TellsWidthsApart) {
  put(Flat::code, {0x48, 0xff, 0xc0, 0xf4});  // inc rax, or dec eax; inc eax
  for (unsigned pass = 0; pass < 4; ++pass) {
    both([&](Flat& flat) {
      flat.state().rip = Flat::code;
      flat.state().segment[cs].l = pass % 2;
      flat.state().segment[cs].db = !(pass % 2);
      flat.set_mode();
      flat.state().gpr[rax] = 0xffffffff;
    });
    run_and_compare();
    EXPECT_EQ(translator.state().gpr[rax], pass % 2 ? 0x100000000u : 0xffffffffu);
  }
}

}  // namespace
}  // namespace anykvm::engine
