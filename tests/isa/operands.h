// What sequence.cpp and aim.cpp ask about operands and instructions.
#pragma once

#include "isa/forms.h"

namespace anykvm::isa {

inline constexpr int no_gpr = -1;

inline int gpr_of(ZydisRegister reg) {
  switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
      return ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg));
    default: return no_gpr;
  }
}
inline bool is_vector(ZydisRegister reg) {
  const ZydisRegisterClass kind = ZydisRegisterGetClass(reg);
  return kind == ZYDIS_REGCLASS_XMM || kind == ZYDIS_REGCLASS_YMM || kind == ZYDIS_REGCLASS_ZMM;
}
inline u64 masked(u64 value, unsigned bits) { return bits >= 64 ? value : value & ((1ull << bits) - 1); }

inline bool is_image(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64: return true;
    default: return false;
  }
}
inline bool is_xsave(const ZydisDecodedInstruction& d) {
  return d.meta.category == ZYDIS_CATEGORY_XSAVE || d.meta.category == ZYDIS_CATEGORY_XSAVEOPT;
}
/// EDX:EAX chooses XSAVE components.
inline bool takes_components(const ZydisDecodedInstruction& d) {
  return is_xsave(d) || d.mnemonic == ZYDIS_MNEMONIC_XRSTOR || d.mnemonic == ZYDIS_MNEMONIC_XRSTOR64;
}
inline bool is_far_branch(const ZydisDecodedInstruction& d) { return d.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR; }

}  // namespace anykvm::isa
