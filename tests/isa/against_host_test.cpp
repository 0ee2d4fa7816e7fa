// Random instructions, executed by the host CPU and by an engine on the same registers and memory: everything that they
// leave must be the same. ANYKVM_ISA_SEED and ANYKVM_ISA_COUNT choose a run.
#include <Zydis/Zydis.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "isa/engine_cpu.h"
#include "isa/host_cpu.h"

namespace anykvm::isa {
namespace {

constexpr u64 arithmetic = x86::flag::arithmetic;

class Generator {
 public:
  explicit Generator(u64 seed) : random_(seed) {
    ZydisDecoderInit(&decoder_, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  }

  u64 next() { return random_(); }
  bool one_in(unsigned n) { return next() % n == 0; }

  /// An instruction that this comparison can judge, in `bytes`.
  void instruction(u8 (&bytes)[15], ZydisDecodedInstruction& decoded,
                   ZydisDecodedOperand (&operands)[ZYDIS_MAX_OPERAND_COUNT]) {
    for (;;) {
      draw(bytes);
      if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder_, bytes, sizeof bytes, &decoded, operands))) continue;
      if (judgeable(decoded, operands)) return;
    }
  }

  u64 integer() {
    switch (next() % 8) {
      case 0: return 0;
      case 1: return ~0ull;
      case 2: return 1ull << next() % 64;
      case 3: return (1ull << next() % 64) - 1;
      case 4: return next() % 70;
      case 5: return -(next() % 70);
      default: return next();
    }
  }
  void vector(u8 (&out)[32]) {
    static constexpr double doubles[] = {0.0, -0.0, 1.0, -1.5, 3.0e300, 1.0e-310, 2147483648.0, 1e19, -7.25, 0.1};
    static constexpr float floats[] = {0.0f, -0.0f, 1.0f, -1.5f, 3.0e38f, 1.0e-40f, 2147483648.0f, 1e19f, -7.25f, 0.1f};
    static constexpr u64 specials[] = {0x7ff0000000000000, 0xfff8000000000000, 0x7ff0000000000001, 0xffefffffffffffff};
    for (unsigned at = 0; at < 32; at += 8) {
      u64 value = next();
      switch (next() % 6) {
        case 0: std::memcpy(&value, &doubles[next() % 10], 8); break;
        case 1:
          std::memcpy(&value, &floats[next() % 10], 4),
              std::memcpy(reinterpret_cast<u8*>(&value) + 4, &floats[next() % 10], 4);
          break;
        case 2: value = specials[next() % 4]; break;
        case 3: value = integer(); break;
        default: break;
      }
      std::memcpy(out + at, &value, 8);
    }
  }

 private:
  void draw(u8 (&bytes)[15]) {
    for (u8& byte : bytes) byte = u8(next());
    unsigned at = 0;
    if (one_in(4)) bytes[at++] = 0x66;
    if (one_in(5)) bytes[at++] = one_in(2) ? 0xf2 : 0xf3;
    if (one_in(16)) bytes[at++] = 0xf0;
    switch (next() % 8) {
      case 0: break;
      case 1: bytes[at++] = u8(0x40 | next() % 16); break;
      case 2: bytes[at++] = u8(0x40 | next() % 16); [[fallthrough]];
      case 3: bytes[at++] = 0x0f; break;
      case 4: bytes[at++] = 0x0f, bytes[at++] = one_in(2) ? 0x38 : 0x3a; break;
      case 5: bytes[at++] = 0xc5; break;
      case 6:
        bytes[at++] = 0xc4;
        bytes[at] = u8((bytes[at] & 0xe0) | (1 + next() % 3));
        break;
      default: bytes[at++] = u8(0xd8 + next() % 8); break;
    }
  }

