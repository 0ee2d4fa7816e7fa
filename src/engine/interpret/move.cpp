// MOV in its forms, MOVZX/MOVSX, LEA, XLAT, and what does nothing.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
bool is_hint(const Decoded& d) {
  switch (d.instruction.meta.category) {
    case ZYDIS_CATEGORY_WIDENOP:
    case ZYDIS_CATEGORY_NOP:
    case ZYDIS_CATEGORY_PREFETCH:
    case ZYDIS_CATEGORY_PREFETCHWT1: return true;
    default: return false;
  }
}

bool does_nothing(const Decoded& d) {
  if (!is_hint(d)) return false;
  // 0F 0D with a register: a NOP for Intel, undefined for AMD.
  if (d.instruction.meta.category == ZYDIS_CATEGORY_WIDENOP)
    return d.instruction.opcode_map != ZYDIS_OPCODE_MAP_0F || d.instruction.opcode != 0x0d ||
           d.instruction.raw.modrm.mod != 3 || !host_is_amd();
  return d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;  // VEX-encoded prefetches: Knights Corner's only
}

namespace {

template <unsigned bytes>
Result move_register_register(Context& c, const Instruction& i) {
  write_register(c, i.reg[0], bytes, read_register(c, i.reg[1], bytes));
  return Result::ok;
}
template <unsigned bytes>
Result move_register_immediate(Context& c, const Instruction& i) {
  write_register(c, i.reg[0], bytes, u64(i.immediate));
  return Result::ok;
}
template <unsigned bytes>
Result move_register_memory(Context& c, const Instruction& i) {
  u64 value;
  ANYKVM_TRY(read_memory(c, i, bytes, value));
  write_register(c, i.reg[0], bytes, value);
  return Result::ok;
}
template <unsigned bytes>
Result move_memory_register(Context& c, const Instruction& i) {
  return write_memory(c, i, bytes, read_register(c, i.reg[0], bytes));
}
template <unsigned bytes>
Result move_memory_immediate(Context& c, const Instruction& i) {
  return write_memory(c, i, bytes, u64(i.immediate));
}

/// A0-A3: the address is an immediate of the address size.
Result move_from_absolute(Context& c, const Instruction& i) {
  Gva gva;
  u64 value = 0;
  ANYKVM_TRY(
      linear_address(c, i.segment, u64(i.immediate) & size_mask(i.address_bytes), i.memory_bytes, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, &value, i.memory_bytes));
  write_register(c, {x86::rax, 0}, i.memory_bytes, value);
  return Result::ok;
}
Result move_to_absolute(Context& c, const Instruction& i) {
  Gva gva;
  ANYKVM_TRY(
      linear_address(c, i.segment, u64(i.immediate) & size_mask(i.address_bytes), i.memory_bytes, Access::write, gva));
  return c.cpu.write(gva, &c.cpu.state.gpr[x86::rax], i.memory_bytes);
}

template <unsigned to, unsigned from, bool is_signed>
Result move_extended(Context& c, const Instruction& i) {
  u64 value;
  ANYKVM_TRY(read_operand(c, i, 1, from, value));
  if constexpr (is_signed) value = sign_extend(value, from);
  write_register(c, i.reg[0], to, value);
  return Result::ok;
}

template <bool is_signed>
Handler select_extended(const Decoded& d) {
  const unsigned to = d.bytes(0), from = d.bytes(1);
  if (from == 1)
    return to == 2   ? move_extended<2, 1, is_signed>
           : to == 4 ? move_extended<4, 1, is_signed>
                     : move_extended<8, 1, is_signed>;
  if (from == 2)
    return to == 2   ? move_extended<2, 2, is_signed>
           : to == 4 ? move_extended<4, 2, is_signed>
                     : move_extended<8, 2, is_signed>;
  return to == 2   ? move_extended<2, 4, is_signed>
         : to == 4 ? move_extended<4, 4, is_signed>
                   : move_extended<8, 4, is_signed>;
}

template <unsigned bytes>
Result load_effective_address(Context& c, const Instruction& i) {
  write_register(c, i.reg[0], bytes, effective_offset(c, i));
  return Result::ok;
}

Result move_to_segment(Context& c, const Instruction& i) {
  u64 selector;
  ANYKVM_TRY(read_operand(c, i, 1, 2, selector));
  const auto segment = x86::SegmentName(i.reg[0].index);
  if (segment == x86::cs) return c.cpu.ud();
  ANYKVM_TRY(c.cpu.load_segment(segment, u16(selector)));
  if (segment == x86::ss) c.cpu.state.event.shadow |= KVM_X86_SHADOW_INT_MOV_SS;
  return Result::ok;
}
Result move_from_segment(Context& c, const Instruction& i) {
  const u64 selector = c.cpu.state.segment[i.reg[i.has_memory ? 0 : 1].index].selector;
  if (i.has_memory) return write_memory(c, i, 2, selector);
  write_register(c, i.reg[0], i.operand_bytes, selector);
  return Result::ok;
}

Result load_far_pointer(Context& c, const Instruction& i) {
  Gva gva;
  u64 offset = 0;
  u16 selector = 0;
  ANYKVM_TRY(memory_address(c, i, i.operand_bytes + 2u, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, &offset, i.operand_bytes));
  ANYKVM_TRY(c.cpu.read(gva + i.operand_bytes, selector));
  const auto segment = x86::SegmentName(i.selector);
  ANYKVM_TRY(c.cpu.load_segment(segment, selector));
  write_register(c, i.reg[0], i.operand_bytes, offset);
  return Result::ok;
}

Result translate_byte(Context& c, const Instruction& i) {
  const u64* gpr = c.cpu.state.gpr;
  Gva gva;
  u8 value;
  ANYKVM_TRY(linear_address(c, i.segment, (gpr[x86::rbx] + u8(gpr[x86::rax])) & size_mask(i.address_bytes), 1,
                            Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, value));
  write_register(c, {x86::rax, 0}, 1, value);
  return Result::ok;
}

Result exchange_with_r8(Context& c, const Instruction& i) {
  const RegisterOperand rax{x86::rax, 0}, r8{x86::r8, 0};
  const u64 old = read_register(c, rax, i.operand_bytes);
  write_register(c, rax, i.operand_bytes, read_register(c, r8, i.operand_bytes));
  write_register(c, r8, i.operand_bytes, old);
  return Result::ok;
}

Handler select_far_pointer(Instruction& out, x86::SegmentName segment) {
  out.selector = segment;
  // AMD's processors have no far pointer with a 64-bit offset: REX.W says nothing.
  if (out.operand_bytes == 8 && host_is_amd()) out.operand_bytes = 4;
  return load_far_pointer;
}

#define ANYKVM_BY_SIZE(handler, bytes) \
  ((bytes) == 8 ? handler<8> : (bytes) == 4 ? handler<4> : (bytes) == 2 ? handler<2> : handler<1>)

Handler select_mov(const Decoded& d, Instruction& out) {
  if (d.is_register(0) && d.register_class(0) == ZYDIS_REGCLASS_SEGMENT) return move_to_segment;
  if (d.is_register(1) && d.register_class(1) == ZYDIS_REGCLASS_SEGMENT) return move_from_segment;
  if (d.is_register(0) &&
      (d.register_class(0) == ZYDIS_REGCLASS_CONTROL || d.register_class(0) == ZYDIS_REGCLASS_DEBUG))
    return nullptr;
  if (d.is_register(1) &&
      (d.register_class(1) == ZYDIS_REGCLASS_CONTROL || d.register_class(1) == ZYDIS_REGCLASS_DEBUG))
    return nullptr;
  const u8 opcode = d.instruction.opcode;
  if (d.instruction.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && opcode >= 0xa0 && opcode <= 0xa3)
    return opcode < 0xa2 ? move_from_absolute : move_to_absolute;
  const unsigned bytes = d.bytes(0);
  if (d.is_memory(0))
    return d.is_register(1) ? ANYKVM_BY_SIZE(move_memory_register, bytes)
                            : ANYKVM_BY_SIZE(move_memory_immediate, bytes);
  if (d.is_memory(1)) return ANYKVM_BY_SIZE(move_register_memory, bytes);
  (void)out;
  return d.is_register(1) ? ANYKVM_BY_SIZE(move_register_register, bytes)
                          : ANYKVM_BY_SIZE(move_register_immediate, bytes);
}

}  // namespace

