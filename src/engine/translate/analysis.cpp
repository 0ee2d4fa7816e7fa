#include "engine/translate/analysis.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace anykvm::engine::translate {

namespace {

/// The number of a general register operand, or -1.
int general_register(const ZydisDecodedOperand& operand) {
  if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) return -1;
  switch (ZydisRegisterGetClass(operand.reg.value)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
      return ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, operand.reg.value));
    default: return -1;
  }
}

bool is_high_byte(const ZydisDecodedOperand& operand) {
  return operand.type == ZYDIS_OPERAND_TYPE_REGISTER && operand.reg.value >= ZYDIS_REGISTER_AH &&
         operand.reg.value <= ZYDIS_REGISTER_BH;
}

/// Instructions of the native categories that nevertheless have a handler of their own: they touch state beyond the
/// registers or choose what memory they touch.
bool has_own_handler(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_CLD:
    case ZYDIS_MNEMONIC_STD:
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_XLAT:
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_STMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
    case ZYDIS_MNEMONIC_VSTMXCSR:
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ: return true;
    default: return false;
  }
}

/// Handled by the reference engine without leaving the block: they change nothing that a block depends on.
bool may_continue(const Decoded& d) {
  switch (d.instruction.meta.category) {
    case ZYDIS_CATEGORY_STRINGOP:
    case ZYDIS_CATEGORY_X87_ALU:
    case ZYDIS_CATEGORY_FCMOV:
    case ZYDIS_CATEGORY_MMX:
    case ZYDIS_CATEGORY_BITBYTE:
    case ZYDIS_CATEGORY_BINARY:
    case ZYDIS_CATEGORY_XSAVE:
    case ZYDIS_CATEGORY_XSAVEOPT: return true;
    default: break;
  }
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_STD:
    case ZYDIS_MNEMONIC_RDMSR:
    case ZYDIS_MNEMONIC_VERW:
    case ZYDIS_MNEMONIC_RDGSBASE:
    case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE:
    case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_PUSHAD:
    case ZYDIS_MNEMONIC_POPAD:
    case ZYDIS_MNEMONIC_RDPID:
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_STMXCSR: return true;
    default: return false;
  }
}

/// x87 instructions that change what waits or the environment as a whole: for the reference engine.
bool replaces_x87_environment(ZydisMnemonic mnemonic) {
  return mnemonic != ZYDIS_MNEMONIC_FLDCW && mnemonic != ZYDIS_MNEMONIC_FNSTCW && mnemonic != ZYDIS_MNEMONIC_FNSTSW &&
         is_x87_control(mnemonic);
}

/// Conversions from memory to general and MMX registers name no vector register, but round as MXCSR says.
bool may_need_mxcsr(const Decoded& d) {
  const Unit unit = unit_of(d);
  return unit == Unit::sse || unit == Unit::avx ||
         (unit == Unit::mmx && d.instruction.meta.isa_ext != ZYDIS_ISA_EXT_MMX);
}

bool is_of_x87_unit(const Decoded& d) {
  const Unit unit = unit_of(d);
  return unit == Unit::x87 || unit == Unit::mmx;
}

/// Operands that the renaming can express, whichever registers they are: general, vector and x87 registers, at most one
/// ordinary memory operand.
bool operands_fit(const Decoded& d, CodeKind code, bool x87, u8& vectors) {
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) vectors = all_vectors;
  unsigned memory = 0, general = 0;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    const ZydisDecodedOperand& operand = d.operands[n];
    switch (operand.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER: {
        if (general_register(operand) >= 0) {
          if (++general > GuestInstruction::most_registers) return false;
          break;
        }
        switch (ZydisRegisterGetClass(operand.reg.value)) {
          case ZYDIS_REGCLASS_XMM:
          case ZYDIS_REGCLASS_YMM:
            if (vectors < first_vectors) vectors = first_vectors;
            break;
          case ZYDIS_REGCLASS_ZMM:
          case ZYDIS_REGCLASS_MASK: vectors = all_vectors; break;
          case ZYDIS_REGCLASS_FLAGS: break;
          default:  // the stack, MMX, and the words of the x87 unit
            if (!x87) return false;
        }
        break;
      }
      case ZYDIS_OPERAND_TYPE_MEMORY:
        if (operand.mem.type != ZYDIS_MEMOP_TYPE_MEM || operand.encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM)
          return false;
        if (operand.size > 512 || operand.size == 0) return false;
        if (code.narrow && operand.mem.segment == ZYDIS_REGISTER_CS) return false;  // it may not be readable
        ++memory;
        break;
      case ZYDIS_OPERAND_TYPE_IMMEDIATE: break;
      default: return false;
    }
  }
  return memory == 0 || (memory == 1 && d.instruction.address_width == code.bits());
}

