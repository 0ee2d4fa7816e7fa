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

}  // namespace

bool is_of_access(u32 trap) { return (trap >= 12 && trap <= 14) || trap == 17; }

u64 undefined_flags_of(ZydisMnemonic mnemonic) {
  for (const UndefinedFlags& u : undefined_flags)
    if (u.mnemonic == mnemonic) return u.flags;
  return 0;
}

Leniency leniency_of(const Case& c, const Outcome& host) {
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
