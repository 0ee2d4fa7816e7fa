#include "isa/report.h"

#include <cstdio>

#include "isa/forms.h"
#include "isa/segments.h"

namespace anykvm::isa {

namespace {

/// Calls visit(offset, length, instruction or nullptr) for each instruction as laid out.
template <class Visit>
void walk(const Case& c, Visit&& visit) {
  u8 bytes[Case::max_code + 32];
  lay_out(c, bytes);
  for (unsigned at = 0; at < c.code_length;) {
    engine::Decoded d;
    if (decode(c.mode, bytes + at, 15, d)) {
      visit(at, d.instruction.length, &d);
      at += d.instruction.length;
    } else {
      visit(at, c.code_length - at, nullptr);
      break;
    }
  }
}

void line(std::string& out, const char* format, auto... values) {
  char text[400];
  std::snprintf(text, sizeof text, format, values...);
  out += text;
}

}  // namespace

std::string listing(const Case& c) {
  std::string out;
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  const u64 base = c.mode == Mode::code64 ? 0 : extent_of(c.in.selector[1]).base;
  walk(c, [&](unsigned at, unsigned length, const engine::Decoded* d) {
    const u64 address = code_address + c.code_offset + at - base;
    line(out, "  %llx:", (unsigned long long)address);
    for (unsigned n = 0; n < length; ++n) line(out, " %02x", c.code[at + n]);
    char text[160] = "(undefined)";
    if (d)
      ZydisFormatterFormatInstruction(&formatter, &d->instruction, d->operands, d->instruction.operand_count_visible,
                                      text, sizeof text, address, nullptr);
    line(out, "   %s\n", text);
  });
  return out;
}

std::string mnemonics(const Case& c) {
  std::string out;
  walk(c, [&](unsigned, unsigned, const engine::Decoded* d) {
    if (!out.empty()) out += ' ';
    out += d ? ZydisMnemonicGetString(d->mnemonic()) : "undefined";
  });
  return out;
}

std::string report(const Case& c, const Outcome& host, const Outcome& engine, const char* engine_name) {
  std::string out = "case " + std::to_string(c.number) + ", " + std::to_string(bits_of(c.mode)) + "-bit code:\n";
  out += listing(c);
  out += "from:";
  static constexpr const char* names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                            "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
  for (unsigned n = 0; n < 16; ++n)
    if (c.in.gpr[n]) line(out, " %s=%llx", names[n], (unsigned long long)c.in.gpr[n]);
  u16 control, status;
  std::memcpy(&control, c.in.fx, 2), std::memcpy(&status, c.in.fx + 2, 2);
  line(out, "\n      rflags=%llx mxcsr=%x fcw=%x fsw=%x tags=%x", (unsigned long long)c.in.rflags, c.in.mxcsr(),
       unsigned(control), unsigned(status), unsigned(c.in.fx[4]));
  line(out, " es=%x cs=%x ss=%x ds=%x fs=%x/%llx gs=%x/%llx\n", c.in.selector[0], c.in.selector[1], c.in.selector[2],
       c.in.selector[3], c.in.selector[4], (unsigned long long)c.in.base[0], c.in.selector[5],
       (unsigned long long)c.in.base[1]);
  for (unsigned n = 0; n < 8; ++n) {
    u64 mantissa;
    u16 exponent;
    std::memcpy(&mantissa, c.in.fx + 32 + 16 * n, 8), std::memcpy(&exponent, c.in.fx + 40 + 16 * n, 2);
    if (mantissa || exponent) line(out, "      st%u=%04x_%016llx\n", n, exponent, (unsigned long long)mantissa);
  }
  for (unsigned n = 0; n < 16; ++n) {
    u64 v[4];
    std::memcpy(v, c.in.xmm(n), 16), std::memcpy(v + 2, c.in.ymm_high[n], 16);
    if (v[0] | v[1] | v[2] | v[3])
      line(out, "      ymm%u=%016llx_%016llx_%016llx_%016llx\n", n, (unsigned long long)v[3], (unsigned long long)v[2],
           (unsigned long long)v[1], (unsigned long long)v[0]);
  }
  for (unsigned n = 0; n < 8; ++n)
    if (c.in.opmask[n]) line(out, "      k%u=%016llx\n", n, (unsigned long long)c.in.opmask[n]);
  for (unsigned n = 0; n < c.poke_count; ++n)
    line(out, "      [%llx]=%016llx\n", (unsigned long long)(data_address + c.pokes[n].at),
         (unsigned long long)c.pokes[n].value);
  line(out, "  %-18s %-40s %-40s %s\n", "differs", "before", "host", engine_name);
  for (const Difference& d : differences(c, host, engine))
    line(out, "  %-18s %-40s %-40s %s\n", d.field.c_str(), d.before.c_str(), d.host.c_str(), d.engine.c_str());
  const auto exception = [&](const char* name, const Outcome& o) {
    if (o.trap != no_trap)
      line(out, "  %s: exception %d, error code %x, rip %llx, CR2 %llx\n", name, int(o.trap), o.error,
           (unsigned long long)o.out.rip, (unsigned long long)o.address);
  };
  exception("host", host);
  exception(engine_name, engine);
  return out;
}

}  // namespace anykvm::isa
