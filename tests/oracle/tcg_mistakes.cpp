#include "oracle/tcg_mistakes.h"

#include <cstring>

namespace anykvm::oracle {
namespace {

constexpr u64 flag_rf = 1u << 16, flag_vm = 1u << 17;

bool is(const Difference& d, const char* field) { return !std::strcmp(d.field, field); }

std::span<const u8> without_prefixes(std::span<const u8> code) {
  while (!code.empty() && (code[0] == 0x66 || code[0] == 0x67 || code[0] == 0x2e || (code[0] & 0xf0) == 0x40))
    code = code.subspan(1);
  return code;
}
bool begins_with(std::span<const u8> code, u8 first, u8 second) {
  code = without_prefixes(code);
  return code.size() >= 2 && code[0] == first && code[1] == second;
}
/// Whether such an instruction lies right before our RIP.
bool follows(const Case& c, u8 first, u8 second) {
  for (unsigned length = 3; length < 12; ++length)
    if (begins_with(c.guest.code_at(c.test, c.mine.cs, c.mine.rip - length), first, second)) return true;
  return false;
}

Mistake mistakes[] = {
    {"pushes RF clear with a fault's flags; set, so that the instruction's breakpoint is not met again (volume 3, "
     "18.3.1.1)",
     [](const Case&, const Difference& d) {
       return (is(d, "frame") || is(d, "tss")) && (d.mine ^ d.other) == flag_rf && d.mine & flag_rf;
     }},
    {"does not mark every segment that is loaded as accessed (volume 3, 3.4.5.1)",
     [](const Case&, const Difference& d) {
       return (is(d, "gdt") || is(d, "ldt")) && d.index & 1 && (d.mine ^ d.other) == 0x100 && d.mine & 0x1000 &&
              d.mine & 0x100;
     }},
    {"takes an absent stack segment of an outer level for #NP; it is #SS (volume 2, RET and IRET)",
     [](const Case& c, const Difference& d) {
       return is(d, "vector") && c.mine.vector == 12 && c.other.vector == 11 && c.mine.error == c.other.error &&
              c.mine.rip == c.other.rip;
     }},
    {"loses the step behind LSS; only MOV and POP to SS hold traps back (volume 3, 6.8.3)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 1 && c.other.vector != 1 && follows(c, 0x0f, 0xb2);
     }},
    {"clears the RPL of null selectors on returns to outer levels; only of segments that are usable (volume 2, RET)",
     [](const Case&, const Difference& d) {
       return (is(d, "ds") || is(d, "es") || is(d, "fs") || is(d, "gs")) && d.mine < 4 && d.other == 0;
     }},
    {"clears bits 19:16 of what LAR loads, which the manuals leave open; processors load the descriptor's (volume 2, "
     "LAR)",
     [](const Case& c, const Difference& d) {
       return !((d.mine ^ d.other) & ~0xf0000ull) && c.guest.describe(c.test).find("lar ") != std::string::npos;
     }},
    {"interrupts virtual-8086 code into a handler of CPL 1 or 2; #GP (volume 3, 21.3.1)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && c.mine.flags & flag_vm && c.other.vector == 3 && c.mine.error &&
              (c.other.cs & 3) != 0 && (c.other.cs & 3) != 3 && !(c.other.flags & flag_vm);
     }},
};

}  // namespace

std::span<Mistake> tcg_mistakes() { return mistakes; }

}  // namespace anykvm::oracle