  static bool judgeable(const ZydisDecodedInstruction& d, const ZydisDecodedOperand* operands) {
    switch (d.meta.category) {
      case ZYDIS_CATEGORY_CALL:
      case ZYDIS_CATEGORY_RET:
      case ZYDIS_CATEGORY_COND_BR:
      case ZYDIS_CATEGORY_UNCOND_BR:
      case ZYDIS_CATEGORY_INTERRUPT:
      case ZYDIS_CATEGORY_SYSCALL:
      case ZYDIS_CATEGORY_SYSRET:
      case ZYDIS_CATEGORY_SYSTEM:
      case ZYDIS_CATEGORY_SEGOP:
      case ZYDIS_CATEGORY_IO:
      case ZYDIS_CATEGORY_IOSTRINGOP:
      case ZYDIS_CATEGORY_RDWRFSGS:
      case ZYDIS_CATEGORY_RDRAND:
      case ZYDIS_CATEGORY_RDSEED:
      case ZYDIS_CATEGORY_RDPID:
      case ZYDIS_CATEGORY_RDPRU:
      case ZYDIS_CATEGORY_XSAVE:
      case ZYDIS_CATEGORY_XSAVEOPT:
      case ZYDIS_CATEGORY_PKU:
      case ZYDIS_CATEGORY_CET:
      case ZYDIS_CATEGORY_VTX:
      case ZYDIS_CATEGORY_MPX:
      case ZYDIS_CATEGORY_SGX:
      case ZYDIS_CATEGORY_WAITPKG:
      case ZYDIS_CATEGORY_ENQCMD:
      case ZYDIS_CATEGORY_UINTR:
      case ZYDIS_CATEGORY_AMX_TILE:
      case ZYDIS_CATEGORY_MOVDIR:
      case ZYDIS_CATEGORY_KNC:
      case ZYDIS_CATEGORY_KMASK:
      case ZYDIS_CATEGORY_XOP:
      case ZYDIS_CATEGORY_TBM:
      case ZYDIS_CATEGORY_FMA4:
      case ZYDIS_CATEGORY_AMD3DNOW:
      case ZYDIS_CATEGORY_PADLOCK: return false;
      default: break;
    }
    if (d.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && d.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX) return false;
    switch (d.mnemonic) {
      case ZYDIS_MNEMONIC_CPUID:
      case ZYDIS_MNEMONIC_RDTSC:
      case ZYDIS_MNEMONIC_RDTSCP:
      case ZYDIS_MNEMONIC_FXSAVE:
      case ZYDIS_MNEMONIC_FXSAVE64:
      case ZYDIS_MNEMONIC_FXRSTOR:
      case ZYDIS_MNEMONIC_FXRSTOR64:
      case ZYDIS_MNEMONIC_FLDENV:
      case ZYDIS_MNEMONIC_FNSTENV:  // FIP and FDP differ
      case ZYDIS_MNEMONIC_FNSAVE:
      case ZYDIS_MNEMONIC_FRSTOR:
      case ZYDIS_MNEMONIC_POPF:
      case ZYDIS_MNEMONIC_POPFQ:
      case ZYDIS_MNEMONIC_CLZERO:
      case ZYDIS_MNEMONIC_MONITORX:
      case ZYDIS_MNEMONIC_MWAITX:
      case ZYDIS_MNEMONIC_LDMXCSR:  // may unmask exceptions or be invalid; x86 tests look at it
      case ZYDIS_MNEMONIC_VLDMXCSR:
      case ZYDIS_MNEMONIC_ENTER: return false;
      default: break;
    }
    for (unsigned n = 0; n < d.operand_count; ++n) {
      const ZydisDecodedOperand& o = operands[n];
      if (o.type == ZYDIS_OPERAND_TYPE_POINTER) return false;
      if (o.type == ZYDIS_OPERAND_TYPE_REGISTER) {
        const ZydisRegisterClass kind = ZydisRegisterGetClass(o.reg.value);
        if (kind == ZYDIS_REGCLASS_SEGMENT || kind == ZYDIS_REGCLASS_CONTROL || kind == ZYDIS_REGCLASS_DEBUG)
          return false;
      }
      if (o.type != ZYDIS_OPERAND_TYPE_MEMORY) continue;
      if (o.mem.segment == ZYDIS_REGISTER_FS || o.mem.segment == ZYDIS_REGISTER_GS) return false;
      if (d.address_width != 64) return false;
      const bool hidden = o.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;
      if (!hidden &&
          (o.mem.base == ZYDIS_REGISTER_NONE || o.mem.base == ZYDIS_REGISTER_RIP || o.mem.base == o.mem.index))
        return d.mnemonic == ZYDIS_MNEMONIC_LEA;
    }
    return true;
  }

  std::mt19937_64 random_;
  ZydisDecoder decoder_;
};