/// Whether 64-bit mode takes the bytes of 32-bit code for the same instruction, wherever its memory operand lies.
bool means_the_same(const Decoded& d, const u8* bytes) {
  Decoded wide;
  if (!ZYAN_SUCCESS(decode_instruction(bytes, d.instruction.length, 64, wide)) || wide.mnemonic() != d.mnemonic() ||
      wide.instruction.length != d.instruction.length || wide.instruction.operand_count != d.instruction.operand_count)
    return false;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    const ZydisDecodedOperand &left = d.operands[n], &right = wide.operands[n];
    if (left.type != right.type || left.encoding != right.encoding || left.actions != right.actions) return false;
    if (d.is_register(n) && d.register_class(n) == ZYDIS_REGCLASS_FLAGS) continue;
    if (left.size != right.size || (d.is_register(n) && left.reg.value != right.reg.value)) return false;
  }
  // They clear as many registers as the mode has.
  return d.mnemonic() != ZYDIS_MNEMONIC_VZEROUPPER && d.mnemonic() != ZYDIS_MNEMONIC_VZEROALL;
}

/// Whether there are host registers for those that the instruction names.
bool registers_fit(const GuestInstruction& g) {
  u32 seen = 0, needed = 0;  // and those whose old value is needed
  bool high_byte = false;
  for (const GeneralOperand& reg : g.general()) {
    seen |= 1u << reg.number;
    if (!reg.is_overwritten) needed |= 1u << reg.number;
    high_byte |= reg.is_high && reg.field != Field::implicit;
  }
  if (!(seen >> 13) && !high_byte) return true;
  const unsigned spilled = unsigned(std::popcount(seen >> 13));
  if (high_byte && (spilled || (!g.has_memory && seen >> x86::rsp & 1))) return false;  // AH-DH exclude REX
  // The second has the register that the address is made of.
  return spilled <= 1 || (spilled == 2 && (!g.has_memory || std::popcount(needed >> 13) <= 1));
}

/// Of one element or more, and both segments without a base or a limit.
bool is_plain_string(const Decoded& d, CodeKind code) {
  return d.instruction.meta.category == ZYDIS_CATEGORY_STRINGOP && d.instruction.address_width == code.bits() &&
         source_segment(d) < x86::fs && (!code.narrow || source_segment(d) != x86::cs);
}

