// Far JMP and CALL: direct, and through call gates.
// Reference: Intel SDM volume 3 chapter 5.8, volume 2 JMP and CALL; AMD64 manual volume 2 chapter 4.11.
#include "x86/stack.h"
#include "x86/task_switch.h"

namespace anykvm::x86 {

namespace {

u64 truncate(u64 value, unsigned bytes) { return bytes == 8 ? value : value & ((1ull << 8 * bytes) - 1); }

void enter(CpuState& s, const Descriptor& code, u16 selector, u8 cpl, u64 rip) {
  s.segment[cs] = code.segment;
  s.segment[cs].selector = u16((selector & ~3) | cpl);
  s.rip = rip;
}

/// A code segment that a jump or call names itself. The type has been checked.
Result check_direct_code(Cpu& cpu, u16 selector, Descriptor& code) {
  const CpuState& s = cpu.state;
  const u32 error = selector_error(selector);
  const u8 dpl = code.segment.dpl, rpl = selector & 3;
  if (code.conforming() ? dpl > s.cpl : rpl > s.cpl || dpl != s.cpl) return cpu.raise(exception::gp, error);
  if (s.long_mode() && code.segment.l && code.segment.db) return cpu.raise(exception::gp, error);
  if (!code.segment.present) return cpu.raise(exception::np, error);
  return mark_accessed(cpu, code);
}

/// Follows a call gate to its code segment.
Result read_gate(Cpu& cpu, u16 selector, Descriptor& gate, bool call, Descriptor& code) {
  const CpuState& s = cpu.state;
  const u32 error = selector_error(selector);
  const u8 type = gate.segment.type, rpl = selector & 3;
  if (type != system_type::call_gate && !(type == system_type::call_gate16 && !s.long_mode())) {
    return cpu.raise(exception::gp, error);
  }
  if (gate.segment.dpl < s.cpl || gate.segment.dpl < rpl) return cpu.raise(exception::gp, error);
  if (!gate.segment.present) return cpu.raise(exception::np, error);
  ANYKVM_TRY(read_upper_half(cpu, selector, exception::gp, 0, gate));

  const u16 target = gate.gate_selector();
  const u32 target_error = selector_error(target);
  if (null_selector(target)) return cpu.gp();
  ANYKVM_TRY(read_descriptor(cpu, target, exception::gp, 0, code));
  if (!code.code() || code.segment.dpl > s.cpl) return cpu.raise(exception::gp, target_error);
  if (!call && !code.conforming() && code.segment.dpl != s.cpl) return cpu.raise(exception::gp, target_error);
  if (s.long_mode() && (!code.segment.l || code.segment.db)) return cpu.raise(exception::gp, target_error);
  if (!code.segment.present) return cpu.raise(exception::np, target_error);
  return mark_accessed(cpu, code);
}

/// Whether a system descriptor leads to another task instead of to code.
bool leads_to_task(const CpuState& s, const Descriptor& descriptor) {
  using namespace system_type;
  const u8 type = descriptor.segment.type;
  return !s.long_mode() && (type == task_gate || type == tss || type == tss16);
}

Result transfer_to_task(Cpu& cpu, u16 selector, const Descriptor& descriptor, TaskSwitch::Cause cause, u64 next_rip) {
  const u8 dpl = descriptor.segment.dpl, rpl = selector & 3;
  if (dpl < cpu.state.cpl || dpl < rpl) return cpu.raise(exception::gp, selector_error(selector));
  if (descriptor.segment.type == system_type::task_gate) {
    if (!descriptor.segment.present) return cpu.raise(exception::np, selector_error(selector));
    selector = task_of_gate(descriptor.low);
  }
  return switch_task(cpu, {.cause = cause, .selector = selector, .return_rip = next_rip});
}

u64 gate_target(const Descriptor& gate) {
  return gate.segment.type & 8 ? gate.gate_offset() : gate.gate_offset() & 0xffff;
}

Result call_through_gate(Cpu& cpu, u16 selector, Descriptor& gate, u64 next_rip) {
  CpuState& s = cpu.state;
  Descriptor code;
  ANYKVM_TRY(read_gate(cpu, selector, gate, true, code));
  const u64 rip = gate_target(gate);
  ANYKVM_TRY(check_target(cpu, code.segment, rip));
  const bool long_mode = s.long_mode(), inner = !code.conforming() && code.segment.dpl < s.cpl;
  const unsigned bytes = long_mode ? 8 : gate.segment.type & 8 ? 4 : 2;
  const u8 cpl = inner ? code.segment.dpl : s.cpl;

  Segment stack_segment = s.segment[ss];
  u64 stack_pointer = s.gpr[rsp];
  if (inner && long_mode) {
    ANYKVM_TRY(read_tss_rsp(cpu, cpl, 0, stack_pointer));
    stack_segment = null_segment(cpl, cpl);
  } else if (inner) {
    ANYKVM_TRY(read_tss_stack(cpu, cpl, 0, stack_segment, stack_pointer));
  }
  Stack stack(cpu, stack_segment, stack_pointer, stack_privilege(cpu, cpl), long_mode,
              inner ? selector_error(stack_segment.selector) : 0);
  if (inner) {
    ANYKVM_TRY(stack.push(s.segment[ss].selector, bytes));
    ANYKVM_TRY(stack.push(s.gpr[rsp], bytes));
    if (!long_mode) {
      u64 parameters[31];
      const unsigned count = gate.low >> 32 & 31;
      Stack caller(cpu);
      for (unsigned i = 0; i < count; ++i) ANYKVM_TRY(caller.pop(parameters[i], bytes));
      for (unsigned i = count; i-- > 0;) ANYKVM_TRY(stack.push(parameters[i], bytes));
    }
  }
  ANYKVM_TRY(stack.push(s.segment[cs].selector, bytes));
  ANYKVM_TRY(stack.push(next_rip, bytes));
  s.gpr[rsp] = stack.rsp();
  s.segment[ss] = stack_segment;
  enter(s, code, gate.gate_selector(), cpl, rip);
  cpu.update_mode();
  return Result::ok;
}

}  // namespace

Result Cpu::far_jump(u16 selector, u64 offset, unsigned operand_bytes, u64 next_rip) {
  offset = truncate(offset, operand_bytes);
  if (!state.protected_mode() || state.v86()) {
    if (offset > state.segment[cs].limit) return gp();
    state.segment[cs].selector = selector;
    state.segment[cs].base = u64(selector) << 4;
    state.rip = offset;
    return Result::ok;
  }
  if (null_selector(selector)) return gp();
  Descriptor code;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, code));
  if (code.data()) return raise(exception::gp, selector_error(selector));
  if (!code.segment.s) {
    if (leads_to_task(state, code)) return transfer_to_task(*this, selector, code, TaskSwitch::Cause::jump, next_rip);
    Descriptor gate = code;
    ANYKVM_TRY(read_gate(*this, selector, gate, false, code));
    selector = gate.gate_selector();
    offset = gate_target(gate);
  } else {
    ANYKVM_TRY(check_direct_code(*this, selector, code));
  }
  ANYKVM_TRY(check_target(*this, code.segment, offset));
  enter(state, code, selector, state.cpl, offset);
  update_mode();
  return Result::ok;
}