/// Registers such that every memory operand lies in the data pages.
void aim(Generator& g, const ZydisDecodedInstruction& d, const ZydisDecodedOperand* operands, HostState& s) {
  s.gpr[x86::rsp] = data_address + data_bytes / 2 + g.next() % 64 * 8;
  const auto somewhere = [&] {
    const u64 page = data_address + (4 + g.next() % 8) * page_size;
    return g.one_in(3) ? page - g.next() % 40 : page + g.next() % page_size / 16 * 16;
  };
  for (unsigned n = 0; n < d.operand_count; ++n) {
    const ZydisDecodedOperand& o = operands[n];
    if (o.type != ZYDIS_OPERAND_TYPE_MEMORY || o.mem.type == ZYDIS_MEMOP_TYPE_AGEN) continue;
    if (o.mem.base == ZYDIS_REGISTER_NONE) continue;
    const auto number = [](ZydisRegister r) {
      return unsigned(ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, r)));
    };
    const unsigned base = number(o.mem.base);
    if (base == x86::rsp && o.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN) continue;
    u64 target = somewhere();
    if (o.mem.type == ZYDIS_MEMOP_TYPE_VSIB) {  // small indices around the middle
      for (unsigned e = 0; e < 32; e += 8) {
        u64 index = 0;
        std::memcpy(&index, s.vector[number(o.mem.index)] + e, 8);
        index = (index & 0x000000ff000000ff);
        if (d.mnemonic == ZYDIS_MNEMONIC_VGATHERQPS || d.mnemonic == ZYDIS_MNEMONIC_VGATHERQPD ||
            d.mnemonic == ZYDIS_MNEMONIC_VPGATHERQD || d.mnemonic == ZYDIS_MNEMONIC_VPGATHERQQ)
          index &= 0xff;
        std::memcpy(s.vector[number(o.mem.index)] + e, &index, 8);
      }
      target = data_address + data_bytes / 2;
    } else if (o.mem.index != ZYDIS_REGISTER_NONE) {
      target -= s.gpr[number(o.mem.index)] * o.mem.scale;
    }
    if (d.meta.category == ZYDIS_CATEGORY_BITBYTE && operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER) {
      const unsigned bit = number(operands[1].reg.value);
      if (bit == base || o.mem.index != ZYDIS_REGISTER_NONE) {
        s.gpr[bit] &= 0xff;
      } else
        s.gpr[bit] = u64(s64(g.next() % 65536) - 32768);
      if (bit == base) {
        target = data_address + data_bytes / 2;
      }
    }
    s.gpr[base] = target - u64(o.mem.disp.value);
  }
  if (d.meta.category == ZYDIS_CATEGORY_STRINGOP) s.gpr[x86::rcx] %= 600;
  if (d.mnemonic == ZYDIS_MNEMONIC_XLAT) s.gpr[x86::rbx] = somewhere();
}

void randomise(Generator& g, HostState& s) {
  for (u64& value : s.gpr) value = g.integer();
  s.rflags = (g.next() & arithmetic) | x86::flag::fixed1 | x86::flag::if_ | (g.one_in(4) ? x86::flag::df : 0);
  for (auto& v : s.vector) g.vector(v);
  std::memset(s.fx, 0, sizeof s.fx);
  const u16 control = u16(0x037f & ~(g.one_in(4) ? g.next() & 0x0f00 : 0));
  const u16 status = u16(g.next() & 0x3800);
  const u8 tags = u8(g.next());
  const u32 mxcsr = 0x1f80 | (u32(g.next()) & (g.one_in(3) ? 0xe040 : 0));
  std::memcpy(s.fx, &control, 2);
  std::memcpy(s.fx + 2, &status, 2);
  s.fx[4] = tags;
  std::memcpy(s.fx + 24, &mxcsr, 4);
  for (unsigned n = 0; n < 8; ++n) {
    const long double value =
        g.one_in(3) ? static_cast<long double>(s64(g.integer())) : 1.25L * static_cast<long double>(g.next() % 1000);
    std::memcpy(s.fx + 32 + 16 * n, &value, 10);
  }
}

std::string describe(const u8* bytes, const ZydisDecodedInstruction& d, const ZydisDecodedOperand* operands) {
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  char text[128] = "";
  ZydisFormatterFormatInstruction(&formatter, &d, operands, d.operand_count_visible, text, sizeof text, code_address,
                                  nullptr);
  std::string result = text;
  result += "  [";
  for (unsigned n = 0; n < d.length; ++n) {
    char hex[4];
    std::snprintf(hex, sizeof hex, "%02x ", bytes[n]);
    result += hex;
  }
  return result + "]";
}

