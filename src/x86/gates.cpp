// Interrupt and trap gates: how an event reaches its handler, in each mode.
// Reference: Intel SDM volume 3 chapter 6.12-6.14, volume 2 INT n; AMD64 manual volume 2 chapter 8.
#include "x86/delivery.h"
#include "x86/stack.h"
#include "x86/task_switch.h"

namespace anykvm::x86 {

namespace {

/// Flags of the handler.
void enter_handler(CpuState& s, bool clear_if) {
  s.other_flags &= ~(flag::tf | flag::nt | flag::rf | flag::vm | (clear_if ? flag::if_ : 0));
  s.event.shadow = 0;
}

Result deliver_real(Cpu& cpu, const Delivery& event) {
  CpuState& s = cpu.state;
  const u32 offset = event.vector * 4;
  if (offset + 3 > s.idtr.limit) return cpu.raise(exception::gp, u32(event.vector) * 8 + 2);
  u32 target;
  ANYKVM_TRY(cpu.read_as(s.idtr.base + offset, &target, 4, cpu.system_privilege));
  Stack stack(cpu);
  ANYKVM_TRY(stack.push(s.rflags(), 2));
  ANYKVM_TRY(stack.push(s.segment[cs].selector, 2));
  ANYKVM_TRY(stack.push(event.return_rip, 2));
  s.gpr[rsp] = stack.rsp();
  s.segment[cs].selector = u16(target >> 16);
  s.segment[cs].base = u64(target >> 16) << 4;
  s.rip = u16(target);
  s.other_flags &= ~(flag::if_ | flag::tf | flag::ac | flag::rf);
  s.event.shadow = 0;
  cpu.update_mode();
  return Result::ok;
}

/// Reads and checks the gate's code segment. `inner`: the handler is more privileged than the interrupted code.
Result read_handler_segment(Cpu& cpu, u16 selector, u32 ext, Descriptor& code, bool& inner) {
  const CpuState& s = cpu.state;
  if (null_selector(selector)) return cpu.raise(exception::gp, ext);
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::gp, ext, code));
  const u32 error = selector_error(selector, ext);
  if (!code.code() || code.segment.dpl > s.cpl) return cpu.raise(exception::gp, error);
  if (s.long_mode() && (!code.segment.l || code.segment.db)) return cpu.raise(exception::gp, error);
  if (!code.segment.present) return cpu.raise(exception::np, error);
  inner = !code.conforming() && code.segment.dpl < s.cpl;
  if (s.v86() && (!inner || code.segment.dpl != 0)) return cpu.raise(exception::gp, error);
  return mark_accessed(cpu, code);
}

Result deliver_long(Cpu& cpu, const Delivery& event) {
  CpuState& s = cpu.state;
  const u32 ext = !event.software, idt_error = u32(event.vector) * 8 | 2 | ext, offset = event.vector * 16;
  if (offset + 15 > s.idtr.limit) return cpu.raise(exception::gp, idt_error);
  u64 halves[2];
  ANYKVM_TRY(cpu.read_as(s.idtr.base + offset, halves, sizeof halves, cpu.system_privilege));
  const Descriptor gate = {.low = halves[0], .high = halves[1], .segment = parse_segment(halves[0], 0)};
  const u8 type = gate.segment.type;
  // The upper half has no type that would count: unlike the GDT, the IDT cannot be entered in the middle of a gate.
  if (gate.segment.s || (type != system_type::interrupt_gate && type != system_type::trap_gate))
    return cpu.raise(exception::gp, idt_error);
  if (event.software && gate.segment.dpl < s.cpl) return cpu.raise(exception::gp, idt_error);
  if (!gate.segment.present) return cpu.raise(exception::np, idt_error);

  Descriptor code;
  bool inner;
  ANYKVM_TRY(read_handler_segment(cpu, gate.gate_selector(), ext, code, inner));
  const u8 new_cpl = inner ? code.segment.dpl : s.cpl;

  u64 stack = s.gpr[rsp];
  if (const unsigned ist = gate.low >> 32 & 7) {
    ANYKVM_TRY(read_tss_rsp(cpu, 3 + ist, ext, stack));
  } else if (inner) {
    ANYKVM_TRY(read_tss_rsp(cpu, new_cpl, ext, stack));
  }
  stack &= ~15ull;
  const u64 rip = gate.gate_offset();
  ANYKVM_TRY(check_target(cpu, code.segment, rip, ext));

  // One store for the whole frame: it happens or it does not.
  u64 frame[6];
  unsigned n = 0;
  if (event.has_error) frame[n++] = event.error;
  frame[n++] = event.return_rip;
  frame[n++] = s.segment[cs].selector;
  frame[n++] = s.rflags() | (event.resume_flag ? flag::rf : 0);
  frame[n++] = s.gpr[rsp];
  frame[n++] = s.segment[ss].selector;
  stack -= 8 * n;
  if (!cpu.canonical(stack) || !cpu.canonical(stack + 8 * n - 1)) return cpu.raise(exception::ss, ext);
  const Privilege privilege = stack_privilege(cpu, new_cpl);
  if (const Result result = cpu.write_as(stack, frame, 8 * n, privilege); result != Result::ok) {
    if (result == Result::exit) return result;
    // The pushes go down: CR2 is the first one's that cannot be done.
    Mmu::Translation translation;
    for (unsigned i = n; i-- > 0;)
      ANYKVM_TRY(cpu.mmu.translate(cpu, stack + 8 * i, Access::write, privilege, translation));
    return result;
  }

  s.gpr[rsp] = stack;
  s.rip = rip;
  if (inner) s.segment[ss] = null_segment(new_cpl, new_cpl);
  s.segment[cs] = code.segment;
  s.segment[cs].selector = u16((gate.gate_selector() & ~3) | new_cpl);
  enter_handler(s, type == system_type::interrupt_gate);
  cpu.update_mode();
  return Result::ok;
}

