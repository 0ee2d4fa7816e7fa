// PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

namespace flag = x86::flag;

Result push_register(Context& c, const Instruction& i) {
  return push(c, i.operand_bytes, read_register(c, i.reg[0], i.operand_bytes));
}
Result push_immediate(Context& c, const Instruction& i) { return push(c, i.operand_bytes, u64(i.immediate)); }
Result push_memory(Context& c, const Instruction& i) {
  u64 value;
  ANYKVM_TRY(read_memory(c, i, i.operand_bytes, value));
  return push(c, i.operand_bytes, value);
}
Result push_segment(Context& c, const Instruction& i) {
  return push(c, i.operand_bytes, c.cpu.state.segment[i.reg[0].index].selector);
}

Result pop_register(Context& c, const Instruction& i) {
  u64 value;
  ANYKVM_TRY(pop(c, i.operand_bytes, value));
  write_register(c, i.reg[0], i.operand_bytes, value);  // POP RSP: the value popped wins
  return Result::ok;
}
Result pop_memory(Context& c, const Instruction& i) {
  // An address based on RSP uses its value after the pop; if the store faults, RSP is as before.
  u64 value;
  const u64 before = c.cpu.state.gpr[x86::rsp];
  ANYKVM_TRY(pop(c, i.operand_bytes, value));
  const Result result = write_memory(c, i, i.operand_bytes, value);
  if (result != Result::ok) c.cpu.state.gpr[x86::rsp] = before;
  return result;
}
Result pop_segment(Context& c, const Instruction& i) {
  u64 selector;
  ANYKVM_TRY(peek(c, 0, i.operand_bytes, selector));
  const auto segment = x86::SegmentName(i.reg[0].index);
  const unsigned width = stack_bytes(c);  // POP SS may change it
  ANYKVM_TRY(c.cpu.load_segment(segment, u16(selector)));
  write_register(c, {x86::rsp, 0}, width, c.cpu.state.gpr[x86::rsp] + i.operand_bytes);
  if (segment == x86::ss) c.cpu.state.event.shadow |= KVM_X86_SHADOW_INT_MOV_SS;
  return Result::ok;
}

Result push_all(Context& c, const Instruction& i) {
  const u64 before = c.cpu.state.gpr[x86::rsp];
  for (unsigned reg = x86::rax; reg <= x86::rdi; ++reg) {
    const Result result = push(c, i.operand_bytes, reg == x86::rsp ? before : c.cpu.state.gpr[reg]);
    if (result != Result::ok) {
      c.cpu.state.gpr[x86::rsp] = before;
      return result;
    }
  }
  return Result::ok;
}
Result pop_all(Context& c, const Instruction& i) {
  u64 values[8];
  for (unsigned n = 0; n < 8; ++n) ANYKVM_TRY(peek(c, n * i.operand_bytes, i.operand_bytes, values[n]));
  for (unsigned n = 0; n < 8; ++n) {
    const u8 reg = u8(x86::rdi - n);
    if (reg != x86::rsp) write_register(c, {reg, 0}, i.operand_bytes, values[n]);
  }
  set_stack_pointer(c, c.cpu.state.gpr[x86::rsp] + 8u * i.operand_bytes);
  return Result::ok;
}

unsigned iopl(const Context& c) { return unsigned(c.cpu.state.other_flags >> 12 & 3); }

Result push_flags(Context& c, const Instruction& i) {
  if (c.cpu.state.v86() && iopl(c) < 3) {
    if (!(c.cpu.state.cr4 & x86::cr4::vme && i.operand_bytes == 2)) return c.cpu.gp();
    return push(c, 2, c.cpu.state.virtual_flags());
  }
  return push(c, i.operand_bytes, c.cpu.state.rflags() & ~(flag::vm | flag::rf));
}
Result pop_flags(Context& c, const Instruction& i) {
  u64 value;
  if (c.cpu.state.v86() && iopl(c) < 3) {  // under CR4.VME, IF stands for VIF
    if (!(c.cpu.state.cr4 & x86::cr4::vme && i.operand_bytes == 2)) return c.cpu.gp();
    ANYKVM_TRY(peek(c, 0, 2, value));
    if (value & flag::tf || (value & flag::if_ && c.cpu.state.other_flags & flag::vip)) return c.cpu.gp();
    ANYKVM_TRY(pop(c, 2, value));
    value = (value & 0xffff) | (value & flag::if_ ? flag::vif : 0);
    c.cpu.write_rflags(value, flag::arithmetic | flag::df | flag::nt | flag::tf | flag::vif);
    return Result::ok;
  }
  ANYKVM_TRY(pop(c, i.operand_bytes, value));
  u64 mask = flag::arithmetic | flag::tf | flag::df | flag::nt | flag::ac | flag::id;
  if (c.cpu.state.cpl <= iopl(c)) mask |= flag::if_;
  if (c.cpu.state.cpl == 0) mask |= flag::iopl;
  if (i.operand_bytes == 2) mask &= 0xffff;
  c.cpu.write_rflags(value & ~flag::rf, mask | (i.operand_bytes == 2 ? 0 : flag::rf));
  return Result::ok;
}

