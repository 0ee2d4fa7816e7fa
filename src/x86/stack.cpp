// Stacks of inner privilege levels from the TSS, and the checks of returns to outer ones.
// Reference: Intel SDM volume 3 chapters 5.8.5, 7.2, 7.7; volume 2, RET and IRET.
#include "x86/stack.h"

namespace anykvm::x86 {

Result read_tss_rsp(Cpu& cpu, unsigned index, u32 ext, u64& rsp) {
  const Segment& tr = cpu.state.tr;
  const u32 offset = 4 + 8 * index;
  if (offset + 7 > tr.limit) return cpu.raise(exception::ts, selector_error(tr.selector, ext));
  ANYKVM_TRY(cpu.read_as(tr.base + offset, &rsp, 8, cpu.system_privilege));
  return cpu.canonical(rsp) ? Result::ok : cpu.raise(exception::ss, ext);
}

Result read_tss_stack(Cpu& cpu, u8 dpl, u32 ext, Segment& segment, u64& rsp) {
  const Segment& tr = cpu.state.tr;
  const bool wide = tr.type & 8;
  const u32 offset = wide ? 4 + 8 * dpl : 2 + 4 * dpl, pointer_bytes = wide ? 4 : 2;
  if (offset + pointer_bytes + 1 > tr.limit) return cpu.raise(exception::ts, selector_error(tr.selector, ext));
  u16 selector;
  rsp = 0;
  ANYKVM_TRY(cpu.read_as(tr.base + offset, &rsp, pointer_bytes, cpu.system_privilege));
  ANYKVM_TRY(cpu.read_as(tr.base + offset + pointer_bytes, &selector, 2, cpu.system_privilege));
  const u32 error = selector_error(selector, ext);
  if (null_selector(selector)) return cpu.raise(exception::ts, ext);
  Descriptor stack;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::ts, ext, stack));
  if ((selector & 3) != dpl || stack.segment.dpl != dpl || !stack.writable()) return cpu.raise(exception::ts, error);
  if (!stack.segment.present) return cpu.raise(exception::ss, error);
  ANYKVM_TRY(mark_accessed(cpu, stack));
  segment = stack.segment;
  return Result::ok;
}

Result check_return_code(Cpu& cpu, u16 selector, Descriptor& code) {
  const u32 error = selector_error(selector);
  const u8 rpl = selector & 3;
  if (null_selector(selector)) return cpu.gp();
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::gp, 0, code));
  if (rpl < cpu.state.cpl || !code.code()) return cpu.raise(exception::gp, error);
  if (code.conforming() ? code.segment.dpl > rpl : code.segment.dpl != rpl) return cpu.raise(exception::gp, error);
  if (cpu.state.long_mode() && code.segment.l && code.segment.db) return cpu.raise(exception::gp, error);
  if (!code.segment.present) return cpu.raise(exception::np, error);
  return mark_accessed(cpu, code);
}

Result check_return_stack(Cpu& cpu, u16 selector, u8 rpl, bool to_long_code, Descriptor& stack) {
  const u32 error = selector_error(selector);
  if (null_selector(selector)) {
    if (!to_long_code || rpl == 3 || (selector & 3) != rpl) return cpu.gp();
    stack.segment = null_segment(selector, rpl);
    return Result::ok;
  }
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::gp, 0, stack));
  if ((selector & 3) != rpl || !stack.writable() || stack.segment.dpl != rpl) return cpu.raise(exception::gp, error);
  if (!stack.segment.present) return cpu.raise(exception::ss, error);
  return mark_accessed(cpu, stack);
}

void drop_inner_segments(Cpu& cpu, u8 cpl) {
  for (SegmentName name : {es, ds, fs, gs}) {
    Segment& segment = cpu.state.segment[name];
    const bool conforming = (segment.type & 0xc) == 0xc;
    if (!segment.unusable && segment.s && !conforming && segment.dpl < cpl) segment = null_segment(0);
  }
}

}  // namespace anykvm::x86
