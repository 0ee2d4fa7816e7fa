// Which instructions may reach a device's memory: those that KVM's instruction emulator knows. The others end in
// KVM_EXIT_INTERNAL_ERROR there (or #UD for user code), which is what clients and guests are used to.
// Reference: api.rst 7.33 KVM_CAP_EXIT_ON_EMULATION_FAILURE, chapter 5 "KVM_EXIT_INTERNAL_ERROR".
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

/// Of the vector instructions, the plain moves; of the x87 unit's, the stores of its two words.
bool emulator_knows_of_unit(const ZydisDecodedInstruction& instruction) {
  switch (instruction.mnemonic) {
    case ZYDIS_MNEMONIC_MOVUPS:
    case ZYDIS_MNEMONIC_MOVUPD:
    case ZYDIS_MNEMONIC_MOVAPS:
    case ZYDIS_MNEMONIC_MOVAPD:
    case ZYDIS_MNEMONIC_MOVDQA:
    case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_MOVNTPS:
    case ZYDIS_MNEMONIC_MOVNTPD:
    case ZYDIS_MNEMONIC_MOVNTDQ:
    case ZYDIS_MNEMONIC_FNSTCW:
    case ZYDIS_MNEMONIC_FNSTSW: return true;
    case ZYDIS_MNEMONIC_MOVQ: return instruction.opcode == 0x6f || instruction.opcode == 0x7f;  // the MMX forms
    default: return false;
  }
}

bool emulator_knows_of_integer(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_ADCX:
    case ZYDIS_MNEMONIC_ADOX:
    case ZYDIS_MNEMONIC_ARPL:
    case ZYDIS_MNEMONIC_BOUND:
    case ZYDIS_MNEMONIC_CMPXCHG16B:
    case ZYDIS_MNEMONIC_CRC32:
    case ZYDIS_MNEMONIC_INVPCID:
    case ZYDIS_MNEMONIC_LAR:
    case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW: return false;
    default: return true;
  }
}

/// XSAVE and its kin, MXCSR.
bool moves_extended_state(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_STMXCSR:
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64:
    case ZYDIS_MNEMONIC_XSAVEOPT:
    case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64:
    case ZYDIS_MNEMONIC_XSAVES:
    case ZYDIS_MNEMONIC_XSAVES64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_XRSTORS:
    case ZYDIS_MNEMONIC_XRSTORS64: return true;
    default: return false;
  }
}

}  // namespace

bool may_reach_devices(const Decoded& d, Unit unit) {
  if (d.instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY) return false;  // VEX, EVEX
  if (moves_extended_state(d.mnemonic())) return false;
  if (unit != Unit::integer) return emulator_knows_of_unit(d.instruction);
  return emulator_knows_of_integer(d.mnemonic());
}

x86::Result without_devices(Context& c, const Instruction& i) {
  const DeviceBar bar(c);
  return i.behind_bar(c, i);
}

}  // namespace anykvm::engine
