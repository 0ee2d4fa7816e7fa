// Instructions that lie in two pages, in translated code: what they do, and what becomes of them when the second page
// is another one, may not be executed any more, or is written to. And instructions whose registers the translator has
// to move about: AH-DH beside memory, R13-R15.
#include <Zydis/Zydis.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "engine/engine.h"
#include "engine/native/decoded.h"
#include "engine/patient_translator.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

constexpr Gva first_page = 0x400000, second_page = 0x401000, data_at = 0x500000;
constexpr Gpa first_gpa = 0x200000, second_gpa = 0x201000, other_gpa = 0x210000, data_gpa = 0x220000;

class Guest : public LongMode {
 public:
  explicit Guest(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    cpu.cpuid.set(supported_cpuid());
    stop_at_exceptions();
    map(first_page, first_gpa, pte::p | pte::w);
    map(second_page, second_gpa, pte::p | pte::w);
    for (Gva page = 0; page < 4 * page_size; page += page_size) map(data_at + page, data_gpa + page, pte::p | pte::w);
    start = cpu.state;
  }
  /// The code's byte `at` is the second page's first.
  void put(const std::vector<u8>& bytes, unsigned at, Gpa second = second_gpa) {
    std::memcpy(machine.base + first_gpa + page_size - at, bytes.data(), at);
    std::memcpy(machine.base + second, bytes.data() + at, bytes.size() - at);
  }
  void run(unsigned at, u64 seed) {
    std::mt19937_64 random(seed);
    cpu.state = start;
    cpu.update_mode();
    for (u64& gpr : cpu.state.gpr) gpr = random();
    cpu.state.gpr[rbx] = data_at + 2 * page_size - 64;
    cpu.state.gpr[rbp] = data_at + 512 + random() % 64;
    cpu.state.gpr[r12] = data_at + 1024;
    cpu.state.gpr[rsp] = 0x7000;
    cpu.state.gpr[r10] = 5;
    for (unsigned n = 0; n < 4 * page_size; n += 8) machine.put<u64>(data_gpa + n, random());
    cpu.state.rip = second_page - at;
    engine->run(cpu);
  }
  u64 undecoded_steps() const {
    u64 sum = 0;
    engine->for_each_step([](void* arg, const char* name, u64 count) { *static_cast<u64*>(arg) += *name ? 0 : count; },
                          &sum);
    return sum;
  }

  std::unique_ptr<Engine> engine;
  CpuState start;
};

class TranslateCrossingTest : public testing::Test {
 protected:
  template <class Body>
  void both(Body body) {
    body(translator);
    body(reference);
  }
  void compare() {
    const CpuState &left = translator.cpu.state, &right = reference.cpu.state;
    EXPECT_EQ(left.rip, right.rip);
    EXPECT_EQ(left.rflags(), right.rflags());
    EXPECT_EQ(left.cr2, right.cr2);
    for (unsigned n = 0; n < 16; ++n) EXPECT_EQ(left.gpr[n], right.gpr[n]) << n;
    EXPECT_EQ(std::memcmp(translator.machine.base + data_gpa, reference.machine.base + data_gpa, 4 * page_size), 0);
  }

  Guest translator{make_patient_translator(true)}, reference{make_interpreter()};
};

/// An instruction that computes, with its operand in memory at RBX, RBP or R12, none of which it changes.
void append_instruction(std::vector<u8>& code, std::mt19937_64& random) {
  for (;;) {
    u8 bytes[15];
    for (u8& byte : bytes) byte = u8(random());
    unsigned at = 0;
    if (random() % 2) bytes[at++] = u8(0x40 | random() % 16);
    switch (random() % 4) {
      case 0: bytes[at++] = 0x0f; break;
      case 1: {  // BMI: MULX, PDEP, SHLX and their kind
        const u8 vex[] = {0xc4, u8((random() & 0xc0) | 0x22), u8(random() & 0xfb), u8(0xf0 + random() % 8)};
        std::memcpy(bytes + (at = 0), vex, sizeof vex);
        at = 3;
        break;
      }
      default: bytes[at] = u8(random() % 2 ? random() & 0x3b : 0x80 + random() % 0x10); break;
    }
    Decoded decoded;
    if (!ZYAN_SUCCESS(decode_instruction(bytes, sizeof bytes, 64, decoded))) continue;
    const ZydisDecodedInstruction& d = decoded.instruction;
    switch (d.meta.category) {
      case ZYDIS_CATEGORY_BINARY:
      case ZYDIS_CATEGORY_LOGICAL:
      case ZYDIS_CATEGORY_DATAXFER:
      case ZYDIS_CATEGORY_BMI1:
      case ZYDIS_CATEGORY_BMI2:
      case ZYDIS_CATEGORY_SETCC:
      case ZYDIS_CATEGORY_CMOV:
      case ZYDIS_CATEGORY_BITBYTE:
      case ZYDIS_CATEGORY_SEMAPHORE: break;
      default: continue;
    }
    bool good = d.meta.isa_ext != ZYDIS_ISA_EXT_MMX;
    for (unsigned n = 0; n < d.operand_count; ++n) {
      const auto whole = [](ZydisRegister reg) {
        return ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
      };
      const auto kept = [](ZydisRegister reg) {
        return reg == ZYDIS_REGISTER_RBX || reg == ZYDIS_REGISTER_RBP || reg == ZYDIS_REGISTER_R12;
      };
      const ZydisDecodedOperand& operand = decoded.operands[n];
      if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY)
        good = good && operand.mem.index == ZYDIS_REGISTER_NONE && kept(operand.mem.base) && d.address_width == 64 &&
               d.raw.disp.size <= 8 && operand.mem.segment != ZYDIS_REGISTER_FS &&
               operand.mem.segment != ZYDIS_REGISTER_GS;
      if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
      const ZydisRegister reg = whole(operand.reg.value);
      good = good && (ZydisRegisterGetClass(reg) == ZYDIS_REGCLASS_GPR64 || reg == ZYDIS_REGISTER_RFLAGS);
      if (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
        good = good && !kept(reg) && reg != ZYDIS_REGISTER_RSP && reg != ZYDIS_REGISTER_R10;
    }
    if (!good) continue;
    code.insert(code.end(), bytes, bytes + d.length);
    return;
  }
}

