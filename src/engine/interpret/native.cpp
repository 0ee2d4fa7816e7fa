// The instructions that the host CPU executes for the guest (engine/native): all that compute, none that control.
#include <utility>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"
#include "engine/interpret/x87_pointers.h"

namespace anykvm::engine {

namespace {

namespace cr0 = x86::cr0;
namespace cr4 = x86::cr4;

constexpr u32 mxcsr_mm = 1u << 17;  ///< AMD's: packed operands need no alignment

u16 x87_status(const x86::CpuState& state) {
  u16 status;
  std::memcpy(&status, state.fpu.x87 + 2, sizeof status);
  return status;
}

/// An x87 store that met an unmasked exception other than inexactness has stored nothing. (FNSTCW and FNSTSW, which do
/// not look at exceptions, have.)
bool kept_its_result(const Context& c, const Instruction& i) {
  const u8* image = c.cpu.state.fpu.x87;
  return i.unit == Unit::x87 && i.waits_for_x87 && image[2] & ~image[0] & 0x1f;
}

}  // namespace

Result host_exception(Context& c, const Instruction& i) {
  note_x87(c, i);
  if (i.unit == Unit::mmx) {
    // A conversion that raises a SIMD exception has entered MMX mode by then.
    u8* image = c.cpu.state.fpu.x87;
    std::memcpy(image, c.x87_at_exception, 6);  // the words; the pointers do not move
    std::memcpy(image + 32, c.x87_at_exception + 32, 128);
  }
  switch (std::exchange(c.host_exception, Context::no_exception)) {
    case x86::exception::de: return c.cpu.raise(x86::exception::de);
    case x86::exception::mf: return c.cpu.raise(x86::exception::mf);
    case x86::exception::xm: return c.cpu.state.cr4 & cr4::osxmmexcpt ? c.cpu.raise(x86::exception::xm) : c.cpu.ud();
    case x86::exception::gp: return c.cpu.gp();
    default: return c.cpu.ud();
  }
}

namespace {

/// Whether some exception that the instruction could raise is unmasked.
bool may_not_store(const Context& c, const Instruction& i) { return i.uses_mxcsr && ~c.cpu.state.fpu.mxcsr & 0x1f80; }

/// Stores of 64 bytes are two of 32: where the second violates segmentation, the first may still meet a page fault.
Result refuse_store_of_halves(Context& c, const Instruction& i, x86::Operand& operand) {
  Gva gva;
  ANYKVM_TRY(memory_address(c, i, 32, Access::write, gva));
  ANYKVM_TRY(c.cpu.open_operand(gva, 32, i.use, operand));
  return memory_address(c, i, 64, Access::write, gva);
}

Result open_memory(Context& c, const Instruction& i, x86::Operand& operand) {
  Gva gva = 0;
  const Result located =
      memory_address(c, i, i.memory_bytes, i.use == Cpu::Use::read ? Access::read : Access::write, gva);
  // Alignment comes first: #GP, where a stack address that is not canonical either would give #SS.
  const bool misaligned = i.alignment && gva & (i.alignment - 1u);
  if (misaligned && !(i.mxcsr_may_misalign && c.cpu.state.fpu.mxcsr & mxcsr_mm)) [[unlikely]]
    return c.cpu.gp();
  if (located != Result::ok) [[unlikely]]
    return i.use == Cpu::Use::write && i.memory_bytes == 64 ? refuse_store_of_halves(c, i, operand) : located;
  if (misaligned) [[unlikely]] {
    ANYKVM_TRY(c.cpu.open_operand(gva, i.memory_bytes, Cpu::Use::read, operand));
    // The host's MXCSR is not the guest's where an instruction has no use for it.
    if (!operand.bounced) std::memcpy(operand.buffer, operand.host, i.memory_bytes);
    operand.host = operand.buffer;
    return Result::ok;
  }
  // An unmasked exception keeps the store from happening: a bounce buffer must then hold what was there.
  const Cpu::Use use = i.use == Cpu::Use::write && may_not_store(c, i) ? Cpu::Use::read_write : i.use;
  if (!i.bars_devices) [[likely]]
    return c.cpu.open_operand(gva, i.memory_bytes, use, operand);
  const DeviceBar bar(c);
  return c.cpu.open_operand(gva, i.memory_bytes, use, operand);
}

Result integer_register(Context& c, const Instruction& i) { return run_native(c, i, nullptr); }
Result integer_memory(Context& c, const Instruction& i) {
  x86::Operand operand;
  ANYKVM_TRY(open_memory(c, i, operand));
  ANYKVM_TRY(run_native(c, i, operand.host));
  c.cpu.close_operand(operand, i.use);
  return Result::ok;
}
Result unit_register(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  const X87Pointers pointers(c, i);
  ANYKVM_TRY(run_native(c, i, nullptr));
  note_x87(c, i);
  pointers.settle();
  return Result::ok;
}
Result unit_memory(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  x86::Operand operand;
  ANYKVM_TRY(open_memory(c, i, operand));
  const X87Pointers pointers(c, i);
  ANYKVM_TRY(run_native(c, i, operand.host));
  note_x87(c, i);
  if (!kept_its_result(c, i)) c.cpu.close_operand(operand, i.use);
  pointers.settle();
  return Result::ok;
}

/// The categories whose instructions only compute: no privilege, no control transfer, no hidden state.
bool computes(const Decoded& d) {
  switch (d.instruction.meta.category) {
    case ZYDIS_CATEGORY_ADOX_ADCX:
    case ZYDIS_CATEGORY_AES:
    case ZYDIS_CATEGORY_AVX:
    case ZYDIS_CATEGORY_AVX2:
    case ZYDIS_CATEGORY_AVX512:
    case ZYDIS_CATEGORY_AVX512_BITALG:
    case ZYDIS_CATEGORY_AVX512_VBMI:
    case ZYDIS_CATEGORY_AVX512_VP2INTERSECT:
    case ZYDIS_CATEGORY_BINARY:
    case ZYDIS_CATEGORY_BITBYTE:
    case ZYDIS_CATEGORY_BLEND:
    case ZYDIS_CATEGORY_BMI1:
    case ZYDIS_CATEGORY_BMI2:
    case ZYDIS_CATEGORY_BROADCAST:
    case ZYDIS_CATEGORY_CMOV:
    case ZYDIS_CATEGORY_COMPRESS:
    case ZYDIS_CATEGORY_CONFLICT:
    case ZYDIS_CATEGORY_CONVERT:
    case ZYDIS_CATEGORY_DATAXFER:
    case ZYDIS_CATEGORY_EXPAND:
    case ZYDIS_CATEGORY_FCMOV:
    case ZYDIS_CATEGORY_FLAGOP:
    case ZYDIS_CATEGORY_FP16:
    case ZYDIS_CATEGORY_GFNI:
    case ZYDIS_CATEGORY_IFMA:
    case ZYDIS_CATEGORY_KMASK:
    case ZYDIS_CATEGORY_LOGICAL:
    case ZYDIS_CATEGORY_LOGICAL_FP:
    case ZYDIS_CATEGORY_LZCNT:
    case ZYDIS_CATEGORY_MMX:
    case ZYDIS_CATEGORY_PCLMULQDQ:
    case ZYDIS_CATEGORY_RDRAND:
    case ZYDIS_CATEGORY_RDSEED:
    case ZYDIS_CATEGORY_ROTATE:
    case ZYDIS_CATEGORY_SEMAPHORE:
    case ZYDIS_CATEGORY_SETCC:
    case ZYDIS_CATEGORY_SHA:
    case ZYDIS_CATEGORY_SHIFT:
    case ZYDIS_CATEGORY_SSE:
    case ZYDIS_CATEGORY_STTNI:
    case ZYDIS_CATEGORY_VAES:
    case ZYDIS_CATEGORY_VBMI2:
    case ZYDIS_CATEGORY_VEX:
    case ZYDIS_CATEGORY_VFMA:
    case ZYDIS_CATEGORY_VPCLMULQDQ:
    case ZYDIS_CATEGORY_X87_ALU: break;
    default:
      switch (d.mnemonic()) {
        case ZYDIS_MNEMONIC_LFENCE:
        case ZYDIS_MNEMONIC_MFENCE:
        case ZYDIS_MNEMONIC_SFENCE: return true;
        default: return false;
      }
  }
  return d.instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_XOP &&
         d.instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_3DNOW;
}

/// AVX-512 comes in parts. (Zydis names a part's scalar and shorter vector forms one after the other.)
bool host_has_avx512(ZydisISASet set) {
  using x86::Feature;
  static constexpr struct {
    ZydisISASet first, last;
    Feature feature, also = Feature::avx512f;
  } parts[] = {
      {ZYDIS_ISA_SET_AVX512F_128, ZYDIS_ISA_SET_AVX512F_SCALAR, Feature::avx512f},
      {ZYDIS_ISA_SET_AVX512BW_128, ZYDIS_ISA_SET_AVX512BW_KOP, Feature::avx512bw},
      {ZYDIS_ISA_SET_AVX512CD_128, ZYDIS_ISA_SET_AVX512CD_512, Feature::avx512cd},
      {ZYDIS_ISA_SET_AVX512DQ_128, ZYDIS_ISA_SET_AVX512DQ_SCALAR, Feature::avx512dq},
      {ZYDIS_ISA_SET_AVX512_BF16_128, ZYDIS_ISA_SET_AVX512_BF16_512, Feature::avx512_bf16},
      {ZYDIS_ISA_SET_AVX512_BITALG_128, ZYDIS_ISA_SET_AVX512_BITALG_512, Feature::avx512_bitalg},
      {ZYDIS_ISA_SET_AVX512_FP16_128, ZYDIS_ISA_SET_AVX512_FP16_SCALAR, Feature::avx512_fp16},
      {ZYDIS_ISA_SET_AVX512_GFNI_128, ZYDIS_ISA_SET_AVX512_GFNI_512, Feature::avx512f, Feature::gfni},
      {ZYDIS_ISA_SET_AVX512_IFMA_128, ZYDIS_ISA_SET_AVX512_IFMA_512, Feature::avx512ifma},
      {ZYDIS_ISA_SET_AVX512_VAES_128, ZYDIS_ISA_SET_AVX512_VAES_512, Feature::avx512f, Feature::vaes},
      {ZYDIS_ISA_SET_AVX512_VBMI2_128, ZYDIS_ISA_SET_AVX512_VBMI2_512, Feature::avx512_vbmi2},
      {ZYDIS_ISA_SET_AVX512_VBMI_128, ZYDIS_ISA_SET_AVX512_VBMI_512, Feature::avx512vbmi},
      {ZYDIS_ISA_SET_AVX512_VNNI_128, ZYDIS_ISA_SET_AVX512_VNNI_512, Feature::avx512_vnni},
      {ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128, ZYDIS_ISA_SET_AVX512_VP2INTERSECT_512, Feature::avx512_vp2intersect},
      {ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_128, ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_512, Feature::avx512f, Feature::vpclmulqdq},
      {ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_128, ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_512, Feature::avx512_vpopcntdq},
  };
  for (const auto& part : parts)
    if (set >= part.first && set <= part.last) return x86::supports(part.feature) && x86::supports(part.also);
  return false;  // of the Xeon Phi
}

}  // namespace

bool host_has(const Decoded& d) {
  using x86::Feature, x86::supports;
  switch (d.instruction.meta.isa_ext) {
    case ZYDIS_ISA_EXT_BASE: return d.instruction.meta.isa_set != ZYDIS_ISA_SET_POPCNT || supports(Feature::popcnt);
    case ZYDIS_ISA_EXT_LONGMODE:
    case ZYDIS_ISA_EXT_MMX:
    case ZYDIS_ISA_EXT_SSE:
    case ZYDIS_ISA_EXT_SSE2:
    case ZYDIS_ISA_EXT_X87: return true;  // every 64-bit processor
    case ZYDIS_ISA_EXT_ADOX_ADCX: return supports(Feature::adx);
    case ZYDIS_ISA_EXT_AES: return supports(Feature::aes);
    case ZYDIS_ISA_EXT_AVX: return supports(Feature::avx);
    case ZYDIS_ISA_EXT_AVX2:
    case ZYDIS_ISA_EXT_AVX2GATHER: return supports(Feature::avx2);
    case ZYDIS_ISA_EXT_AVX512EVEX:
    case ZYDIS_ISA_EXT_AVX512VEX: return host_has_avx512(d.instruction.meta.isa_set);
    case ZYDIS_ISA_EXT_AVXAES: return supports(Feature::avx) && supports(Feature::aes);
    case ZYDIS_ISA_EXT_AVX_VNNI: return supports(Feature::avx_vnni);
    case ZYDIS_ISA_EXT_BMI1: return supports(Feature::bmi1);
    case ZYDIS_ISA_EXT_BMI2: return supports(Feature::bmi2);
    case ZYDIS_ISA_EXT_F16C: return supports(Feature::f16c);
    case ZYDIS_ISA_EXT_FMA: return supports(Feature::fma);
    case ZYDIS_ISA_EXT_GFNI: return supports(Feature::gfni);
    case ZYDIS_ISA_EXT_LZCNT: return supports(Feature::abm);
    case ZYDIS_ISA_EXT_MOVBE: return supports(Feature::movbe);
    case ZYDIS_ISA_EXT_PCLMULQDQ: return supports(Feature::pclmulqdq);
    case ZYDIS_ISA_EXT_RDRAND: return supports(Feature::rdrand);
    case ZYDIS_ISA_EXT_RDSEED: return supports(Feature::rdseed);
    case ZYDIS_ISA_EXT_SHA: return supports(Feature::sha);
    case ZYDIS_ISA_EXT_SSE3: return supports(Feature::sse3);
    case ZYDIS_ISA_EXT_SSE4: return supports(Feature::sse4_2);
    case ZYDIS_ISA_EXT_SSE4A: return supports(Feature::sse4a);
    case ZYDIS_ISA_EXT_SSSE3: return supports(Feature::ssse3);
    case ZYDIS_ISA_EXT_VAES: return supports(Feature::vaes);
    case ZYDIS_ISA_EXT_VPCLMULQDQ: return supports(Feature::vpclmulqdq);
    default: return false;
  }
}

bool runs_natively(const Decoded& d) { return computes(d) && host_has(d); }

/// Legacy SSE operands of 16 bytes must be aligned unless the instruction says otherwise; VEX and EVEX ones need not
/// unless it says so.
u8 required_alignment(const Decoded& d, Unit unit, unsigned memory_bytes) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_CMPXCHG16B: return 16;
    case ZYDIS_MNEMONIC_VMOVAPS:
    case ZYDIS_MNEMONIC_VMOVAPD:
    case ZYDIS_MNEMONIC_VMOVDQA:
    case ZYDIS_MNEMONIC_VMOVDQA32:
    case ZYDIS_MNEMONIC_VMOVDQA64:
    case ZYDIS_MNEMONIC_VMOVNTPS:
    case ZYDIS_MNEMONIC_VMOVNTPD:
    case ZYDIS_MNEMONIC_VMOVNTDQ:
    case ZYDIS_MNEMONIC_VMOVNTDQA: return u8(memory_bytes);
    case ZYDIS_MNEMONIC_MOVUPS:
    case ZYDIS_MNEMONIC_MOVUPD:
    case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_LDDQU:
    case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPESTRM:
    case ZYDIS_MNEMONIC_PCMPISTRI:
    case ZYDIS_MNEMONIC_PCMPISTRM: return 0;
    case ZYDIS_MNEMONIC_SHA1MSG1:
    case ZYDIS_MNEMONIC_SHA1MSG2:
    case ZYDIS_MNEMONIC_SHA1NEXTE:
    case ZYDIS_MNEMONIC_SHA1RNDS4:
    case ZYDIS_MNEMONIC_SHA256MSG1:
    case ZYDIS_MNEMONIC_SHA256MSG2:
    case ZYDIS_MNEMONIC_SHA256RNDS2: return host_is_amd() ? 0 : 16;  // AMD's do not check
    default: return (unit == Unit::sse || unit == Unit::mmx) && memory_bytes == 16 ? 16 : 0;
  }
}