bool is_repeated(const ZydisDecodedInstruction& i) {
  return i.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

Kind kind_of(const Decoded& d, const u8* bytes, CodeKind code, u8& vectors) {
  const bool supervisor = code.supervisor;
  const ZydisDecodedInstruction& i = d.instruction;
  const bool far = i.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
  const bool word = i.operand_width == code.bits();
  // Of an indirect operand, only what the address check can compute.
  const auto plain = [&](unsigned n) {
    const ZydisDecodedOperandMem& mem = d.operands[n].mem;
    return !d.is_memory(n) || (mem.type == ZYDIS_MEMOP_TYPE_MEM && i.address_width == code.bits() &&
                               (!code.narrow || mem.segment != ZYDIS_REGISTER_CS));
  };
  const bool whole_target = code.narrow ? !(i.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE) : near_branch_bytes(d) == 8;
  if (i.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE &&
      (!whole_target || i.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY))
    return Kind::step_and_end;
  if (is_hint(d)) return does_nothing(d) ? Kind::nothing : Kind::step_and_end;
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_JMP:
      if (far) return Kind::step_and_end;
      if (d.is_immediate(0)) return Kind::jump;
      return plain(0) && word ? Kind::jump_indirect : Kind::step_and_end;
    case ZYDIS_MNEMONIC_CALL:
      if (far) return Kind::step_and_end;
      if (d.is_immediate(0)) return Kind::call;
      return plain(0) && word ? Kind::call_indirect : Kind::step_and_end;
    case ZYDIS_MNEMONIC_RET: return far || !whole_target ? Kind::step_and_end : Kind::ret;
    case ZYDIS_MNEMONIC_PUSH:
      if (!word) return Kind::step;
      if (d.is_memory(0)) return plain(0) ? Kind::push_memory : Kind::step;
      return d.is_immediate(0) || general_register(d.operands[0]) >= 0 ? Kind::push : Kind::step;
    case ZYDIS_MNEMONIC_POP:
      if (!word || d.is_memory(0)) return Kind::step;
      return general_register(d.operands[0]) < 0 ? Kind::step_and_end : Kind::pop;
    case ZYDIS_MNEMONIC_LEAVE: return word ? Kind::leave : Kind::step;
    case ZYDIS_MNEMONIC_LEA: return i.address_width == code.bits() ? Kind::lea : Kind::step;
    case ZYDIS_MNEMONIC_ENDBR64:
    case ZYDIS_MNEMONIC_ENDBR32: return Kind::nothing;
    case ZYDIS_MNEMONIC_PAUSE: return i.raw.rex.B ? Kind::step : Kind::nothing;
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
      if (!d.is_memory(0) || !d.is_register(1)) break;
      if (code.narrow && ZydisRegisterGetId(d.operands[0].mem.segment) >= x86::fs) return Kind::step;
      return plain(0) && i.operand_width >= 32 ? Kind::bit_string : Kind::step;
    case ZYDIS_MNEMONIC_MOV:
      if (d.is_register(0) && general_register(d.operands[0]) >= 0 && d.is_register(1) &&
          d.register_class(1) == ZYDIS_REGCLASS_SEGMENT)
        return Kind::move_from_segment;
      break;
    case ZYDIS_MNEMONIC_CLD: return Kind::clear_flag;
    case ZYDIS_MNEMONIC_CLI: return supervisor ? Kind::clear_flag : Kind::step;
    case ZYDIS_MNEMONIC_STI: return supervisor ? Kind::set_interrupt : Kind::step_and_end;
    case ZYDIS_MNEMONIC_SWAPGS: return supervisor ? Kind::swap_gs : Kind::step;
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC: return supervisor ? Kind::set_access_check : Kind::step_and_end;
    case ZYDIS_MNEMONIC_VERW: return d.is_memory(0) && plain(0) ? Kind::verify_write : Kind::step;
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ: return word ? Kind::push_flags : Kind::step;
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP: return Kind::read_time;
    default: break;
  }
  switch (i.meta.category) {
    case ZYDIS_CATEGORY_COND_BR: {
      const bool is_short = i.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i.opcode & 0xf0) == 0x70;
      const bool is_long = i.opcode_map == ZYDIS_OPCODE_MAP_0F && (i.opcode & 0xf0) == 0x80;
      const bool on_rcx = d.mnemonic() == (code.narrow ? ZYDIS_MNEMONIC_JECXZ : ZYDIS_MNEMONIC_JRCXZ);
      return is_short || is_long || on_rcx ? Kind::jump_if : Kind::step_and_end;
    }
    case ZYDIS_CATEGORY_STRINGOP:
      if (is_plain_string(d, code) && !is_repeated(i)) return Kind::string;
      break;
    default: break;
  }
  const bool encodable = i.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
                         i.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  const bool x87 = is_of_x87_unit(d);
  if (encodable && runs_natively(d) && !has_own_handler(d.mnemonic()) &&
      !(x87 && (replaces_x87_environment(d.mnemonic()) || !can_keep_x87())) && operands_fit(d, code, x87, vectors) &&
      (!code.narrow || means_the_same(d, bytes))) {
    if (may_need_mxcsr(d) && vectors < first_vectors) vectors = first_vectors;
    if (d.mnemonic() == ZYDIS_MNEMONIC_VZEROUPPER || d.mnemonic() == ZYDIS_MNEMONIC_VZEROALL) vectors = first_vectors;
    return Kind::native;
  }
  vectors = no_vectors;
  return may_continue(d) || runs_natively(d) ? Kind::step : Kind::step_and_end;
}

/// Of a shift or rotate by an immediate: which bits of it count.
u8 count_mask(const Decoded& d) {
  const ZydisDecodedInstruction& i = d.instruction;
  if (i.meta.category != ZYDIS_CATEGORY_SHIFT && i.meta.category != ZYDIS_CATEGORY_ROTATE) return 0;
  if (!d.is_immediate(i.operand_count_visible - 1u) || !i.raw.imm[0].size) return 0;
  return i.operand_width == 64 ? 0x3f : 0x1f;
}

