#include "oracle/tcg_mistakes.h"

#include <algorithm>
#include <cstring>

#include "x86/cpu.h"

namespace anykvm::oracle {
namespace {

constexpr u64 flag_rf = 1u << 16, flag_vm = 1u << 17, flag_tf = 1u << 8, flag_ac = 1u << 18, flag_zf = 0x40,
              flags_arithmetic = 0x8d5;

bool is(const Difference& d, const char* field) { return !std::strcmp(d.field, field); }

std::span<const u8> without_prefixes(std::span<const u8> code) {
  while (!code.empty() &&
         (code[0] == 0x66 || code[0] == 0x67 || code[0] == 0x2e || code[0] == 0xf0 || (code[0] & 0xf0) == 0x40))
    code = code.subspan(1);
  return code;
}
bool begins_with(std::span<const u8> code, u8 first, int second = -1) {
  code = without_prefixes(code);
  return code.size() >= 2 && code[0] == first && (second < 0 || code[1] == second);
}
/// Whether such an instruction lies right before our RIP.
bool follows(const Case& c, u8 first, u8 second) {
  for (unsigned length = 3; length < 12; ++length)
    if (begins_with(c.guest.code_at(c.test, c.mine.cs, c.mine.rip - length), first, second)) return true;
  return false;
}

/// Whether the test's code has these bytes.
bool has(const Case& c, u8 first, int second = -1) {
  const std::span<const u8> code = c.guest.code(c.test);
  for (std::size_t i = 0; i + 1 < code.size(); ++i)
    if (code[i] == first && (second < 0 || code[i + 1] == second)) return true;
  return false;
}

/// Whether this is the error code, in the frame's log or where the stack lies in a page that is logged, too.
bool is_error(const Case& c, const Difference& d) {
  if (!is(d, "page")) return is(d, "frame") && d.index == 0;
  const u64 bits = d.mine ^ d.other, of_error = c.mine.error ^ c.other.error;
  for (unsigned shift = 0; shift < 64; shift += 8)
    if (bits == of_error << shift) return true;
  return false;
}

/// ADD, XADD, INC with memory.
bool reads_and_writes(std::span<const u8> code) {
  return begins_with(code, 0x00) || begins_with(code, 0x01) || begins_with(code, 0xff, 0x00) ||
         begins_with(code, 0x0f, 0xc0) || begins_with(code, 0x0f, 0xc1);
}

Mistake mistakes[] = {
    {"pushes RF clear with a fault's flags; set, so that the instruction's breakpoint is not met again (volume 3, "
     "18.3.1.1)",
     [](const Case&, const Difference& d) {
       return (is(d, "frame") || is(d, "tss") || std::strstr(d.field, "stack")) && (d.mine ^ d.other) == flag_rf &&
              d.mine & flag_rf;
     }},
    {"... the same on a stack that is not aligned",
     [](const Case&, const Difference& d) {
       const u64 bit = d.mine ^ d.other;
       return is(d, "page") && d.mine & bit && (bit == 1 || bit == 1u << 8 || bit == 1u << 16 || bit == 1u << 24);
     }},
    {"pushes RF set with INT n's flags; clear, as behind every instruction (volume 3, 18.3.1.1)",
     [](const Case& c, const Difference& d) {
       return (is(d, "frame") || std::strstr(d.field, "stack")) && (d.mine ^ d.other) == flag_rf &&
              (has(c, 0xcd) || c.mine.vector == 3);
     }},
    {"keeps bit 12 of DR6; always 0 (volume 3, 18.2.3)",
     [](const Case&, const Difference& d) {
       return is(d, "dr6") && (d.mine ^ d.other) == 0x1000 && !(d.mine & 0x1000);
     }},
    {"enters code segments with both L and D; #GP (volume 3, 5.2.1)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && (c.named >> 53 & 3) == 3 && c.named >> 44 & 1;
     }},
    {"pushes a transfer's frame as a supervisor where the user's level stays; as a user (volume 3, 5.6.1)",
     [](const Case& c, const Difference&) {
       const bool in_handler = (c.other.cs & 3) == 3;  // of CPL 3, which ours did not reach
       if (c.other.rip == c.mine.rip) return false;
       if (c.mine.vector == 8) return in_handler && (c.mine.cs & 3) == 3;
       return c.mine.vector == 14 && (c.mine.error & 6) == 6 &&
              (begins_with(c.code, 0xff) || begins_with(c.code, 0x9a) || in_handler);
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
    {"loses the step behind LSS and STI; only MOV and POP to SS hold traps back (volume 3, 6.8.3)",
     [](const Case& c, const Difference& d) {
       const std::span<const u8> before = c.guest.code_at(c.test, c.mine.cs, c.mine.rip - 1);
       const bool follows_sti = !before.empty() && before[0] == 0xfb && (c.mine.rip != c.other.rip || is(d, "dr6"));
       return c.mine.vector == 1 && (follows_sti || (c.other.vector != 1 && follows(c, 0x0f, 0xb2)));
     }},
    {"SYSCALL clears the arithmetic flags; those that SFMASK names (volume 2, SYSCALL)",
     [](const Case& c, const Difference& d) {
       return is(d, "frame") && !((d.mine ^ d.other) & ~flags_arithmetic) && !(d.other & flags_arithmetic) &&
              has(c, 0x0f, 0x05);
     }},
    {"SYSRET takes RF and VM from R11, and not VIF and VIP; R11 & 3C7FD7H (volume 2, SYSRET)",
     [](const Case& c, const Difference& d) {
       return is(d, "frame") && !((d.mine ^ d.other) & ~0x1b0000ull) && has(c, 0x0f, 0x07);
     }},
    {"names gates of the IDT by 16 times the vector in long mode, and never sets EXT; 8 times, EXT for what no INT n "
     "caused (volume 3, 6.13)",
     [](const Case& c, const Difference& d) {
       const bool is_error = is(d, "frame") ? d.index == 0 && c.mine.has_error && c.other.vector == c.mine.vector
                                            : std::strstr(d.field, "stack") != nullptr;
       return is_error && ((d.mine & 2 && d.other == 2 + 2 * (d.mine & 0x7f8)) || d.other == (d.mine & ~1ull));
     }},
    {"keeps the bases of FS and GS when a return takes them away; 0, as of all null segments (Intel; AMD's keep them)",
     [](const Case&, const Difference& d) { return (is(d, "fs.base") || is(d, "gs.base")) && d.mine == 0; }},
    {"takes a null SS with another RPL than CPL in 64-bit mode; #GP(0) (volume 2, MOV and LSS)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && c.mine.error == 0 &&
              (begins_with(c.code, 0x0f, 0xb2) || begins_with(c.code, 0x8e, 0xd0));
     }},
    {"has SYSENTER and SYSEXIT in an AMD's compatibility mode; #UD (AMD64 manual volume 3)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 6 && (begins_with(c.code, 0x0f, 0x34) || begins_with(c.code, 0x0f, 0x35));
     }},
    {"takes SYSENTER_CS for null only if it is 0; whatever its RPL bits (volume 2, SYSENTER)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && !c.mine.error &&
              (begins_with(c.code, 0x0f, 0x34) || begins_with(c.code, 0x0f, 0x35));
     }},
    {"has SYSCALL and SYSRET in an Intel's compatibility mode; #UD (volume 2, SYSCALL)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 6 && c.guest.qemu_cpu.ends_with("Intel") &&
              (begins_with(c.code, 0x0f, 0x05) || begins_with(c.code, 0x0f, 0x07));
     }},
    {"returns to any address by SYSRET and SYSEXIT; #GP(0) if it is not canonical (Intel's volume 2)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && c.mine.error == 0 && !(c.mine.cs & 3) && (c.other.cs & 3) == 3 &&
              (begins_with(c.code, 0x0f, 0x07) || begins_with(c.code, 0x0f, 0x35));
     }},
    {"loads a null SS for a stack of the IST without a change of CPL (volume 3, 6.14.4 and 6.14.5)",
     [](const Case& c, const Difference& d) {
       return is(d, "frame") && d.index == 4u + c.mine.has_error && d.other < 4 && d.mine == c.mine.ss;
     }},
    {"gives CS the RPL of its DPL behind a call gate to conforming code; CPL, which stays (volume 2, CALL)",
     [](const Case& c, const Difference& d) {
       return is(d, "frame") && d.index == 1u + c.mine.has_error && (d.mine ^ d.other) < 4 && c.code_segment >> 42 & 1;
     }},
    {"returns to a null SS whatever the code and its RPL; #GP(0) unless to 64-bit code of the same RPL (volume 2, RET)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && c.mine.error == 0 && c.other.ss < 4 &&
              (begins_with(c.code, 0xca) || begins_with(c.code, 0xcb) || begins_with(c.code, 0xcf));
     }},
    {"names breakpoints in DR6 that DR7 does not enable (volume 3, 18.2.3, allows it)",
     [](const Case&, const Difference& d) {
       return is(d, "dr6") && !((d.mine ^ d.other) & ~0xfull) && !(d.mine & ~d.other);
     }},
    {"has #GP for a jump through a gate to absent code; #NP (volume 2, JMP)",
     [](const Case& c, const Difference& d) {
       return is(d, "vector") && c.mine.vector == 11 && c.other.vector == 13 && c.mine.error == c.other.error &&
              c.mine.rip == c.other.rip && !(c.named >> 47 & 1) && c.named >> 43 & 1;
     }},
    {"marks pages as accessed or dirty in an access that faults (volume 3, 4.8, allows it)",
     [](const Case& c, const Difference& d) {
       const u64 extra = c.mine.vector == 14 || c.mine.vector == 8 ? 0x60 : 0x20;
       return (is(d, "pae pde") || is(d, "pae pte") || is(d, "pml5") || is(d, "pml4") || is(d, "pdpte") ||
               is(d, "pde") || is(d, "pte") || is(d, "low pte")) &&
              !((d.mine ^ d.other) & ~extra) && !(d.mine & ~d.other);
     }},
    {"has LAR and LSL take descriptors of 16-bit types in long mode (volume 2, LAR: table 3-53)",
     [](const Case& c, const Difference& d) {
       if (!has(c, 0x0f, 0x02) && !has(c, 0x0f, 0x03)) return false;
       return is(d, "rcx") || ((is(d, "frame") || std::strstr(d.field, "stack")) &&
                               ((d.mine ^ d.other) & ~flag_rf) == flag_zf && d.other & flag_zf);
     }},
    {"has LTR take a 16-bit TSS in long mode; #GP (volume 2, LTR)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && begins_with(c.code, 0x0f, 0x00) && (c.named >> 40 & 0x1f) == 1;
     }},
    {"leaves P out of the error code of reserved bits (volume 3, 4.7)",
     [](const Case& c, const Difference& d) {
       return is_error(c, d) && c.mine.vector == 14 && c.other.vector == 14 && (c.mine.error ^ c.other.error) == 1 &&
              (c.mine.error & 9) == 9;
     }},
    {"reads an operand that it will write before it sees whether it may (volume 3, 4.7)",
     [](const Case& c, const Difference& d) {
       return (is(d, "cr2") || is_error(c, d)) && c.mine.vector == 14 && c.other.vector == 14 &&
              c.mine.rip == c.other.rip && c.mine.error & 2 && !(c.other.error & 2) &&
              (reads_and_writes(c.code) || c.code.empty());
     }},
    {"checks no limits of data segments; #GP(0) (volume 3, 5.3)",
     [](const Case& c, const Difference&) {
       const bool by_fs_or_gs = !c.code.empty() && (c.code[0] == 0x64 || c.code[0] == 0x65);
       return by_fs_or_gs && c.mine.vector == 13 && !c.mine.error && c.mine.rip != c.other.rip &&
              !(c.code_segment >> 53 & 1);  // not 64-bit code, which has no limits
     }},
    {"has privilege level 0 behind a null SS that level 1 or 2 loads; the level stays (volume 3, 5.4.1.1)",
     [](const Case& c, const Difference&) {
       const unsigned cpl = c.mine.cs & 3;
       return c.mine.vector == 13 && !c.mine.error && (cpl == 1 || cpl == 2) && c.mine.ss == cpl &&
              c.mine.rip != c.other.rip && (has(c, 0x0f, 0xb2) || has(c, 0x8e, 0xd0));
     }},
    {"has a POPA that faults load the registers before; a fault leaves them as they were (volume 3, 6.5)",
     [](const Case& c, const Difference& d) {
       static constexpr const char* loaded[] = {"edi", "esi", "ebp", "ebx", "edx", "ecx", "eax"};
       return c.mine.vector == 14 && begins_with(c.code, 0x61) && c.mine.rip == c.other.rip &&
              std::ranges::any_of(loaded, [&](const char* name) { return is(d, name); });
     }},
    {"has #GP(0) for a stack address that is not canonical; #SS(0) (volume 1, 3.3.7.1)",
     [](const Case& c, const Difference& d) {
       return is(d, "vector") && c.mine.vector == 12 && c.other.vector == 13 && c.mine.rip == c.other.rip;
     }},
    {"notices a near target that is not canonical when it fetches there; #GP(0) before (volume 2, JMP, CALL, RET)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 13 && !c.mine.error && c.other.vector == 13 && !c.other.error &&
              !x86::canonical(c.other.rip);
     }},
    {"leaves the pushes before the one that faults; the frame is written whole or not, which is allowed",
     [](const Case& c, const Difference& d) {
       return (is(d, "page") || is(d, "user stack") || std::strstr(d.field, "stack")) &&
              (c.mine.vector == 8 || (c.mine.vector == 14 && has(c, 0xcd)));
     }},
    {"writes the descriptor's upper half to mark it as accessed; ours the one byte",
     [](const Case& c, const Difference& d) {
       return is(d, "cr2") && d.mine == d.other + 1 && c.mine.error == c.other.error && c.mine.rip == c.other.rip;
     }},
    {"does not let the user's AC permit an interrupt's pushes onto a user's page; they are explicit accesses",
     [](const Case& c, const Difference&) {
       return c.other.vector == 14 && (c.other.error & 5) == 1 && c.other.flags & flag_ac && (c.other.cs & 3) == 3 &&
              begins_with(c.guest.code_at(c.test, c.other.cs, c.other.rip), 0xcd);
     }},
    {"names only the first of several data breakpoints that an instruction meets (volume 3, 18.2.3: each)",
     [](const Case& c, const Difference& d) {
       return is(d, "dr6") && !((d.mine ^ d.other) & ~0xfull) && d.mine & d.other & 0xf && c.mine.vector == 1 &&
              (c.mine.rip == c.other.rip || c.mine.rip == c.other.rip + 2);
     }},
    {"meets instruction breakpoints behind MOV SS; they are held back (volume 3, 6.8.3)",
     [](const Case& c, const Difference&) {
       return c.other.vector == 1 && (c.mine.rip != c.other.rip || c.mine.vector != 1) &&
              begins_with(c.guest.code_at(c.test, c.other.cs, c.other.rip - 2), 0x8e, 0xd0);
     }},
    {"delivers a step and the data breakpoint of its instruction one on top of the other; one #DB (volume 3, 6.9)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 1 && c.mine.flags & flag_tf && c.other.vector == 1 && !(c.other.flags & flag_tf) &&
              c.guest.code_at(c.test, c.other.cs, c.other.rip).empty();
     }},
    {"stays on a string operation behind its last iteration (volume 3, 18.3.1.1)",
     [](const Case& c, const Difference& d) {
       const std::span<const u8> code = c.guest.code_at(c.test, c.other.cs, c.other.rip);
       return is(d, "frame") && d.index == 0 && c.mine.vector == 1 && c.other.vector == 1 && d.mine == d.other + 2 &&
              code.size() > 2 && code[0] == 0xf3;
     }},
    {"keeps a data breakpoint of an access that faults, and has its #DB in the fault's handler (volume 3, 18.2.4)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 14 && c.other.vector == 1 && c.guest.code_at(c.test, c.other.cs, c.other.rip).empty();
     }},
    {"has 64-bit EDX and ECX for a SYSEXIT to 32-bit code (volume 2, SYSEXIT)",
     [](const Case& c, const Difference& d) {
       return is(d, "frame") && d.mine == u32(d.other) && has(c, 0x0f, 0x35) && (c.mine.cs & 3) == 3;
     }},
    {"looks for P before L of a handler's code segment; volume 2, INT n, does not say which comes first",
     [](const Case& c, const Difference& d) {
       return (is(d, "vector") || (is(d, "frame") && d.index == 0)) && c.mine.vector == 13 && c.other.vector == 11 &&
              (c.mine.error | 1) == (c.other.error | 1) && !(c.named >> 47 & 1) && !(c.named >> 53 & 1);
     }},
    {"lets AC permit implicit supervisor accesses to user pages under SMAP (volume 3, 4.6.1)",
     [](const Case& c, const Difference&) {
       return c.mine.vector == 14 && (c.mine.error & 5) == 1 && c.mine.flags & flag_ac &&
              (begins_with(c.code, 0x8e) || begins_with(c.code, 0x0f, 0x02) || begins_with(c.code, 0x0f, 0x00));
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
    {"looks for an NMI at its translated block's end, behind the jump that follows the store which sends it",
     [](const Case& c, const Difference& d) {
       return (is(d, "frame") || std::strstr(d.field, "stack")) && d.other == d.mine + 2 &&
              begins_with(c.guest.code_at(c.test, c.mine.cs, d.mine), 0xeb, 0x00);
     }},
    {"leaves NMIs blocked behind an IRET that faults; every IRET unblocks them (volume 3, 6.7.1 and 27.2.3)",
     [](const Case& c, const Difference& d) {
       const bool faults = has(c, 0x9d, 0x48);  // POPFQ sets NT, IRETQ follows
       return faults && c.mine.rip == c.other.rip &&
              (is(d, "r8-r15") || is(d, "frame") || std::strstr(d.field, "stack"));
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