/// Whether MXCSR.MM has the operand lie anywhere: not that of a move which says that it is aligned (AMD64 manual volume
/// 1, 4.2.2 and volume 4).
bool mxcsr_may_misalign(const Decoded& d, Unit unit) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_MOVAPS:
    case ZYDIS_MNEMONIC_MOVAPD:
    case ZYDIS_MNEMONIC_MOVDQA:
    case ZYDIS_MNEMONIC_MOVNTPS:
    case ZYDIS_MNEMONIC_MOVNTPD:
    case ZYDIS_MNEMONIC_MOVNTDQ:
    case ZYDIS_MNEMONIC_MOVNTDQA: return false;
    default: return unit == Unit::sse || unit == Unit::mmx;
  }
}

Result check_unit(Context& c, const Instruction& i) {
  const x86::CpuState& s = c.cpu.state;
  namespace xf = x86::xfeature;
  switch (i.unit) {
    case Unit::integer: return Result::ok;
    case Unit::x87:
      if (s.cr0 & (cr0::em | cr0::ts)) return c.cpu.raise(x86::exception::nm);
      break;
    case Unit::mmx:
      if (s.cr0 & cr0::em) return c.cpu.ud();
      break;
    case Unit::sse:
      if (s.cr0 & cr0::em || !(s.cr4 & cr4::osfxsr)) return c.cpu.ud();
      break;
    case Unit::avx:
    case Unit::avx512: {
      const u64 needed =
          i.unit == Unit::avx ? xf::sse | xf::avx : xf::sse | xf::avx | xf::opmask | xf::zmm_hi256 | xf::hi16_zmm;
      if (!(s.cr4 & cr4::osxsave) || (s.xcr0 & needed) != needed || !s.protected_mode() || s.v86()) return c.cpu.ud();
      break;
    }
  }
  if (s.cr0 & cr0::ts) return c.cpu.raise(x86::exception::nm);
  if (i.waits_for_x87 && x87_status(s) & 0x80) [[unlikely]]
    return c.cpu.raise(x86::exception::mf);
  return Result::ok;
}

