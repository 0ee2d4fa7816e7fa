// From bytes to an Instruction: Zydis decodes, then the chapters choose who executes it.
#include <cstring>
#include <utility>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {

Result undefined(Context& c, const Instruction&) { return c.cpu.ud(); }
Result no_operation(Context&, const Instruction&) { return Result::ok; }

namespace {

Result too_long(Context& c, const Instruction&) { return c.cpu.gp(); }

s8 gpr_number(ZydisRegister reg) {
  if (reg == ZYDIS_REGISTER_NONE) return Instruction::no_register;
  if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP) return Instruction::rip_relative;
  return s8(ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg)));
}

bool is_high_byte(ZydisRegister reg) { return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH; }

x86::SegmentName segment_of(ZydisRegister reg) {
  switch (reg) {
    case ZYDIS_REGISTER_ES: return x86::es;
    case ZYDIS_REGISTER_CS: return x86::cs;
    case ZYDIS_REGISTER_SS: return x86::ss;
    case ZYDIS_REGISTER_FS: return x86::fs;
    case ZYDIS_REGISTER_GS: return x86::gs;
    default: return x86::ds;
  }
}

void fill_operands(const Decoded& d, Instruction& out) {
  unsigned registers = 0;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    const ZydisDecodedOperand& operand = d.operands[n];
    if (operand.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN && !(d.is_memory(n) && is_mask_move(d.mnemonic())))
      continue;
    switch (operand.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER:
        if (registers < 2) {
          const ZydisRegisterClass kind = d.register_class(n);
          RegisterOperand& reg = out.reg[registers++];
          if (kind == ZYDIS_REGCLASS_GPR8 || kind == ZYDIS_REGCLASS_GPR16 || kind == ZYDIS_REGCLASS_GPR32 ||
              kind == ZYDIS_REGCLASS_GPR64)
            reg = {u8(gpr_number(operand.reg.value)), is_high_byte(operand.reg.value)};
          else
            reg = {u8(d.register_id(n)), 0};
        }
        break;
      case ZYDIS_OPERAND_TYPE_MEMORY: {
        const bool read = operand.actions & ZYDIS_OPERAND_ACTION_MASK_READ;
        const bool write = operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
        out.has_memory = true;
        out.segment = segment_of(operand.mem.segment);
        out.base = gpr_number(operand.mem.base);
        out.index = gpr_number(operand.mem.index);
        out.scale_shift = u8(operand.mem.scale == 8 ? 3 : operand.mem.scale == 4 ? 2 : operand.mem.scale == 2 ? 1 : 0);
        out.displacement = s32(operand.mem.disp.value);
        out.memory_bytes = u8(operand.size / 8 > 255 ? 255 : operand.size / 8);
        out.use = read && write ? Cpu::Use::read_write : write ? Cpu::Use::write : Cpu::Use::read;
        if (operand.mem.disp.has_displacement && operand.mem.base == ZYDIS_REGISTER_NONE &&
            operand.mem.index == ZYDIS_REGISTER_NONE)
          out.immediate = operand.mem.disp.value;  // MOV's 64-bit absolute address
        break;
      }
      case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        out.immediate = operand.imm.is_signed ? operand.imm.value.s : s64(operand.imm.value.u);
        break;
      case ZYDIS_OPERAND_TYPE_POINTER:
        out.selector = operand.ptr.segment;
        out.immediate = operand.ptr.offset;
        break;
      default: break;
    }
  }
}

}  // namespace

Unit unit_of(const Decoded& d) {
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) return Unit::avx512;
  bool vector = false, mmx = false, mask = false;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    if (!d.is_register(n)) continue;
    switch (d.register_class(n)) {
      case ZYDIS_REGCLASS_MMX: mmx = true; break;
      case ZYDIS_REGCLASS_XMM:
      case ZYDIS_REGCLASS_YMM:
      case ZYDIS_REGCLASS_ZMM: vector = true; break;
      case ZYDIS_REGCLASS_MASK: mask = true; break;
      default: break;
    }
  }
  if (mask) return Unit::avx512;
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && vector) return Unit::avx;
  if (mmx || d.instruction.meta.isa_ext == ZYDIS_ISA_EXT_MMX) return Unit::mmx;
  switch (d.mnemonic()) {  // from memory to a general register, rounded as MXCSR says
    case ZYDIS_MNEMONIC_CVTSS2SI:
    case ZYDIS_MNEMONIC_CVTSD2SI:
    case ZYDIS_MNEMONIC_CVTTSS2SI:
    case ZYDIS_MNEMONIC_CVTTSD2SI: return Unit::sse;
    case ZYDIS_MNEMONIC_VCVTSS2SI:
    case ZYDIS_MNEMONIC_VCVTSD2SI:
    case ZYDIS_MNEMONIC_VCVTTSS2SI:
    case ZYDIS_MNEMONIC_VCVTTSD2SI: return Unit::avx;
    default: break;
  }
  if (vector) return Unit::sse;
  if (is_x87_instruction(d.instruction)) return Unit::x87;
  return Unit::integer;
}

DecodeStatus decode(const u8* bytes, unsigned available, unsigned code_bits, Instruction& out, std::span<u8> code) {
  Decoded d;
  out = Instruction{};
  const ZyanStatus status = decode_instruction(bytes, available, code_bits, d);
  // Of no mode until it is whole: the bytes that are missing may be where the host lets nobody read.
  if (status == ZYDIS_STATUS_NO_MORE_DATA && available < 15) return DecodeStatus::needs_more;
  out.code_bits = u8(code_bits);
  if (!ZYAN_SUCCESS(status)) {
    out.length = u8(available < 15 ? available : 15);
    std::memcpy(out.bytes, bytes, out.length);
    out.handler =
        status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG || status == ZYDIS_STATUS_NO_MORE_DATA ? too_long : undefined;
    return DecodeStatus::ok;
  }
  out.length = d.instruction.length;
  std::memcpy(out.bytes, bytes, out.length);
  out.operand_bytes = u8(d.instruction.operand_width / 8);
  out.address_bytes = u8(d.instruction.address_width / 8);
  if (d.instruction.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE)) out.repeat = Repeat::while_equal;
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_REPNE) out.repeat = Repeat::while_not_equal;
  fill_operands(d, out);
  out.unit = unit_of(d);
  out.repeatable = is_repeatable(d);

  for (const auto select : {select_move, select_stack, select_branch, select_string, select_io, select_decimal,
                            select_system, select_state, select_x87, select_gather}) {
    out.handler = select(d, out);
    if (!out.handler) continue;
    if (!may_reach_devices(d, out.unit)) out.behind_bar = std::exchange(out.handler, without_devices);
    return DecodeStatus::ok;
  }
  out.bars_devices = !may_reach_devices(d, out.unit);
  out.handler = select_bits(d, out, code);
  if (!out.handler) out.handler = select_native(d, out, code);
  if (!out.handler) out.handler = undefined;
  return DecodeStatus::ok;
}

}  // namespace anykvm::engine