Result Cpu::far_call(u16 selector, u64 offset, unsigned operand_bytes, u64 next_rip) {
  offset = truncate(offset, operand_bytes);
  Stack stack(*this);
  if (!state.protected_mode() || state.v86()) {
    if (offset > state.segment[cs].limit) return gp();
    ANYKVM_TRY(stack.push(state.segment[cs].selector, operand_bytes));
    ANYKVM_TRY(stack.push(next_rip, operand_bytes));
    state.gpr[rsp] = stack.rsp();
    state.segment[cs].selector = selector;
    state.segment[cs].base = u64(selector) << 4;
    state.rip = offset;
    return Result::ok;
  }
  if (null_selector(selector)) return gp();
  Descriptor code;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, code));
  if (code.data()) return raise(exception::gp, selector_error(selector));
  if (!code.segment.s && leads_to_task(state, code))
    return transfer_to_task(*this, selector, code, TaskSwitch::Cause::call, next_rip);
  if (!code.segment.s) return call_through_gate(*this, selector, code, next_rip);
  ANYKVM_TRY(check_direct_code(*this, selector, code));
  // As processors do it: a target outside the segment is found when the return address is already stored.
  ANYKVM_TRY(stack.push(state.segment[cs].selector, operand_bytes));
  ANYKVM_TRY(stack.push(next_rip, operand_bytes));
  ANYKVM_TRY(check_target(*this, code.segment, offset));
  state.gpr[rsp] = stack.rsp();
  enter(state, code, selector, state.cpl, offset);
  update_mode();
  return Result::ok;
}

}  // namespace anykvm::x86