Result leave(Context& c, const Instruction& i) {
  const u64 before = c.cpu.state.gpr[x86::rsp];
  set_stack_pointer(c, c.cpu.state.gpr[x86::rbp]);
  u64 value;
  const Result result = pop(c, i.operand_bytes, value);
  if (result != Result::ok) {
    c.cpu.state.gpr[x86::rsp] = before;
    return result;
  }
  write_register(c, {x86::rbp, 0}, i.operand_bytes, value);
  return Result::ok;
}

/// ENTER size, level: immediate holds the size, selector the nesting level.
Result enter(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes, level = i.selector & 31;
  const u64 before = c.cpu.state.gpr[x86::rsp];
  const auto undo = [&](Result result) {
    c.cpu.state.gpr[x86::rsp] = before;
    return result;
  };
  if (const Result r = push(c, bytes, c.cpu.state.gpr[x86::rbp]); r != Result::ok) return r;
  const u64 frame = c.cpu.state.gpr[x86::rsp];
  for (unsigned n = 1; n < level; ++n) {
    const u64 offset = (c.cpu.state.gpr[x86::rbp] - n * bytes) & size_mask(stack_bytes(c));
    Gva gva;
    u64 value = 0;
    if (const Result r = linear_address(c, x86::ss, offset, bytes, Access::read, gva); r != Result::ok) return undo(r);
    if (const Result r = c.cpu.read(gva, &value, bytes); r != Result::ok) return undo(r);
    if (const Result r = push(c, bytes, value); r != Result::ok) return undo(r);
  }
  if (level)
    if (const Result r = push(c, bytes, frame); r != Result::ok) return undo(r);
  const u64 top = (c.cpu.state.gpr[x86::rsp] - u16(i.immediate)) & size_mask(stack_bytes(c));
  // The new top must be writable and aligned, as the processor checks.
  Gva gva;
  x86::Operand probe;
  if (const Result r = linear_address(c, x86::ss, top, bytes, Access::write, gva); r != Result::ok) return undo(r);
  if (const Result r = c.cpu.open_operand(gva, bytes, Cpu::Use::write, probe); r != Result::ok) return undo(r);
  set_stack_pointer(c, top);
  write_register(c, {x86::rbp, 0}, bytes, frame);
  return Result::ok;
}

}  // namespace

Handler select_stack(const Decoded& d, Instruction& out) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_PUSH:
      if (d.is_memory(0)) return push_memory;
      if (d.is_immediate(0)) return push_immediate;
      return d.register_class(0) == ZYDIS_REGCLASS_SEGMENT ? push_segment : push_register;
    case ZYDIS_MNEMONIC_POP:
      if (d.is_memory(0)) return pop_memory;
      return d.register_class(0) == ZYDIS_REGCLASS_SEGMENT ? pop_segment : pop_register;
    case ZYDIS_MNEMONIC_PUSHA: out.operand_bytes = 2; return push_all;
    case ZYDIS_MNEMONIC_PUSHAD: out.operand_bytes = 4; return push_all;
    case ZYDIS_MNEMONIC_POPA: out.operand_bytes = 2; return pop_all;
    case ZYDIS_MNEMONIC_POPAD: out.operand_bytes = 4; return pop_all;
    case ZYDIS_MNEMONIC_PUSHF: out.operand_bytes = 2; return push_flags;
    case ZYDIS_MNEMONIC_PUSHFD: out.operand_bytes = 4; return push_flags;
    case ZYDIS_MNEMONIC_PUSHFQ: out.operand_bytes = 8; return push_flags;
    case ZYDIS_MNEMONIC_POPF: out.operand_bytes = 2; return pop_flags;
    case ZYDIS_MNEMONIC_POPFD: out.operand_bytes = 4; return pop_flags;
    case ZYDIS_MNEMONIC_POPFQ: out.operand_bytes = 8; return pop_flags;
    case ZYDIS_MNEMONIC_LEAVE: return leave;
    case ZYDIS_MNEMONIC_ENTER:
      out.immediate = s64(d.operands[0].imm.value.u & 0xffff);
      out.selector = u16(d.operands[1].imm.value.u);
      return enter;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