Handler select_move(const Decoded& d, Instruction& out) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_MOV: return select_mov(d, out);
    case ZYDIS_MNEMONIC_MOVZX: return select_extended<false>(d);
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD: return select_extended<true>(d);
    case ZYDIS_MNEMONIC_LEA: return ANYKVM_BY_SIZE(load_effective_address, d.bytes(0));
    case ZYDIS_MNEMONIC_XLAT:
      out.segment = x86::ds;
      for (unsigned n = 0; n < d.instruction.operand_count; ++n)
        if (d.is_memory(n)) switch (d.operands[n].mem.segment) {
            case ZYDIS_REGISTER_ES: out.segment = x86::es; break;
            case ZYDIS_REGISTER_CS: out.segment = x86::cs; break;
            case ZYDIS_REGISTER_SS: out.segment = x86::ss; break;
            case ZYDIS_REGISTER_FS: out.segment = x86::fs; break;
            case ZYDIS_REGISTER_GS: out.segment = x86::gs; break;
            default: break;
          }
      return translate_byte;
    case ZYDIS_MNEMONIC_LDS: return select_far_pointer(out, x86::ds);
    case ZYDIS_MNEMONIC_LES: return select_far_pointer(out, x86::es);
    case ZYDIS_MNEMONIC_LSS: return select_far_pointer(out, x86::ss);
    case ZYDIS_MNEMONIC_LFS: return select_far_pointer(out, x86::fs);
    case ZYDIS_MNEMONIC_LGS: return select_far_pointer(out, x86::gs);
    default: break;
  }
  if (is_hint(d)) return does_nothing(d) ? no_operation : undefined;
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_PAUSE:  // with REX.B it is XCHG all the same, which Zydis does not know
      if (out.code_bits == 64 && d.instruction.raw.rex.B) return exchange_with_r8;
      return no_operation;
    case ZYDIS_MNEMONIC_RDSSPD:  // a NOP where there are no shadow stacks
    case ZYDIS_MNEMONIC_RDSSPQ:
    case ZYDIS_MNEMONIC_ENDBR32:
    case ZYDIS_MNEMONIC_ENDBR64: return no_operation;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