std::string differences(const HostState& host, const HostState& engine, const HostState& before, bool trapped) {
  std::string out;
  char line[200];
  const auto row = [&](const char* name, unsigned n, u64 was, u64 h, u64 e) {
    std::snprintf(line, sizeof line, "  %s%u: was %016llx host %016llx engine %016llx\n", name, n,
                  (unsigned long long)was, (unsigned long long)h, (unsigned long long)e);
    out += line;
  };
  if (host.trap != engine.trap) row("trap", 0, 0, host.trap, engine.trap);
  for (unsigned n = 0; n < 16; ++n)
    if (host.gpr[n] != engine.gpr[n]) row("gpr", n, before.gpr[n], host.gpr[n], engine.gpr[n]);
  if (trapped) return out;
  const u64 mask = arithmetic | x86::flag::df;
  if ((host.rflags ^ engine.rflags) & mask) row("rflags", 0, before.rflags, host.rflags & mask, engine.rflags & mask);
  for (unsigned n = 0; n < 16; ++n)
    for (unsigned at = 0; at < 32; at += 8) {
      u64 w, h, e;
      std::memcpy(&w, before.vector[n] + at, 8), std::memcpy(&h, host.vector[n] + at, 8),
          std::memcpy(&e, engine.vector[n] + at, 8);
      if (h != e) row("ymm", n * 100 + at / 8, w, h, e);
    }
  u32 host_mxcsr, engine_mxcsr;
  std::memcpy(&host_mxcsr, host.fx + 24, 4), std::memcpy(&engine_mxcsr, engine.fx + 24, 4);
  if (host_mxcsr != engine_mxcsr) row("mxcsr", 0, 0, host_mxcsr, engine_mxcsr);
  for (unsigned at : {0u, 2u, 4u}) {  // control, status, tags
    u16 h = 0, e = 0;
    std::memcpy(&h, host.fx + at, at == 4 ? 1 : 2), std::memcpy(&e, engine.fx + at, at == 4 ? 1 : 2);
    if (h != e) row("x87 word", at, 0, h, e);
  }
  for (unsigned n = 0; n < 8; ++n)
    if (std::memcmp(host.fx + 32 + 16 * n, engine.fx + 32 + 16 * n, 10)) {
      u64 h, e;
      std::memcpy(&h, host.fx + 32 + 16 * n, 8), std::memcpy(&e, engine.fx + 32 + 16 * n, 8);
      row("st", n, 0, h, e);
    }
  return out;
}

void row_memory(std::string& out, u64 at, unsigned host, unsigned engine) {
  char line[100];
  std::snprintf(line, sizeof line, "  memory from %llx: host %02x engine %02x\n",
                (unsigned long long)(data_address + at), host, engine);
  out += line;
}

u64 from_environment(const char* name, u64 otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

TEST(AgainstHost, RandomInstructions) {
  const u64 seed = from_environment("ANYKVM_ISA_SEED", 1);
  const u64 count = from_environment("ANYKVM_ISA_COUNT", 200000);
  std::printf("seed %llu, %llu instructions\n", (unsigned long long)seed, (unsigned long long)count);
  HostCpu host;
  EngineCpu engine(engine::make_interpreter());
  Generator g(seed);
  unsigned failures = 0;
  u64 trapped = 0;
  HostState before{}, after{};
  for (u64 n = 0; n < count && failures < 20; ++n) {
    u8 bytes[15];
    ZydisDecodedInstruction d;
    ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
    g.instruction(bytes, d, operands);
    HostState& s = host.state();
    randomise(g, s);
    aim(g, d, operands, s);
    // Fresh data only where it was touched: the window around the middle is rewritten a little each time.
    for (unsigned k = 0; k < 4; ++k) {
      const u64 at = g.next() % (data_bytes / 8) * 8, value = g.integer();
      std::memcpy(host.data() + at, &value, 8);
    }
    if (n == 0)
      for (u64 at = 0; at < data_bytes; at += 8) {
        const u64 v = g.integer();
        std::memcpy(host.data() + at, &v, 8);
      }
    std::memcpy(engine.data(), host.data(), data_bytes);
    before = s;
    std::memcpy(engine.code(), bytes, sizeof bytes);
    engine.load(before);
    if (std::getenv("ANYKVM_ISA_VERBOSE"))
      std::fprintf(stderr, "#%llu %s\n", (unsigned long long)n, describe(bytes, d, operands).c_str());
    host.run(bytes, d.length);
    engine.step(after);
    trapped += s.trap != no_trap;
    std::string wrong = differences(s, after, before, s.trap != no_trap);
    if (std::memcmp(engine.data(), host.data(), data_bytes))
      for (u64 at = 0; at < data_bytes; ++at)
        if (engine.data()[at] != host.data()[at]) {
          row_memory(wrong, at, host.data()[at], engine.data()[at]);
          break;
        }
    if (!wrong.empty()) {
      ++failures;
      ADD_FAILURE() << "#" << n << " " << describe(bytes, d, operands) << "\n" << wrong;
    }
  }
  EXPECT_LT(trapped, count / 4) << "the generator's instructions mostly fault: they test little";
}

}  // namespace
}  // namespace anykvm::isa
