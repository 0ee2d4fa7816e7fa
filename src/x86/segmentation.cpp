// Loading segment registers, LDTR and TR, and the instructions that probe selectors.
// Reference: Intel SDM volume 3 chapters 3.4, 5.5-5.7, volume 2 MOV, LLDT, LTR, LAR, LSL, VERR/VERW.
#include "x86/descriptors.h"

namespace anykvm::x86 {

namespace {

Result load_stack_segment(Cpu& cpu, u16 selector) {
  CpuState& s = cpu.state;
  const u8 rpl = selector & 3;
  if (null_selector(selector)) {
    if (s.code_bits != 64 || s.cpl == 3 || rpl != s.cpl) return cpu.gp();
    s.segment[ss] = null_segment(selector, s.cpl);
    return Result::ok;
  }
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(cpu, selector, exception::gp, 0, descriptor));
  const u32 error = selector_error(selector);
  if (rpl != s.cpl || !descriptor.writable() || descriptor.segment.dpl != s.cpl) {
    return cpu.raise(exception::gp, error);
  }
  if (!descriptor.segment.present) return cpu.raise(exception::ss, error);
  ANYKVM_TRY(mark_accessed(cpu, descriptor));
  s.segment[ss] = descriptor.segment;
  return Result::ok;
}

}  // namespace

Result Cpu::load_segment(SegmentName name, u16 selector) {
  if (!state.protected_mode()) {
    state.segment[name].selector = selector;
    state.segment[name].base = u64(selector) << 4;
    state.segment[name].unusable = false;
    return Result::ok;
  }
  if (state.v86()) {
    state.segment[name] = v86_segment(selector);
    return Result::ok;
  }
  if (name == ss) return load_stack_segment(*this, selector);
  if (null_selector(selector)) {
    state.segment[name] = null_segment(selector);
    return Result::ok;
  }
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, descriptor));
  const u32 error = selector_error(selector);
  if (!descriptor.readable()) return raise(exception::gp, error);
  const u8 rpl = selector & 3;
  if (!descriptor.conforming() && (rpl > descriptor.segment.dpl || state.cpl > descriptor.segment.dpl)) {
    return raise(exception::gp, error);
  }
  if (!descriptor.segment.present) return raise(exception::np, error);
  ANYKVM_TRY(mark_accessed(*this, descriptor));
  state.segment[name] = descriptor.segment;
  return Result::ok;
}

Result Cpu::load_ldtr(u16 selector) {
  if (null_selector(selector)) {
    state.ldtr = null_segment(selector);
    return Result::ok;
  }
  const u32 error = selector_error(selector);
  if (selector & 4) return raise(exception::gp, error);
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, descriptor));
  if (descriptor.segment.s || descriptor.segment.type != system_type::ldt) return raise(exception::gp, error);
  if (!descriptor.segment.present) return raise(exception::np, error);
  ANYKVM_TRY(read_upper_half(*this, selector, exception::gp, 0, descriptor));
  if (!canonical_base(descriptor.segment.base)) return raise(exception::gp, error);
  state.ldtr = descriptor.segment;
  return Result::ok;
}

Result Cpu::load_tr(u16 selector) {
  if (null_selector(selector)) return gp();
  const u32 error = selector_error(selector);
  if (selector & 4) return raise(exception::gp, error);
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, descriptor));
  const u8 type = descriptor.segment.type;
  const bool available = type == system_type::tss || (type == system_type::tss16 && !state.long_mode());
  if (descriptor.segment.s || !available) return raise(exception::gp, error);
  if (!descriptor.segment.present) return raise(exception::np, error);
  ANYKVM_TRY(read_upper_half(*this, selector, exception::gp, 0, descriptor));
  if (!canonical_base(descriptor.segment.base)) return raise(exception::gp, error);
  descriptor.segment.type |= 2;  // busy
  const u8 byte = u8(descriptor.low >> 40 | 2);
  ANYKVM_TRY(write_as(descriptor.address + 5, &byte, 1, system_privilege));
  state.tr = descriptor.segment;
  return Result::ok;
}

Result Cpu::probe_selector(u16 selector, SelectorProbe which, bool& ok, u32& value) {
  ok = false;
  if (null_selector(selector) || !selector_in_table(*this, selector)) return Result::ok;
  Descriptor descriptor;
  ANYKVM_TRY(read_descriptor(*this, selector, exception::gp, 0, descriptor));
  const Segment& segment = descriptor.segment;
  const u8 rpl = selector & 3;
  const bool privileged = descriptor.conforming() || (rpl <= segment.dpl && state.cpl <= segment.dpl);
  if (!privileged) return Result::ok;

  if (which == SelectorProbe::verr || which == SelectorProbe::verw) {
    ok = which == SelectorProbe::verr ? descriptor.readable() : descriptor.writable();
    return Result::ok;
  }
  if (!segment.s) {
    using namespace system_type;
    const u8 type = segment.type;
    const bool wide = type == ldt || type == tss || type == tss_busy, narrow = type == tss16 || type == tss16_busy;
    const bool gate = type == call_gate || (!state.long_mode() && (type == call_gate16 || type == task_gate));
    if (!wide && !(narrow && !state.long_mode()) && !(gate && which == SelectorProbe::lar)) return Result::ok;
  }
  ok = true;
  value = which == SelectorProbe::lar ? u32(descriptor.low >> 32) & 0x00ffff00 : segment.limit;
  return Result::ok;
}

}  // namespace anykvm::x86
