// Control transfer: JMP, Jcc, CALL, RET, LOOP, far transfers, software interrupts, IRET, SYSCALL and its kin.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

namespace flag = x86::flag;

/// Whether a Jcc/SETcc condition code (the opcode's low nibble) holds.
template <unsigned condition>
bool holds(const Context& c) {
  const unsigned flags = c.cpu.state.arithmetic;  // ah << 8 | OF
  const bool of = flags & 1, cf = flags >> 8 & 1, pf = flags >> 10 & 1, zf = flags >> 14 & 1, sf = flags >> 15 & 1;
  bool result = false;
  switch (condition >> 1) {
    case 0: result = of; break;
    case 1: result = cf; break;
    case 2: result = zf; break;
    case 3: result = cf || zf; break;
    case 4: result = sf; break;
    case 5: result = pf; break;
    case 6: result = sf != of; break;
    default: result = zf || sf != of; break;
  }
  return result != (condition & 1);
}

u64 relative_target(const Context& c, const Instruction& i) {
  return (c.next_rip + u64(i.immediate)) & size_mask(i.operand_bytes);
}

template <unsigned condition>
Result jump_if(Context& c, const Instruction& i) {
  return holds<condition>(c) ? branch(c, relative_target(c, i)) : Result::ok;
}
Result jump_relative(Context& c, const Instruction& i) { return branch(c, relative_target(c, i)); }
Result jump_indirect(Context& c, const Instruction& i) {
  u64 target;
  ANYKVM_TRY(read_operand(c, i, 0, i.operand_bytes, target));
  return branch(c, target);
}

Result call_to(Context& c, const Instruction& i, u64 target) {
  // A stack that cannot be written to is found before a target that cannot be gone to, which leaves it as it is.
  if (check_branch(c, target) != Result::ok) [[unlikely]] {
    const u64 top = (c.cpu.state.gpr[x86::rsp] - i.operand_bytes) & size_mask(stack_bytes(c));
    Gva gva;
    x86::Operand room;
    ANYKVM_TRY(linear_address(c, x86::ss, top, i.operand_bytes, Access::write, gva));
    ANYKVM_TRY(c.cpu.open_operand(gva, i.operand_bytes, Cpu::Use::write, room));
    return check_branch(c, target);
  }
  ANYKVM_TRY(push(c, i.operand_bytes, c.next_rip));
  c.next_rip = target;
  return Result::ok;
}
Result call_relative(Context& c, const Instruction& i) { return call_to(c, i, relative_target(c, i)); }
Result call_indirect(Context& c, const Instruction& i) {
  u64 target;
  ANYKVM_TRY(read_operand(c, i, 0, i.operand_bytes, target));
  return call_to(c, i, target);
}
Result return_near(Context& c, const Instruction& i) {
  u64 target;
  ANYKVM_TRY(peek(c, 0, i.operand_bytes, target));
  ANYKVM_TRY(branch(c, target));
  set_stack_pointer(c, c.cpu.state.gpr[x86::rsp] + i.operand_bytes + u16(i.immediate));
  return Result::ok;
}

/// LOOP, LOOPE, LOOPNE: `condition` is the flag ZF must have, 2 for LOOP.
template <unsigned wanted_zf>
Result loop(Context& c, const Instruction& i) {
  const RegisterOperand counter{x86::rcx, 0};
  const u64 count = (read_register(c, counter, i.address_bytes) - 1) & size_mask(i.address_bytes);
  const bool zf = c.cpu.state.arithmetic >> 14 & 1;
  const bool taken = count && (wanted_zf == 2 || zf == bool(wanted_zf));
  if (taken) ANYKVM_TRY(check_branch(c, relative_target(c, i)));
  write_register(c, counter, i.address_bytes, count);
  if (taken) c.next_rip = relative_target(c, i);
  return Result::ok;
}
Result jump_if_counter_zero(Context& c, const Instruction& i) {
  return read_register(c, {x86::rcx, 0}, i.address_bytes) ? Result::ok : branch(c, relative_target(c, i));
}

Result read_far_pointer(Context& c, const Instruction& i, u64& offset, u16& selector) {
  if (!i.has_memory) {
    offset = u64(i.immediate) & size_mask(i.operand_bytes);
    selector = i.selector;
    return Result::ok;
  }
  Gva gva;
  offset = 0;
  ANYKVM_TRY(memory_address(c, i, i.operand_bytes + 2u, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, &offset, i.operand_bytes));
  return c.cpu.read(gva + i.operand_bytes, selector);
}
Result jump_far(Context& c, const Instruction& i) {
  u64 offset;
  u16 selector;
  ANYKVM_TRY(read_far_pointer(c, i, offset, selector));
  return moved_rip(c, c.cpu.far_jump(selector, offset, i.operand_bytes, c.next_rip));
}
Result call_far(Context& c, const Instruction& i) {
  u64 offset;
  u16 selector;
  ANYKVM_TRY(read_far_pointer(c, i, offset, selector));
  return moved_rip(c, c.cpu.far_call(selector, offset, i.operand_bytes, c.next_rip));
}
Result return_far(Context& c, const Instruction& i) {
  return moved_rip(c, c.cpu.far_return(i.operand_bytes, u16(i.immediate)));
}