/// Five turns of the instructions.
std::vector<u8> loop_of(const std::vector<u8>& body) {
  std::vector<u8> code = body;
  const int back = -int(body.size() + 9);
  code.insert(code.end(), {0x41, 0xff, 0xca, 0x0f, 0x85});  // dec r10d ; jnz
  for (unsigned n = 0; n < 4; ++n) code.push_back(u8(back >> 8 * n));
  code.push_back(0xf4);
  return code;
}

TEST_F(TranslateCrossingTest, DoesWhatTheReferenceDoes) {
  std::mt19937_64 random(5);
  for (unsigned n = 0; n < 3000; ++n) {
    std::vector<u8> body;
    for (unsigned count = 1 + unsigned(random() % 4); count; --count) append_instruction(body, random);
    const std::vector<u8> code = loop_of(body);
    const unsigned at = 1 + unsigned(random() % (code.size() - 1));
    const u64 seed = random();
    both([&](Guest& guest) {
      guest.put(code, at);
      guest.run(at, seed);
    });
    compare();
    if (HasFailure()) {
      std::string text;
      for (const u8 byte : code) text += " " + std::to_string(byte);
      FAIL() << "try " << n << ", " << at << " of" << text;
    }
  }
}

TEST_F(TranslateCrossingTest, IsTranslated) {
  // add eax, imm32 in two pages ; a jump in two pages is the loop's own
  const std::vector<u8> code = loop_of({0x05, 0x78, 0x56, 0x34, 0x12, 0x90});
  for (const unsigned at : {2u, 11u, 12u}) {
    both([&](Guest& guest) { guest.put(code, at); });
    for (unsigned n = 0; n < 20; ++n) both([&](Guest& guest) { guest.run(at, n); });
    compare();
    const u64 before = translator.undecoded_steps();
    translator.run(at, 1);
    translator.run(at, 1);
    EXPECT_LE(translator.undecoded_steps() - before, 4u) << at;  // of ten turns: one for each flush of the jump cache
  }
}

TEST_F(TranslateCrossingTest, FollowsTheSecondPage) {
  const std::vector<u8> code = loop_of({0xb8, 0x11, 0x22, 0x33, 0x44});  // mov eax, 0x44332211
  const std::vector<u8> other = loop_of({0xb8, 0x11, 0x22, 0x77, 0x66});
  const auto run = [&] {
    both([](Guest& guest) { guest.run(3, 1); });
    compare();
    return translator.cpu.state.gpr[rax];
  };
  const auto map_second = [this](Gpa gpa, u64 bits) {
    both([=](Guest& guest) {
      guest.map(second_page, gpa, pte::p | pte::w | bits);
      guest.cpu.mmu.flush_all();
    });
  };
  both([&](Guest& guest) { guest.put(other, 3, other_gpa), guest.put(code, 3); });
  for (unsigned turn = 0; turn < 20; ++turn) {
    EXPECT_EQ(run(), 0x44332211u);
    map_second(other_gpa, 0);
    EXPECT_EQ(run(), 0x66772211u);
    map_second(second_gpa, 0);
  }
  EXPECT_EQ(run(), 0x44332211u);
  map_second(second_gpa, pte::nx);
  run();
  EXPECT_EQ(translator.cpu.state.rip, 0x6000u + exception::pf * 16 + 1);
  EXPECT_EQ(translator.cpu.state.cr2, second_page);
  map_second(second_gpa, 0);
  EXPECT_EQ(run(), 0x44332211u);
  // The guest changes the instruction's end before its third turn: mov [second_page], r10b in front.
  const std::vector<u8> changing = loop_of({0x44, 0x88, 0x14, 0x25, 0x00, 0x10, 0x40, 0, 0xb8, 0x11, 0x22, 0x33, 0x44});
  both([&](Guest& guest) {
    guest.put(changing, 11);
    guest.run(11, 1);
    guest.run(11, 1);
  });
  compare();
  EXPECT_EQ(translator.cpu.state.gpr[rax], 0x44012211u);
}

}  // namespace
}  // namespace anykvm::engine
