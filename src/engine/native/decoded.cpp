#include "engine/native/decoded.h"

#include <cpuid.h>

#include <algorithm>
#include <cstring>

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

/// To Zydis 3E before a near indirect branch is CET's; it names DS all the same.
void correct_notrack(Decoded& d, unsigned code_bits) {
  if (code_bits != 64 && d.instruction.attributes & ZYDIS_ATTRIB_HAS_NOTRACK && d.is_memory(0))
    d.operands[0].mem.segment = ZYDIS_REGISTER_DS;
}

ZyanStatus decode_with(const u8* bytes, unsigned available, unsigned code_bits, Decoded& out) {
  return ZydisDecoderDecodeFull(&decoder_for(code_bits), bytes, available, &out.instruction, out.operands);
}

/// AMD's way to CR8 outside 64-bit mode (CPUID AltMovCr8): LOCK MOV CR0, which Zydis refuses. bytes: a copy.
ZyanStatus decode_locked_control_move(u8* bytes, unsigned available, unsigned code_bits, Decoded& out) {
  u8* const end = bytes + available;
  u8* const prefixes_end = std::find_if_not(bytes, end, is_legacy_prefix);
  u8* opcode = prefixes_end;
  if (code_bits == 64 && opcode < end && (*opcode & 0xf0) == 0x40) ++opcode;
  if (end - opcode < 3 || opcode[0] != 0x0f || (opcode[1] & ~2) != 0x20) return ZYDIS_STATUS_DECODING_ERROR;
  std::replace(bytes, prefixes_end, u8(0xf0), u8(0x3e));  // which means nothing to it
  if (const ZyanStatus status = decode_with(bytes, available, code_bits, out); !ZYAN_SUCCESS(status)) return status;
  for (unsigned n = 0; n < 2; ++n)
    if (out.operands[n].reg.value == ZYDIS_REGISTER_CR0) {
      out.operands[n].reg.value = ZYDIS_REGISTER_CR8;
      out.instruction.attributes |= ZYDIS_ATTRIB_HAS_LOCK;
      return ZYAN_STATUS_SUCCESS;
    }
  return ZYDIS_STATUS_DECODING_ERROR;
}

/// EVEX.b with register operands where it chooses no rounding: reserved to the manuals and Zydis; some processors
/// execute the instruction as if it were 0. The host knows whether it does. bytes: a copy.
ZyanStatus decode_reserved_rounding(u8* bytes, unsigned available, unsigned code_bits, Decoded& out) {
  u8* const end = bytes + available;
  u8* const evex = std::find_if_not(bytes, end, is_legacy_prefix);
  constexpr u8 b = 0x10;
  if (end - evex < 6 || evex[0] != 0x62 || (code_bits != 64 && evex[1] < 0xc0) || !(evex[3] & b) || evex[5] < 0xc0)
    return ZYDIS_STATUS_DECODING_ERROR;
  evex[3] &= u8(~b);
  return decode_with(bytes, available, code_bits, out);
}

}  // namespace

bool host_is_amd() {
  static const bool amd = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && (b == signature_AMD_ebx);
  }();
  return amd;
}

bool is_legacy_prefix(u8 byte) {
  switch (byte) {
    case 0x26:
    case 0x2e:
    case 0x36:
    case 0x3e:
    case 0x64:
    case 0x65:
    case 0x66:
    case 0x67:
    case 0xf0:
    case 0xf2:
    case 0xf3: return true;
    default: return false;
  }
}

ZyanStatus decode_instruction(const u8* bytes, unsigned available, unsigned code_bits, Decoded& out) {
  available = std::min<unsigned>(available, ZYDIS_MAX_INSTRUCTION_LENGTH);
  ZyanStatus status = decode_with(bytes, available, code_bits, out);
  for (const auto otherwise : {decode_locked_control_move, decode_reserved_rounding}) {
    if (ZYAN_SUCCESS(status) || status == ZYDIS_STATUS_NO_MORE_DATA || status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG)
      break;
    u8 copy[ZYDIS_MAX_INSTRUCTION_LENGTH];
    std::memcpy(copy, bytes, available);
    status = otherwise(copy, available, code_bits, out);
  }
  if (!ZYAN_SUCCESS(status)) return status;
  correct_baseless_sib(out);
  correct_notrack(out, code_bits);
  return ZYAN_STATUS_SUCCESS;
}

}  // namespace anykvm::engine