bool make_native(const Decoded& d, Instruction& out, std::span<u8> code) {
  const EmitResult result =
      emit_native(d.instruction, {d.operands, d.instruction.operand_count}, out.bytes, out.code_bits, code);
  if (!result.emitted) return false;
  out.native = reinterpret_cast<NativeCode>(code.data());
  out.uses_mxcsr = result.uses_mxcsr;
  return true;
}

Handler select_native(const Decoded& d, Instruction& out, std::span<u8> code) {
  if (!runs_natively(d) || !make_native(d, out, code)) return nullptr;
  if (out.has_memory) {
    out.alignment = required_alignment(d, out.unit, out.memory_bytes);
    out.mxcsr_may_misalign = mxcsr_may_misalign(d, out.unit);
  }
  if (out.unit == Unit::integer) return out.has_memory ? integer_memory : integer_register;
  if (out.unit == Unit::mmx) out.waits_for_x87 = true;
  if (out.unit == Unit::x87) {
    out.waits_for_x87 = waits_for_x87(d.mnemonic());
    out.moves_x87_pointers = !is_x87_control(d.mnemonic());
    out.immediate = (d.instruction.opcode & 7) << 8 | out.bytes[d.instruction.raw.modrm.offset];
  }
  if (!out.has_memory) return unit_register;
  return select_masked(d, out) ?: unit_memory;
}

}  // namespace anykvm::engine