bool is_quick(const Decoded& d, CodeKind code) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_IRETD: return code.narrow;
    case ZYDIS_MNEMONIC_SYSCALL: return !code.narrow;
    case ZYDIS_MNEMONIC_IRETQ: return true;
    case ZYDIS_MNEMONIC_SYSRET: return d.instruction.operand_width == 64;
    case ZYDIS_MNEMONIC_MOVSB:
    case ZYDIS_MNEMONIC_MOVSW:
    case ZYDIS_MNEMONIC_MOVSD:
    case ZYDIS_MNEMONIC_MOVSQ:
    case ZYDIS_MNEMONIC_STOSB:
    case ZYDIS_MNEMONIC_STOSW:
    case ZYDIS_MNEMONIC_STOSD:
    case ZYDIS_MNEMONIC_STOSQ: return is_plain_string(d, code);
    default: return false;
  }
}

bool sees_x87(const Decoded& d) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_INVALID:
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64:
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64:
    case ZYDIS_MNEMONIC_XSAVEOPT:
    case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVES:
    case ZYDIS_MNEMONIC_XSAVES64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_XRSTORS:
    case ZYDIS_MNEMONIC_XRSTORS64:
    case ZYDIS_MNEMONIC_XGETBV:  // of index 1: which components are in use
    case ZYDIS_MNEMONIC_RSM: return true;
    default: return is_of_x87_unit(d);
  }
}

Analysis what_of(const Decoded& d, const u8* bytes, CodeKind code) {
  Analysis result = one_step;
  result.kind = kind_of(d, bytes, code, result.vectors);
  result.x87 = result.kind == Kind::native && is_of_x87_unit(d);
  switch (result.kind) {
    case Kind::step:
    case Kind::want_vectors:
    case Kind::push_flags:
    case Kind::step_and_end:
      if (d.mnemonic() == ZYDIS_MNEMONIC_SYSRET || d.mnemonic() == ZYDIS_MNEMONIC_IRETQ)
        result.flags_read = 0, result.flags_killed = all_flags;
      return result;  // the flags go into the state: all others read all
    case Kind::nothing:
    case Kind::lea:
    case Kind::push:
    case Kind::pop:
    case Kind::leave:
    case Kind::push_memory:
    case Kind::move_from_segment:
    case Kind::clear_flag:
    case Kind::set_interrupt:
    case Kind::swap_gs:
    case Kind::verify_write:
    case Kind::set_access_check:
    case Kind::read_time:
    case Kind::jump:
    case Kind::call:
    case Kind::jump_indirect:
    case Kind::call_indirect:
    case Kind::ret: result.flags_read = 0; return result;
    default: break;
  }
  const ZydisAccessedFlags* flags = d.instruction.cpu_flags;
  if (!flags) {
    result.flags_read = 0;
    return result;
  }
  u32 read = flags->tested & all_flags;
  bool conditional = false;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n)
    if (d.is_register(n) && d.register_class(n) == ZYDIS_REGCLASS_FLAGS &&
        d.operands[n].actions & ZYDIS_OPERAND_ACTION_CONDWRITE)
      conditional = true;
  const u32 written = (flags->modified | flags->set_0 | flags->set_1) & all_flags;
  // What is called undefined may in truth be kept: the old value counts as read.
  read |= flags->undefined & all_flags;
  result.flags_read = u16(read);
  if (!conditional) result.flags_killed = u16(written);
  return result;
}

Field field_of(const ZydisDecodedOperand& operand) {
  switch (operand.encoding) {
    case ZYDIS_OPERAND_ENCODING_MODRM_REG: return Field::reg;
    case ZYDIS_OPERAND_ENCODING_MODRM_RM: return Field::rm;
    case ZYDIS_OPERAND_ENCODING_OPCODE: return Field::opcode;
    case ZYDIS_OPERAND_ENCODING_NDSNDD: return Field::vvvv;
    default: return Field::implicit;
  }
}

MemoryOperand memory_of(const ZydisDecodedOperand& operand) {
  const auto& mem = operand.mem;
  const bool on_rip = mem.base == ZYDIS_REGISTER_RIP, is_accessed = mem.type != ZYDIS_MEMOP_TYPE_AGEN;
  return {.base = mem.base == ZYDIS_REGISTER_NONE || on_rip ? s8(-1) : s8(ZydisRegisterGetId(mem.base)),
          .index = mem.index == ZYDIS_REGISTER_NONE ? s8(-1) : s8(ZydisRegisterGetId(mem.index)),
          .shift = u8(mem.index == ZYDIS_REGISTER_NONE ? 0 : std::countr_zero(unsigned(mem.scale))),
          .segment = is_accessed ? u8(ZydisRegisterGetId(mem.segment)) : u8(x86::ds),
          .displacement = s32(mem.disp.value),
          .bytes = u16(is_accessed ? operand.size / 8 : 0),
          .is_rip_relative = on_rip,
          .is_written = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0};
}