Result deliver_protected(Cpu& cpu, const Delivery& event) {
  CpuState& s = cpu.state;
  const u32 ext = !event.software, idt_error = u32(event.vector) * 8 | 2 | ext, offset = event.vector * 8;
  if (offset + 7 > s.idtr.limit) return cpu.raise(exception::gp, idt_error);
  Descriptor gate;
  ANYKVM_TRY(cpu.read_as(s.idtr.base + offset, &gate.low, 8, cpu.system_privilege));
  gate.segment = parse_segment(gate.low, 0);
  const u8 type = gate.segment.type;
  const bool interrupt_gate = type == system_type::interrupt_gate || type == system_type::interrupt_gate16;
  const bool trap_gate = type == system_type::trap_gate || type == system_type::trap_gate16;
  if (gate.segment.s || (!interrupt_gate && !trap_gate && type != system_type::task_gate)) {
    return cpu.raise(exception::gp, idt_error);
  }
  if (event.software && gate.segment.dpl < s.cpl) return cpu.raise(exception::gp, idt_error);
  if (!gate.segment.present) return cpu.raise(exception::np, idt_error);
  if (type == system_type::task_gate) {
    return switch_task(cpu, {.cause = TaskSwitch::Cause::event,
                             .selector = task_of_gate(gate.low),
                             .return_rip = event.return_rip,
                             .ext = ext,
                             .resume_flag = event.resume_flag,
                             .has_error = event.has_error,
                             .error = event.error});
  }

  Descriptor code;
  bool inner;
  ANYKVM_TRY(read_handler_segment(cpu, gate.gate_selector(), ext, code, inner));
  const u8 new_cpl = inner ? code.segment.dpl : s.cpl;
  const unsigned bytes = type & 8 ? 4 : 2;
  const u64 rip = type & 8 ? gate.gate_offset() : gate.gate_offset() & 0xffff;
  ANYKVM_TRY(check_target(cpu, code.segment, rip, ext));

  Segment stack_segment = s.segment[ss];
  u64 stack_pointer = s.gpr[rsp];
  u32 stack_error = ext;
  if (inner) {
    ANYKVM_TRY(read_tss_stack(cpu, new_cpl, ext, stack_segment, stack_pointer));
    stack_error = selector_error(stack_segment.selector, ext);
  }
  Stack stack(cpu, stack_segment, stack_pointer, stack_privilege(cpu, new_cpl), false, stack_error);
  if (s.v86()) {
    for (SegmentName name : {gs, fs, ds, es}) ANYKVM_TRY(stack.push(s.segment[name].selector, bytes));
  }
  if (inner) {
    ANYKVM_TRY(stack.push(s.segment[ss].selector, bytes));
    ANYKVM_TRY(stack.push(s.gpr[rsp], bytes));
  }
  ANYKVM_TRY(stack.push(s.rflags() | (event.resume_flag ? flag::rf : 0), bytes));
  ANYKVM_TRY(stack.push(s.segment[cs].selector, bytes));
  ANYKVM_TRY(stack.push(event.return_rip, bytes));
  if (event.has_error) ANYKVM_TRY(stack.push(event.error, bytes));

  if (s.v86()) {
    for (SegmentName name : {gs, fs, ds, es}) s.segment[name] = null_segment(0);
  }
  s.gpr[rsp] = stack.rsp();
  s.rip = rip;
  s.segment[ss] = stack_segment;
  s.segment[cs] = code.segment;
  s.segment[cs].selector = u16((gate.gate_selector() & ~3) | new_cpl);
  enter_handler(s, interrupt_gate);
  cpu.update_mode();
  return Result::ok;
}

}  // namespace

Result redirect_v86_interrupt(Cpu& cpu, u8 vector, u64 return_rip, bool& redirected) {
  CpuState& s = cpu.state;
  u16 io_map;
  u8 bits;
  if (s.tr.limit < 0x67) return cpu.gp();
  ANYKVM_TRY(cpu.read_as(u32(s.tr.base + 0x66), &io_map, 2, cpu.system_privilege));
  const u32 offset = io_map - 32u + vector / 8;
  if (offset > s.tr.limit) return cpu.gp();
  ANYKVM_TRY(cpu.read_as(u32(s.tr.base + offset), &bits, 1, cpu.system_privilege));
  redirected = !(bits >> (vector & 7) & 1);
  if (!redirected) return Result::ok;

  u32 target;
  ANYKVM_TRY(cpu.read_as(vector * 4u, &target, 4, cpu.system_privilege));
  const bool iopl3 = (s.other_flags & flag::iopl) == flag::iopl;
  Stack stack(cpu);
  ANYKVM_TRY(stack.push(iopl3 ? s.rflags() : s.virtual_flags(), 2));
  ANYKVM_TRY(stack.push(s.segment[cs].selector, 2));
  ANYKVM_TRY(stack.push(return_rip, 2));
  s.gpr[rsp] = stack.rsp();
  s.segment[cs] = v86_segment(u16(target >> 16));
  s.rip = u16(target);
  s.other_flags &= ~(flag::tf | flag::rf | (iopl3 ? flag::if_ : flag::vif));
  return Result::ok;
}

Result deliver(Cpu& cpu, const Delivery& event) {
  if (cpu.state.real_mode()) return deliver_real(cpu, event);
  return cpu.state.long_mode() ? deliver_long(cpu, event) : deliver_protected(cpu, event);
}

}  // namespace anykvm::x86
