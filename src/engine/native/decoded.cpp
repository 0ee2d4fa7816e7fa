#include "engine/native/decoded.h"

#include <cpuid.h>

namespace anykvm::engine {

namespace {

/// One decoder per mode, made once.
const ZydisDecoder& decoder_for(unsigned code_bits) {
  struct Decoders {
    ZydisDecoder long64, legacy32, legacy16;
    Decoders() {
      ZydisDecoderInit(&long64, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
      ZydisDecoderInit(&legacy32, ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
      ZydisDecoderInit(&legacy16, ZYDIS_MACHINE_MODE_LONG_COMPAT_16, ZYDIS_STACK_WIDTH_16);
      for (ZydisDecoder* decoder : {&long64, &legacy32, &legacy16}) {
        ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
        ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_KNC, ZYAN_FALSE);
      }
      // Near branches with an operand-size prefix.
      if (host_is_amd()) ZydisDecoderEnableMode(&long64, ZYDIS_DECODER_MODE_AMD_BRANCHES, ZYAN_TRUE);
    }
  };
  static const Decoders decoders;
  return code_bits == 64 ? decoders.long64 : code_bits == 32 ? decoders.legacy32 : decoders.legacy16;
}

/// Zydis 4.0 takes [disp32 + index] with 32-bit addresses for [r13d + index] when the prefix's B bit is set: SIB's base
/// 101b without a base ignores the bit.
void correct_baseless_sib(Decoded& d) {
  const auto& raw = d.instruction.raw;
  if (!(d.instruction.attributes & ZYDIS_ATTRIB_HAS_SIB) || raw.modrm.mod != 0 || raw.sib.base != 5) return;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    ZydisDecodedOperand& operand = d.operands[n];
    if (!d.is_memory(n) || operand.encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM) continue;
    operand.mem.base = ZYDIS_REGISTER_NONE;
    operand.mem.disp.has_displacement = ZYAN_TRUE;
    operand.mem.disp.value = raw.disp.value;
  }
}

}  // namespace

bool host_is_amd() {
  static const bool amd = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && (b == signature_AMD_ebx);
  }();
  return amd;
}

ZyanStatus decode_instruction(const u8* bytes, unsigned available, unsigned code_bits, Decoded& out) {
  const ZyanStatus status =
      ZydisDecoderDecodeFull(&decoder_for(code_bits), bytes, available, &out.instruction, out.operands);
  if (ZYAN_SUCCESS(status)) correct_baseless_sib(out);
  return status;
}

}  // namespace anykvm::engine
