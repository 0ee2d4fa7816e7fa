#include "engine/translate/analysis.h"

#include <bit>

#include "engine/translate/rewrite.h"

namespace anykvm::engine::translate {

namespace {

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

/// Operands that the renaming can express: general, vector and x87 registers, at most one ordinary memory operand.
bool operands_fit(const Decoded& d, bool x87, u8& vectors) {
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) vectors = all_vectors;
  unsigned memory = 0;
  u32 seen = 0, needed = 0;  // general registers, and those whose old value is needed
  bool high_byte = false;
  for (unsigned n = 0; n < d.instruction.operand_count; ++n) {
    const ZydisDecodedOperand& operand = d.operands[n];
    switch (operand.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER: {
        if (const int number = general_register(operand); number >= 0) {
          seen |= 1u << number;
          if (!is_overwritten(operand)) needed |= 1u << number;
          high_byte |= is_high_byte(operand) && operand.encoding != ZYDIS_OPERAND_ENCODING_NONE;
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
        ++memory;
        break;
      case ZYDIS_OPERAND_TYPE_IMMEDIATE: break;
      default: return false;
    }
  }
  const unsigned spilled = unsigned(std::popcount(seen >> 13));
  if (high_byte && (spilled || (!memory && seen >> x86::rsp & 1))) return false;  // AH-DH exclude REX
  if (memory > 1 || (memory && d.instruction.address_width != 64)) return false;
  // The second has the register that the address is made of.
  return spilled <= 1 || (spilled == 2 && (!memory || std::popcount(needed >> 13) <= 1));
}

Kind kind_of(const Decoded& d, bool supervisor, u8& vectors) {
  const ZydisDecodedInstruction& i = d.instruction;
  const bool far = i.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
  const bool wide = i.operand_width == 64;
  // Of an indirect operand, only what the address check can compute.
  const auto plain = [&](unsigned n) {
    return !d.is_memory(n) || (d.operands[n].mem.type == ZYDIS_MEMOP_TYPE_MEM && i.address_width == 64);
  };
  if (i.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE &&
      (near_branch_bytes(d) != 8 || i.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY))
    return Kind::step_and_end;
  if (is_hint(d)) return does_nothing(d) ? Kind::nothing : Kind::step_and_end;
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_JMP:
      if (far) return Kind::step_and_end;
      if (d.is_immediate(0)) return Kind::jump;
      return plain(0) && wide ? Kind::jump_indirect : Kind::step_and_end;
    case ZYDIS_MNEMONIC_CALL:
      if (far) return Kind::step_and_end;
      if (d.is_immediate(0)) return Kind::call;
      return plain(0) && wide ? Kind::call_indirect : Kind::step_and_end;
    case ZYDIS_MNEMONIC_RET: return far ? Kind::step_and_end : Kind::ret;
    case ZYDIS_MNEMONIC_PUSH:
      if (!wide) return Kind::step;
      if (d.is_memory(0)) return plain(0) ? Kind::push_memory : Kind::step;
      return d.is_immediate(0) || general_register(d.operands[0]) >= 0 ? Kind::push : Kind::step;
    case ZYDIS_MNEMONIC_POP:
      if (!wide || d.is_memory(0)) return Kind::step;
      return general_register(d.operands[0]) < 0 ? Kind::step_and_end : Kind::pop;
    case ZYDIS_MNEMONIC_LEAVE: return wide ? Kind::leave : Kind::step;
    case ZYDIS_MNEMONIC_LEA: return i.address_width == 64 ? Kind::lea : Kind::step;
    case ZYDIS_MNEMONIC_ENDBR64:
    case ZYDIS_MNEMONIC_ENDBR32: return Kind::nothing;
    case ZYDIS_MNEMONIC_PAUSE: return i.raw.rex.B ? Kind::step : Kind::nothing;
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
      if (!d.is_memory(0) || !d.is_register(1)) break;
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
    case ZYDIS_MNEMONIC_PUSHFQ: return Kind::push_flags;
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP: return Kind::read_time;
    default: break;
  }
  switch (i.meta.category) {
    case ZYDIS_CATEGORY_COND_BR: {
      const bool is_short = i.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i.opcode & 0xf0) == 0x70;
      const bool is_long = i.opcode_map == ZYDIS_OPCODE_MAP_0F && (i.opcode & 0xf0) == 0x80;
      const bool on_rcx = d.mnemonic() == ZYDIS_MNEMONIC_JRCXZ;
      return is_short || is_long || on_rcx ? Kind::jump_if : Kind::step_and_end;
    }
    default: break;
  }
  const bool encodable = i.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
                         i.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  const bool x87 = is_of_x87_unit(d);
  if (encodable && runs_natively(d) && !has_own_handler(d.mnemonic()) &&
      !(x87 && (replaces_x87_environment(d.mnemonic()) || !can_keep_x87())) && operands_fit(d, x87, vectors)) {
    if (may_need_mxcsr(d) && vectors < first_vectors) vectors = first_vectors;
    if (d.mnemonic() == ZYDIS_MNEMONIC_VZEROUPPER || d.mnemonic() == ZYDIS_MNEMONIC_VZEROALL) vectors = first_vectors;
    return Kind::native;
  }
  vectors = no_vectors;
  return may_continue(d) || runs_natively(d) ? Kind::step : Kind::step_and_end;
}

/// A shift or rotate whose immediate count comes down to 0 writes no flags, whatever the decoder's tables say.
bool shifts_by_nothing(const Decoded& d) {
  const ZydisDecodedInstruction& i = d.instruction;
  if (i.meta.category != ZYDIS_CATEGORY_SHIFT && i.meta.category != ZYDIS_CATEGORY_ROTATE) return false;
  const unsigned count = i.operand_count_visible - 1u;
  return d.is_immediate(count) && !(d.operands[count].imm.value.u & (i.operand_width == 64 ? 0x3f : 0x1f));
}

}  // namespace

bool has_repeat_prefix(const Decoded& d) {
  return d.instruction.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

bool is_quick(const Decoded& d) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_IRETQ: return true;
    case ZYDIS_MNEMONIC_SYSRET: return d.instruction.operand_width == 64;
    case ZYDIS_MNEMONIC_MOVSB:
    case ZYDIS_MNEMONIC_MOVSW:
    case ZYDIS_MNEMONIC_MOVSD:
    case ZYDIS_MNEMONIC_MOVSQ:
    case ZYDIS_MNEMONIC_STOSB:
    case ZYDIS_MNEMONIC_STOSW:
    case ZYDIS_MNEMONIC_STOSD:
    case ZYDIS_MNEMONIC_STOSQ:
      return d.instruction.meta.category == ZYDIS_CATEGORY_STRINGOP && d.instruction.address_width == 64 &&
             source_segment(d) < x86::fs;
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

Analysis analyse(const Decoded& d, bool supervisor) {
  Analysis result;
  result.kind = kind_of(d, supervisor, result.vectors);
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
  result.flags_read = flags->tested & all_flags;
  bool conditional = shifts_by_nothing(d);
  for (unsigned n = 0; n < d.instruction.operand_count; ++n)
    if (d.is_register(n) && d.register_class(n) == ZYDIS_REGCLASS_FLAGS &&
        d.operands[n].actions & ZYDIS_OPERAND_ACTION_CONDWRITE)
      conditional = true;
  const u32 written = (flags->modified | flags->set_0 | flags->set_1) & all_flags;
  // What is called undefined may in truth be kept: the old value counts as read.
  result.flags_read |= flags->undefined & all_flags;
  if (!conditional) result.flags_killed = written;
  return result;
}

}  // namespace anykvm::engine::translate
