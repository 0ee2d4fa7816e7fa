#include "isa/undefined.h"

#include "isa/forms.h"
#include "x86/state.h"
#include "x86/x87_environment.h"

namespace anykvm::isa {

namespace {

namespace flag = x86::flag;

struct UndefinedFlags {
  ZydisMnemonic mnemonic;
  u64 flags;
};
/// Emulated, as 64-bit mode has not got them; the manuals leave these flags open.
constexpr UndefinedFlags undefined_flags[] = {
    {ZYDIS_MNEMONIC_AAA, flag::of | flag::sf | flag::zf | flag::pf},
    {ZYDIS_MNEMONIC_AAS, flag::of | flag::sf | flag::zf | flag::pf},
    {ZYDIS_MNEMONIC_AAM, flag::of | flag::af | flag::cf},
    {ZYDIS_MNEMONIC_AAD, flag::of | flag::af | flag::cf},
    {ZYDIS_MNEMONIC_DAA, flag::of},
    {ZYDIS_MNEMONIC_DAS, flag::of},
};

/// An image, an environment, a far pointer or a pair of bounds: which part is accessed first is the processor's choice,
/// and with it which fault is found, and where.
bool accesses_parts(const ZydisDecodedInstruction& d, const Operands& operands) {
  const bool x87 = d.meta.isa_ext == ZYDIS_ISA_EXT_X87;
  for (unsigned n = 0; n < d.operand_count; ++n) {
    if (operands[n].type != ZYDIS_OPERAND_TYPE_MEMORY) continue;
    if (operands[n].size > (x87 ? 8 : 64) * 8) return true;
    if (operands[n].visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN) continue;
    if (d.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || d.mnemonic == ZYDIS_MNEMONIC_BOUND) return true;
    switch (d.mnemonic) {
      case ZYDIS_MNEMONIC_LDS:
      case ZYDIS_MNEMONIC_LES:
      case ZYDIS_MNEMONIC_LFS:
      case ZYDIS_MNEMONIC_LGS:
      case ZYDIS_MNEMONIC_LSS: return true;
      default: break;
    }
  }
  return false;
}

/// Shifts and rotates by 0 write no flags, whatever the decoder's tables say.
bool may_shift_by_nothing(const ZydisDecodedInstruction& d, const Operands& operands) {
  if (d.meta.category != ZYDIS_CATEGORY_SHIFT && d.meta.category != ZYDIS_CATEGORY_ROTATE) return false;
  const ZydisDecodedOperand& count = operands[d.operand_count_visible - 1];
  return count.type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(count.imm.value.u & (d.operand_width == 64 ? 0x3f : 0x1f));
}

/// Which of the flags the code from offset `at` on may read before it writes them.
u64 live_flags(const Case& c, u64 at, u64 flags, unsigned& budget) {
  u64 live = 0;
  while (flags && at < c.code_length && budget) {
    --budget;
    engine::Decoded decoded;
    const auto& [d, operands] = decoded;
    if (!decode(c.mode, c.code + at, unsigned(c.code_length - at), decoded)) break;
    at += d.length;
    if (d.cpu_flags) {
      live |= flags & d.cpu_flags->tested;
      flags &= ~u64(d.cpu_flags->tested);
      if (!may_shift_by_nothing(d, operands))
        flags &= ~u64(d.cpu_flags->modified | d.cpu_flags->set_0 | d.cpu_flags->set_1 | d.cpu_flags->undefined);
    }
    if (d.meta.branch_type == ZYDIS_BRANCH_TYPE_NONE) continue;
    if (operands[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !operands[0].imm.is_relative) break;
    const u64 target = at + operands[0].imm.value.u;
    if (d.meta.category == ZYDIS_CATEGORY_COND_BR) live |= live_flags(c, at, flags, budget);
    at = target;
  }
  return live | flags;
}

}  // namespace

bool is_of_access(u32 trap) { return (trap >= 12 && trap <= 14) || trap == 17; }

u64 undefined_flags_of(ZydisMnemonic mnemonic) {
  for (const UndefinedFlags& u : undefined_flags)
    if (u.mnemonic == mnemonic) return u.flags;
  return 0;
}

Leniency leniency_of(const Case& c, const Outcome& host, bool drops_dead_flags) {
  constexpr u8 exception_summary = 0x80;
  Leniency leniency{.x87_pointers = x86::x87_behaviour().drops_pointers && !(host.out.fx[2] & exception_summary)};
  engine::Decoded decoded;
  const auto& [d, operands] = decoded;
  const u64 culprit = host.out.rip - c.in.rip;
  if ((host.trap == 13 || is_of_access(host.trap)) && culprit < c.code_length &&
      decode(c.mode, c.code + culprit, unsigned(c.code_length - culprit), decoded)) {
    // AMD counts the two immediate bytes of EXTRQ, which has this opcode, whatever the prefix.
    leniency.too_long = host.trap == 13 && d.mnemonic == ZYDIS_MNEMONIC_VMREAD && d.length + 2 > 15;
    leniency.several_parts = is_of_access(host.trap) && accesses_parts(d, operands);
  }
  unsigned budget = 64;
  if (drops_dead_flags && host.trap != no_trap)
    leniency.flags |= flag::arithmetic & ~live_flags(c, culprit, flag::arithmetic, budget);
  if (c.mode == Mode::code64) return leniency;
  for (unsigned at = 0; at < c.code_length && decode(c.mode, c.code + at, c.code_length - at, decoded); at += d.length)
    leniency.flags |= undefined_flags_of(d.mnemonic);
  return leniency;
}

Selectors x87_selectors(const ZydisDecodedInstruction& d, unsigned operand_bits) {
  switch (d.mnemonic) {
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FNSAVE: {
      const bool narrow = operand_bits == 14 * 8 || operand_bits == 94 * 8;
      return narrow ? Selectors{8, 12} : Selectors{16, 24};
    }
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEOPT: return {12, 20};
    default: return {};
  }
}

bool has_erratum(const ZydisDecodedInstruction& d, const Operands& operands) {
  if (d.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX) return false;
  for (unsigned n = 0; n < d.operand_count_visible; ++n)
    if (operands[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
        ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, operands[n].reg.value) == ZYDIS_REGISTER_RSP)
      return true;
  return false;
}

bool ignores_alignment(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_VDPPS: return true;  // the host does not check
    case ZYDIS_MNEMONIC_FXSAVE:              // #AC instead of #GP, as the manuals allow
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64: return true;
    default: return false;
  }
}

}  // namespace anykvm::isa