Result interrupt(Context& c, const Instruction& i) {
  c.no_step = true;
  return moved_rip(c, c.cpu.software_interrupt(u8(i.immediate), c.next_rip));
}
Result breakpoint(Context& c, const Instruction&) {
  c.no_step = true;
  return moved_rip(c, c.cpu.software_interrupt(x86::exception::bp, c.next_rip, Cpu::SoftwareInterrupt::int3));
}
Result interrupt_on_overflow(Context& c, const Instruction&) {
  if (!(c.cpu.state.arithmetic & 1)) return Result::ok;
  c.no_step = true;
  return moved_rip(c, c.cpu.software_interrupt(x86::exception::of, c.next_rip, Cpu::SoftwareInterrupt::into));
}
Result single_byte_debug(Context& c, const Instruction&) {
  c.no_step = true;
  return moved_rip(c, c.cpu.debug_interrupt(c.next_rip));
}
Result interrupt_return(Context& c, const Instruction& i) {
  return moved_rip(c, c.cpu.iret(i.operand_bytes, c.next_rip));
}

/// SYSCALL and SYSRET trap by the TF that they leave, not by the one that they found.
Result step_by_new_flag(Context& c, Result result) {
  c.no_step = true;
  if (result != Result::ok || !(c.cpu.state.other_flags & flag::tf)) return moved_rip(c, result);
  c.cpu.fault = {.vector = x86::exception::db, .trap = true, .payload = 1u << 14};
  return Result::fault;
}
Result system_call(Context& c, const Instruction&) { return step_by_new_flag(c, c.cpu.syscall(c.next_rip)); }
Result system_return(Context& c, const Instruction& i) { return step_by_new_flag(c, c.cpu.sysret(i.operand_bytes)); }
Result system_enter(Context& c, const Instruction&) { return moved_rip(c, c.cpu.sysenter(c.next_rip)); }
Result system_exit(Context& c, const Instruction& i) { return moved_rip(c, c.cpu.sysexit(i.operand_bytes)); }

Handler select_conditional(unsigned condition) {
  static constexpr Handler handlers[16] = {jump_if<0>,  jump_if<1>,  jump_if<2>,  jump_if<3>, jump_if<4>,  jump_if<5>,
                                           jump_if<6>,  jump_if<7>,  jump_if<8>,  jump_if<9>, jump_if<10>, jump_if<11>,
                                           jump_if<12>, jump_if<13>, jump_if<14>, jump_if<15>};
  return handlers[condition & 15];
}

/// LOOPE (E1) and LOOPNE (E0). AMD's processors let the last of the repeat prefixes decide: F3 makes either a LOOPE, F2
/// a LOOPNE.
Handler select_conditional_loop(const Decoded& d, bool equal) {
  if (host_is_amd())
    for (unsigned n = 0; n < d.instruction.raw.prefix_count; ++n) {
      const u8 prefix = d.instruction.raw.prefixes[n].value;
      if (prefix == 0xf2 || prefix == 0xf3) equal = prefix == 0xf3;
    }
  return equal ? loop<1> : loop<0>;
}

bool is_far(const Decoded& d) { return d.instruction.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR; }

}  // namespace

u8 near_branch_bytes(const Decoded& d) {
  // With REX.W the prefix says nothing: "data16 data16 rex.W call" is how compilers pad a call of __tls_get_addr().
  const bool narrow = d.instruction.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE && !d.instruction.raw.rex.W;
  return host_is_amd() && narrow ? 2 : 8;
}

Handler select_branch(const Decoded& d, Instruction& out) {
  if (d.instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY) return nullptr;  // Knights Corner's
  const auto near = [&](Handler handler) {
    if (out.code_bits == 64) out.operand_bytes = near_branch_bytes(d);
    return handler;
  };
  // AMD's have no far pointer with a 64-bit offset: REX.W says nothing.
  const auto far = [&](Handler handler) {
    if (out.operand_bytes == 8 && host_is_amd()) out.operand_bytes = 4;
    return handler;
  };
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_JMP:
      if (is_far(d)) return far(jump_far);
      return near(d.is_immediate(0) ? jump_relative : jump_indirect);
    case ZYDIS_MNEMONIC_CALL:
      if (is_far(d)) return far(call_far);
      return near(d.is_immediate(0) ? call_relative : call_indirect);
    case ZYDIS_MNEMONIC_RET: return is_far(d) ? return_far : near(return_near);
    case ZYDIS_MNEMONIC_LOOP: return near(loop<2>);
    case ZYDIS_MNEMONIC_LOOPE: return near(select_conditional_loop(d, true));
    case ZYDIS_MNEMONIC_LOOPNE: return near(select_conditional_loop(d, false));
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ: return near(jump_if_counter_zero);
    case ZYDIS_MNEMONIC_INT: return interrupt;
    case ZYDIS_MNEMONIC_INT3: return breakpoint;
    case ZYDIS_MNEMONIC_INTO: return interrupt_on_overflow;
    case ZYDIS_MNEMONIC_INT1: return single_byte_debug;
    case ZYDIS_MNEMONIC_IRET: out.operand_bytes = 2; return interrupt_return;
    case ZYDIS_MNEMONIC_IRETD: out.operand_bytes = 4; return interrupt_return;
    case ZYDIS_MNEMONIC_IRETQ: out.operand_bytes = 8; return interrupt_return;
    case ZYDIS_MNEMONIC_SYSCALL: return system_call;
    case ZYDIS_MNEMONIC_SYSRET: return system_return;
    case ZYDIS_MNEMONIC_SYSENTER: return system_enter;
    case ZYDIS_MNEMONIC_SYSEXIT: return system_exit;
    default: break;
  }
  if (d.instruction.meta.category == ZYDIS_CATEGORY_COND_BR) {
    const bool is_short = d.instruction.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (d.instruction.opcode & 0xf0) == 0x70;
    const bool is_long = d.instruction.opcode_map == ZYDIS_OPCODE_MAP_0F && (d.instruction.opcode & 0xf0) == 0x80;
    if (is_short || is_long) return near(select_conditional(d.instruction.opcode));
  }
  return nullptr;
}

}  // namespace anykvm::engine
