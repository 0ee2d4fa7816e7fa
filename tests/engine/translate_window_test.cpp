// Accesses that translated code checks together: random code around a few registers that point near the boundary of two
// pages must do on the translator what it does on the reference engine, whatever one of the pages allows.
#include <gtest/gtest.h>

#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/patient_translator.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

constexpr Gva code = 0x5000, handlers = LongMode::handlers, data_at = 0x400000;
constexpr Gpa data_gpa = 0x200000;
constexpr unsigned pages = 2, rounds = 4;

/// Code that goes `rounds` times over the same random accesses.
class Program {
 public:
  explicit Program(std::mt19937_64& random) : random_(random) {
    add({0x41, 0xbc, u8(rounds), 0, 0, 0});  // mov r12d, rounds
    const std::size_t top = bytes.size();
    for (unsigned reg : bases) {
      add({u8(0x48 | reg >> 3), 0xc7, u8(0xc0 | (reg & 7))});  // mov reg, imm32
      add_dword(u32(data_at + page_size - 256 + random_() % 288));
    }
    for (unsigned n = 0; n < 12; ++n) add_one();
    add({0x49, 0xff, 0xcc, 0x0f, 0x85});  // dec r12; jnz top
    add_dword(u32(top - bytes.size() - 4));
    add({0xf4});
  }

  std::vector<u8> bytes;

 private:
  static constexpr unsigned bases[] = {3, 4, 5, 8};  // rbx, rsp, rbp, r8

  void add(std::initializer_list<u8> more) { bytes.insert(bytes.end(), more); }
  void add_dword(u32 value) {
    for (unsigned shift = 0; shift < 32; shift += 8) bytes.push_back(u8(value >> shift));
  }
  unsigned base() { return bases[random_() % std::size(bases)]; }
  /// One that holds no address: rax, rcx, rdx, rsi, r13, r15.
  unsigned value() {
    static constexpr unsigned values[] = {0, 1, 2, 6, 13, 15};
    return values[random_() % std::size(values)];
  }
  /// REX, opcode, ModRM of op reg, [base + disp8].
  void add_access(std::initializer_list<u8> opcode, unsigned reg, bool wide) {
    const unsigned at = base();
    bytes.push_back(u8(0x40 | wide << 3 | (reg >> 3) << 2 | at >> 3));
    add(opcode);
    bytes.push_back(u8(0x40 | (reg & 7) << 3 | (at & 7)));
    if (at == 4) bytes.push_back(0x24);
    bytes.push_back(u8(random_() % 96));
  }
  void add_one() {
    const unsigned reg = value(), wide = random_() % 2;
    switch (random_() % 24) {
      case 0:
      case 1:
      case 2: add_access({0x8b}, reg, wide); break;  // mov reg, [m]
      case 3:
      case 4: add_access({0x89}, reg, wide); break;        // mov [m], reg
      case 5: add_access({0x13}, reg, wide); break;        // adc reg, [m]
      case 6: add_access({0x01}, reg, wide); break;        // add [m], reg
      case 7: add_access({0x87}, reg, wide); break;        // xchg [m], reg
      case 8: add_access({0x0f, 0xb6}, reg, wide); break;  // movzx reg, byte [m]
      case 9: add_access({0xff}, 6, false); break;         // push qword [m]
      case 10:
      case 11:
        if (reg >= 8) bytes.push_back(0x41);
        bytes.push_back(u8(0x50 | (reg & 7)));  // push reg
        break;
      case 12:
        if (reg >= 8) bytes.push_back(0x41);
        bytes.push_back(u8(0x58 | (reg & 7)));  // pop reg
        break;
      case 13:
      case 20:
      case 21: {
        const unsigned at = base();
        add({u8(0x48 | at >> 3), 0x83, u8((random_() % 2 ? 0xc0 : 0xe8) | (at & 7)), u8(random_() % 40)});  // add, sub
        break;
      }
      case 14:
      case 22:
      case 23: {
        const unsigned at = base();
        add({u8(0x48 | (at >> 3) * 5), 0x8d, u8(0x40 | (at & 7) << 3 | (at & 7))});  // lea at, [at + disp8]
        if (at == 4) bytes.push_back(0x24);
        bytes.push_back(u8(random_() % 32 - 16));
        break;
      }
      case 15: add({0x48, 0x89, 0xe3}); break;                                   // mov rbx, rsp
      case 16: add({0x48, 0x39, 0xc2}); break;                                   // cmp rdx, rax
      case 17: add({u8(0x70 | random_() % 16), 0x03, 0x48, 0x01, 0xc8}); break;  // jcc over; add rax, rcx
      case 18: add({0xe8, 0, 0, 0, 0}); break;                                   // call next
      default: add({0x0f, u8(0x90 | random_() % 16), 0xc2}); break;              // setcc dl
    }
  }