/// Where the parts of the instruction lie, and what of them needs no operands.
void lay_out(const ZydisDecodedInstruction& i, const u8* bytes, CodeKind code, GuestInstruction& out) {
  for (;; ++out.opcode_at) {
    const u8 byte = bytes[out.opcode_at];
    if (!code.narrow && (byte & 0xf0) == 0x40)
      out.rex = byte;
    else if (is_legacy_prefix(byte))
      out.rex = 0;
    else
      break;
  }
  if (i.attributes & ZYDIS_ATTRIB_HAS_MODRM) {
    out.modrm_at = i.raw.modrm.offset;
    out.tail_at = u8(out.modrm_at + 1 + (i.attributes & ZYDIS_ATTRIB_HAS_SIB ? 1 : 0) + i.raw.disp.size / 8);
  } else {
    out.tail_at = u8(out.opcode_at + (bytes[out.opcode_at] == 0x0f ? 2 : 1));
  }
  out.immediate = last_immediate(bytes + out.tail_at, unsigned(i.length - out.tail_at));
}

}  // namespace

s32 last_immediate(const u8* tail, unsigned bytes) {
  switch (bytes) {
    case 1: return s8(*tail);
    case 2: {
      s16 value;
      std::memcpy(&value, tail, sizeof value);
      return value;
    }
    case 4:
    case 8: {
      s32 value;
      std::memcpy(&value, tail, sizeof value);
      return value;
    }
    default: return 0;  // there is none, or one that nobody looks at
  }
}

void analyse(const Decoded& d, const u8* bytes, CodeKind code, GuestInstruction& out) {
  const ZydisDecodedInstruction& i = d.instruction;
  out = {};
  out.what = what_of(d, bytes, code);
  out.mnemonic = u16(i.mnemonic);
  out.length = i.length;
  out.encoding = i.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX    ? Encoding::vex
                 : i.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX ? Encoding::evex
                                                                 : Encoding::legacy;
  out.opcode = i.opcode;
  out.opcode_map = u8(i.opcode_map);
  lay_out(i, bytes, code, out);
  out.width = u8(std::min(d.operands[0].size / 8, 64));
  for (unsigned n = 0; n < i.operand_count; ++n) {
    const ZydisDecodedOperand& operand = d.operands[n];
    if (const int number = general_register(operand); number >= 0 && out.register_count < out.most_registers) {
      out.registers[out.register_count++] = {
          .number = u8(number & 15),
          .is_byte = operand.size == 8,
          .is_high = is_high_byte(operand),
          .is_written = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0,
          .is_overwritten = operand.actions == ZYDIS_OPERAND_ACTION_WRITE && operand.size >= 32,
          .field = field_of(operand)};
    } else if (d.is_memory(n) && operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
      out.has_memory = true;
      out.memory = memory_of(operand);
    }
  }
  out.has_immediate = d.is_immediate(0) && d.operands[0].visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT;
  out.count_mask = count_mask(d);
  if (out.what.kind == Kind::native && out.width * 8 == code.bits() && general_register(d.operands[0]) >= 0 &&
      d.is_immediate(1))
    out.adds = d.mnemonic() == ZYDIS_MNEMONIC_ADD ? 1 : d.mnemonic() == ZYDIS_MNEMONIC_SUB ? -1 : 0;
  out.is_quick = is_quick(d, code);
  out.is_repeated = is_repeated(i);
  out.is_locked = i.attributes & ZYDIS_ATTRIB_HAS_LOCK;
  out.is_repeatable = is_repeatable(d);
  out.sees_x87 = sees_x87(d);
  out.moves_x87_pointers =
      unit_of(d) == Unit::x87 && !is_x87_control(d.mnemonic()) && d.mnemonic() != ZYDIS_MNEMONIC_FWAIT;
}

void settle(GuestInstruction& out) {
  Analysis& what = out.what;
  if (what.kind != Kind::native) return;
  if (!registers_fit(out))
    what = {.kind = Kind::step, .vectors = no_vectors, .x87 = false, .flags_read = all_flags, .flags_killed = 0};
  // Whatever the decoder's tables say, no flags are written then.
  else if (out.count_mask && !(out.immediate & out.count_mask))
    what.flags_killed = 0;
}

}  // namespace anykvm::engine::translate
