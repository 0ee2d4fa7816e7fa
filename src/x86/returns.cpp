// IRET and far RET: back to the same or an outer privilege level, in each mode.
// Reference: Intel SDM volume 2, IRET and RET; AMD64 manual volume 3.
#include "x86/stack.h"
#include "x86/task_switch.h"

namespace anykvm::x86 {

namespace {

/// RFLAGS bits that IRET loads at the privilege that it runs with. RF holds for the next instruction; the engine clears
/// it.
u64 iret_flags(const CpuState& s, unsigned operand_bytes) {
  u64 mask = flag::arithmetic | flag::tf | flag::df | flag::nt;
  if (operand_bytes > 2) mask |= flag::rf | flag::ac | flag::id;
  if (s.cpl <= (s.other_flags >> 12 & 3)) mask |= flag::if_;
  if (s.cpl == 0) mask |= flag::iopl | (operand_bytes > 2 ? flag::vif | flag::vip : 0);
  return mask;
}

void unmask_nmi(Cpu& cpu) {
  if (!cpu.state.event.nmi_masked) return;
  cpu.state.event.nmi_masked = false;
  cpu.machine.interrupt_window_changed();
}

/// Real and virtual-8086 mode.
Result return_real(Cpu& cpu, unsigned operand_bytes) {
  CpuState& s = cpu.state;
  const bool virtual_if = s.v86() && (s.other_flags & flag::iopl) != flag::iopl;
  if (virtual_if && !(s.cr4 & cr4::vme && operand_bytes == 2)) return cpu.gp();
  Stack stack(cpu);
  u64 ip, selector, flags;
  ANYKVM_TRY(stack.pop(ip, operand_bytes));
  ANYKVM_TRY(stack.pop(selector, operand_bytes));
  ANYKVM_TRY(stack.pop(flags, operand_bytes));
  if (ip > s.segment[cs].limit) return cpu.gp();
  u64 mask = iret_flags(s, operand_bytes) | flag::if_;
  if (s.v86()) mask &= ~(flag::iopl | flag::vif | flag::vip);
  if (virtual_if) {  // VME: IF stands for VIF
    if (flags & flag::tf || (flags & flag::if_ && s.other_flags & flag::vip)) return cpu.gp();
    mask = (mask & ~flag::if_) | flag::vif;
    if (flags & flag::if_) flags |= flag::vif;
  }
  s.gpr[rsp] = stack.rsp();
  s.rip = ip;
  s.segment[cs].selector = u16(selector);
  s.segment[cs].base = u64(u16(selector)) << 4;
  cpu.write_rflags(flags, mask);
  return Result::ok;
}

/// IRETD at CPL 0 of a frame whose flags have VM set.
Result return_to_v86(Cpu& cpu, Stack& stack, u64 ip, u16 code, u64 flags) {
  CpuState& s = cpu.state;
  u64 stack_pointer, selectors[5];
  ANYKVM_TRY(stack.pop(stack_pointer, 4));
  for (u64& selector : selectors) ANYKVM_TRY(stack.pop(selector, 4));
  const u64 mask = iret_flags(s, 4) | flag::vm;
  s.rip = u16(ip);
  s.gpr[rsp] = u32(stack_pointer);
  s.segment[cs] = v86_segment(code);
  constexpr SegmentName order[5] = {ss, es, ds, fs, gs};
  for (unsigned i = 0; i < 5; ++i) s.segment[order[i]] = v86_segment(u16(selectors[i]));
  cpu.write_rflags(flags, mask);
  cpu.update_mode();
  return Result::ok;
}

struct Target {
  u64 rip = 0, rsp = 0;
  Segment code, stack;
  bool switches_stack = false;
};

/// What IRET and RET share: CS, the outer stack, and every check. `stack` stands behind CS (and RFLAGS).
Result prepare_return(Cpu& cpu, Stack& stack, u64 rip, u16 selector, bool always_pops_stack, unsigned bytes,
                      u16 pop_bytes, Target& target) {
  const CpuState& s = cpu.state;
  const u8 rpl = selector & 3;
  Descriptor code;
  // The other level's SS is read before anything is found wrong with CS.
  if (u64 other_ss; rpl != s.cpl && !always_pops_stack) ANYKVM_TRY(stack.peek(pop_bytes + bytes, other_ss, bytes));
  ANYKVM_TRY(check_return_code(cpu, selector, code));
  ANYKVM_TRY(check_target(cpu, code.segment, rip));
  target.code = code.segment;
  target.switches_stack = always_pops_stack || rpl > s.cpl;
  stack.move(pop_bytes);
  target.rsp = stack.rsp();
  if (target.switches_stack) {
    const bool to_long_code = s.long_mode() && code.segment.l;
    u64 new_rsp, new_ss;
    ANYKVM_TRY(stack.pop(new_rsp, bytes));
    ANYKVM_TRY(stack.pop(new_ss, bytes));
    Descriptor segment;
    ANYKVM_TRY(check_return_stack(cpu, u16(new_ss), rpl, to_long_code, segment));
    target.stack = segment.segment;
    if (to_long_code || target.stack.db) {
      target.rsp = new_rsp;
    } else {
      target.rsp = (s.gpr[rsp] & ~0xffffull) | u16(new_rsp);
    }
    if (rpl > s.cpl) target.rsp += pop_bytes;
    if (!to_long_code) target.rsp = u32(target.rsp);
  }
  target.rip = rip;
  return Result::ok;
}

void commit_return(Cpu& cpu, const Target& target) {
  CpuState& s = cpu.state;
  const u8 rpl = target.code.selector & 3;
  const bool outer = rpl > s.cpl;
  s.rip = target.rip;
  s.gpr[rsp] = target.rsp;
  s.segment[cs] = target.code;
  if (target.switches_stack) s.segment[ss] = target.stack;
  if (outer) drop_inner_segments(cpu, rpl);
}

}  // namespace

Result Cpu::iret(unsigned operand_bytes, u64 next_rip) {
  const Result result = iret_itself(operand_bytes, next_rip);
  // An IRET that faults lets NMIs in all the same.
  if (result != Result::exit) unmask_nmi(*this);
  return result;
}

Result Cpu::iret_itself(unsigned operand_bytes, u64 next_rip) {
  if (!state.protected_mode() || state.v86()) {
    return return_real(*this, operand_bytes);
  }
  if (state.other_flags & flag::nt) {
    if (state.long_mode()) return gp();
    u16 link;
    ANYKVM_TRY(read_as(u32(state.tr.base), &link, 2, system_privilege));
    ANYKVM_TRY(switch_task(*this, {.cause = TaskSwitch::Cause::iret, .selector = link, .return_rip = next_rip}));
    return Result::ok;
  }
  // From the top down: where several of them fault, that is which one the processor reports.
  Stack stack(*this);
  u64 ip, selector, flags;
  ANYKVM_TRY(stack.peek(2 * operand_bytes, flags, operand_bytes));
  ANYKVM_TRY(stack.peek(operand_bytes, selector, operand_bytes));
  ANYKVM_TRY(stack.peek(0, ip, operand_bytes));
  stack.move(3 * operand_bytes);
  if (operand_bytes == 4 && flags & flag::vm && state.cpl == 0 && !state.long_mode()) {
    return return_to_v86(*this, stack, ip, u16(selector), flags);
  }
  Target target;
  ANYKVM_TRY(prepare_return(*this, stack, ip, u16(selector), state.code_bits == 64, operand_bytes, 0, target));
  const u64 mask = iret_flags(state, operand_bytes);
  commit_return(*this, target);
  update_mode();
  write_rflags(flags, mask);
  return Result::ok;
}

Result Cpu::far_return(unsigned operand_bytes, u16 pop_bytes) {
  Stack stack(*this);
  u64 ip, selector;
  ANYKVM_TRY(stack.peek(operand_bytes, selector, operand_bytes));
  ANYKVM_TRY(stack.peek(0, ip, operand_bytes));
  stack.move(2 * operand_bytes);
  if (!state.protected_mode() || state.v86()) {
    if (ip > state.segment[cs].limit) return gp();
    stack.move(pop_bytes);
    state.gpr[rsp] = stack.rsp();
    state.rip = ip;
    state.segment[cs].selector = u16(selector);
    state.segment[cs].base = u64(u16(selector)) << 4;
    return Result::ok;
  }
  Target target;
  ANYKVM_TRY(prepare_return(*this, stack, ip, u16(selector), false, operand_bytes, pop_bytes, target));
  commit_return(*this, target);
  update_mode();
  return Result::ok;
}

}  // namespace anykvm::x86