  std::mt19937_64& random_;
};

/// An engine with a machine to itself. Exceptions end on a stack that nobody looks at: translated code does not keep
/// flags that are overwritten before anybody reads them.
class Side : LongMode {
 public:
  explicit Side(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    stop_at_exceptions(1);
    start = cpu.state;
  }

  /// The two pages lie the other way round in physical memory.
  void execute(const std::vector<u8>& program, u64 rights, u64 seed) {
    std::mt19937_64 random(seed);
    const unsigned restricted = random() % pages;
    cpu.state = start;
    cpu.update_mode();
    cpu.mmu.flush_all();
    for (unsigned page = 0; page < pages; ++page)
      map(data_at + page * page_size, data_gpa + (pages - 1 - page) * page_size,
          page == restricted ? rights : pte::p | pte::w);
    for (u64& gpr : cpu.state.gpr) gpr = random();
    for (unsigned n = 0; n < pages * page_size; n += 8) machine.put<u64>(data_gpa + n, random());
    std::memcpy(machine.base + code, program.data(), program.size());
    cpu.state.rip = code;
    engine->run(cpu);
  }

  /// Registers, RIP, page table entries, data, and the flags if the program came to its end.
  std::vector<std::string> outcome() {
    std::vector<std::string> parts;
    const auto add = [&parts](const void* bytes, std::size_t size) {
      parts.emplace_back(static_cast<const char*>(bytes), size);
    };
    const CpuState& s = cpu.state;
    add(s.gpr, sizeof s.gpr);
    add(&s.rip, sizeof s.rip);
    const u64 flags = s.rip >= handlers ? 0 : s.rflags();
    add(&flags, sizeof flags);
    for (unsigned page = 0; page < pages; ++page) {
      const u64 entry = entry_value(data_at + page * page_size);
      add(&entry, sizeof entry);
    }
    add(machine.base + data_gpa, pages * page_size);
    return parts;
  }
  u64 rip() const { return cpu.state.rip; }

  std::unique_ptr<Engine> engine;

 private:
  CpuState start;
};

class TranslateWindowTest : public testing::TestWithParam<u64> {};

TEST_P(TranslateWindowTest, DoesWhatTheReferenceDoes) {
  Side translator{make_patient_translator()}, reference{make_interpreter()};
  std::mt19937_64 random(11);
  static constexpr const char* names[] = {"registers", "RIP", "flags", "first page's entry", "second page's", "memory"};
  unsigned ended = 0;
  for (unsigned tried = 0; tried < 4000; ++tried) {
    const Program program(random);
    const u64 seed = random();
    translator.execute(program.bytes, GetParam(), seed);
    reference.execute(program.bytes, GetParam(), seed);
    const auto left = translator.outcome(), right = reference.outcome();
    for (unsigned n = 0; n < left.size(); ++n) {
      std::string listing;
      for (u8 byte : program.bytes) listing += "0123456789abcdef"[byte >> 4], listing += "0123456789abcdef"[byte & 15];
      ASSERT_TRUE(left[n] == right[n]) << names[n] << " differ, program " << tried << ": " << listing << std::hex
                                       << ", RIP " << translator.rip() << " and " << reference.rip();
    }
    ended += reference.rip() < handlers;
  }
  EXPECT_GT(ended, 100u) << "hardly a program came to its end";
}

INSTANTIATE_TEST_SUITE_P(OnePage, TranslateWindowTest, testing::Values(pte::p | pte::w, pte::p, u64(0)),
                         [](const auto& info) {
                           return info.param == 0 ? "Absent" : info.param & pte::w ? "Writable" : "ReadOnly";
                         });

}  // namespace
}  // namespace anykvm::engine
