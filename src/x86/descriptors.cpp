#include "x86/descriptors.h"

namespace anykvm::x86 {

Segment v86_segment(u16 selector) {
  return {.base = u64(selector) << 4,
          .limit = 0xffff,
          .selector = selector,
          .type = 3,
          .dpl = 3,
          .present = true,
          .s = true};
}

Segment parse_segment(u64 raw, u16 selector) {
  Segment out;
  out.selector = selector;
  out.base = (raw >> 16 & 0xffffff) | (raw >> 32 & 0xff000000);
  out.type = raw >> 40 & 0xf;
  out.s = raw >> 44 & 1;
  out.dpl = raw >> 45 & 3;
  out.present = raw >> 47 & 1;
  out.avl = raw >> 52 & 1;
  out.l = raw >> 53 & 1;
  out.db = raw >> 54 & 1;
  out.g = raw >> 55 & 1;
  const u32 limit = u32((raw & 0xffff) | (raw >> 32 & 0xf0000));
  out.limit = out.g ? limit << 12 | 0xfff : limit;
  return out;
}

bool inside_limit(const Segment& segment, u32 start, unsigned size) {
  const u64 last = u64(start) + size - 1;
  const bool expand_down = segment.s && (segment.type & 0xc) == 4;
  if (!expand_down) return last <= segment.limit;
  return start > segment.limit && last <= (segment.db ? 0xffffffff : 0xffff);
}

bool selector_in_table(const Cpu& cpu, u16 selector) {
  const CpuState& s = cpu.state;
  if (selector & 4)
    return s.ldtr.present && !s.ldtr.unusable && !null_selector(s.ldtr.selector) && (selector | 7) <= s.ldtr.limit;
  return (selector | 7) <= s.gdtr.limit;
}

Result read_descriptor(Cpu& cpu, u16 selector, u8 vector, u32 ext, Descriptor& out) {
  if (!selector_in_table(cpu, selector)) return cpu.raise(vector, selector_error(selector, ext));
  out.address = (selector & 4 ? cpu.state.ldtr.base : cpu.state.gdtr.base) + (selector & ~7u);
  ANYKVM_TRY(cpu.read_as(out.address, &out.low, 8, cpu.system_privilege));
  out.high = 0;
  out.segment = parse_segment(out.low, selector);
  return Result::ok;
}

Result read_upper_half(Cpu& cpu, u16 selector, u8 vector, u32 ext, Descriptor& descriptor) {
  if (!cpu.state.long_mode()) return Result::ok;
  if (!selector_in_table(cpu, u16(selector + 8))) return cpu.raise(vector, selector_error(selector, ext));
  ANYKVM_TRY(cpu.read_as(descriptor.address + 8, &descriptor.high, 8, cpu.system_privilege));
  if (descriptor.high >> 40 & 0x1f) return cpu.raise(vector, selector_error(selector, ext));
  descriptor.high &= 0xffffffff;
  descriptor.segment.base |= descriptor.high << 32;
  return Result::ok;
}

Result mark_accessed(Cpu& cpu, Descriptor& descriptor) {
  if (descriptor.segment.type & 1) return Result::ok;
  descriptor.low |= 1ull << 40;
  descriptor.segment.type |= 1;
  const u8 byte = u8(descriptor.low >> 40);
  return cpu.write_as(descriptor.address + 5, &byte, 1, cpu.system_privilege);
}

Result check_target(Cpu& cpu, const Segment& code, u64 rip, u32 ext) {
  const bool fits = cpu.state.long_mode() && code.l ? cpu.canonical(rip) : rip <= code.limit;
  return fits ? Result::ok : cpu.raise(exception::gp, ext);
}

}  // namespace anykvm::x86
