// Transfers of control: far pointers, returns, fast calls, interrupts, segment loads; descriptors and gates for them.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::mutate_descriptors() {
  for (unsigned n = below(3); n-- > 0;) {
    // The start's own and the monitor's stay.
    static constexpr u16 slots[] = {0x80, 0x90,  0xa0,  0xb0,  0xb8,  0xc0,  0xd0,  0xd8,  0xe0, 0xe8,
                                    0xf0, 0x100, 0x110, 0x120, 0x140, 0x148, 0x150, 0x158, 0x160};
    const u64 address = LONG_GDT + any_of(slots);
    u64 value = pristine(address);
    const bool is_segment = value >> 44 & 1;
    switch (below(4)) {
      case 0: value ^= 1ull << (40 + below(4)); break;
      case 1: value ^= 1ull << (45 + below(3)); break;
      case 2:
        if (is_segment) value ^= 1ull << (53 + below(2));
        break;
      default:
        if (is_segment)
          value ^= 1ull << any_of({40u, 41u, 42u, 43u, 45u, 46u, 47u});
        else
          patch(address + 8, below(2) ? 1ull << (40 + below(5)) : 0xffff8000);
        break;
    }
    if (!is_segment && value >> 44 & 1) continue;
    patch(address, value);
  }
}

u64 LongGenerator::random_gate() {
  static constexpr u8 types[] = {14, 15, 14, 15, 14, 15, 12, 5, 6, 7, 0, 13};
  const u8 access = u8(any_of(types) | below(4) << 5 | (below(10) ? 0x80 : 0));
  static constexpr u16 targets[] = {code64_r0, code64_r0, conforming64, code64_r1, code64_r3, code32_r0};
  const u16 target = below(4) ? any_of(targets) : selector();
  const bool user = (target & ~7) == (code64_r3 & ~7);
  return gate(target, (user ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80, access, u8(below(2) ? 0 : below(8)));
}

void LongGenerator::test_gates() {
  for (u32 vector = 0x50; vector < 0x54; ++vector) {
    patch(LONG_IDT + 16 * vector, random_gate());
    if (below(8) == 0) patch(LONG_IDT + 16 * vector + 8, random_() << 32);  // reserved bits
  }
  if (below(8) == 0) patch(LONG_TSS + 4 + 8 * below(2), below(2) ? strange_address() : LONG_RSP0 + below(16));
}

u16 LongGenerator::code_selector() {
  static constexpr u16 likely[] = {
      code64_r0,    code64_r3, code32_r3, code32_r0, code16_r3, conforming64, conforming64 | 3,
      conforming32, code64_r1, 0xd0,      0xd8,      0x0c,      0x0f,         0};
  return below(4) ? any_of(likely) : selector();
}

u64 LongGenerator::target_of(u16 selector) {
  // No strange ones: TCG checks neither limits nor canonical form, and goes there.
  if ((selector & ~7) == (code16_r3 & ~7)) return LONG_USER_CODE + 0x80 - 0x10000;
  return ((selector & 3) == 3 ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80;
}

void LongGenerator::far_pointer(Emitter& code) {
  if (far_pointer_used_) return;  // there is room for one
  far_pointer_used_ = true;
  const unsigned width = any_of({2u, 4u, 4u});  // m16:64 is Intel's only; our CPU does as the host
  static constexpr u16 gates[] = {gate_r0, gate_r3, gate_conforming, gate_r1, gate_r0 | 3, 0x110, 0x120, 0x130, 0x160};
  const u16 to = below(3) ? code_selector() : any_of(gates);
  const u64 offset = target_of(to);
  if (bits_ != 64 && below(2)) {
    code.width(width).bytes({any_of({0xeau, 0x9au})}).value_of(offset, width).value_of(to, 2);
    return;
  }
  put_data(0x30, offset, width), put_data(0x30 + width, to, 2);
  code.width(width).bytes({0xff}).at(any_of({3u, 5u}), data_room(0x30));
}

void LongGenerator::returns(Emitter& code) {
  if (frame_used_) return;
  frame_used_ = true;
  const unsigned width = bits_ == 64 ? any_of({8u, 8u, 4u, 2u}) : any_of({4u, 4u, 2u});
  const bool is_iret = below(2);
  static constexpr u16 stacks[] = {data_r0, data_r3, data16_r3, data_r1, 0, 1, 3, 0xe0, 0xe8};
  const u16 to = code_selector(), stack_selector = below(3) ? any_of(stacks) : selector();
  u64 stack_pointer = (to & 3) == 3 ? LONG_USER_STACK : LONG_SUPER_DATA + 0x800;
  if ((stack_selector & ~7) == (data16_r3 & ~7)) stack_pointer = LONG_USER_STACK - 0x10000;
  if (below(16) == 0) stack_pointer = strange_address();
  unsigned at = 0;
  const auto word = [&](u64 value) { put_data(at, value, width), at += width; };
  word(target_of(to)), word(to);
  if (is_iret) word(flags_image());
  const unsigned extra = is_iret || below(2) ? 0 : 8;
  at += extra;
  word(stack_pointer), word(stack_selector);
  if (bits_ == 16) {
    code.width(4).bytes({0xbc}).value_of(data_room(0) & 0xffff, 4);
  } else {
    code.load(4, data_room(0));
  }
  code.width(width);
  if (is_iret)
    code.bytes({0xcf});
  else if (extra)
    code.bytes({0xca, extra, 0});
  else
    code.bytes({0xcb});
}

void LongGenerator::transfer(Emitter& code) {
  switch (below(14)) {
    case 0:
    case 1:
    case 2: far_pointer(code); break;
    case 3:
    case 4:
    case 5: returns(code); break;
    case 6: {  // SYSCALL and SYSENTER
      if (below(4) == 0) msr(0xc0000081, u64(selector()) << 48 | u64(selector()) << 32 | (random_() & 0xffff));
      if (below(4) == 0) msr(0x174, below(2) ? below(4) : 0x08 | below(4));
      code.bytes({0x0f, any_of({0x05u, 0x34u})});
      break;
    }
    case 7: {  // SYSRET, SYSEXIT
      const bool exits = below(2);
      const bool wide = bits_ == 64 && below(2);
      code.load(1, exits ? LONG_USER_STACK : below(8) ? LONG_USER_CODE + 0x80 : strange_address());
      code.load(2, below(8) ? LONG_USER_CODE + 0x80 : strange_address());
      if (!exits && bits_ == 64) code.bytes({0x49, 0xbb}).value_of(flags_image() & ~0x100ull, 8);
      if (wide) code.bytes({0x48});
      code.bytes({0x0f, exits ? 0x35u : 0x07u});
      break;
    }
    case 8:
    case 9:
    case 10: code.bytes({0xcd, 0x50 + below(4)}); break;
    case 11: code.bytes({any_of({0xccu, 0xceu, 0xfbu, 0xfau, 0x9cu})}); break;
    case 12: segment_load(code); break;
    default:
      code.width(bits_ == 64 ? 4 : 4).bytes({0x68}).value_of(u32(flags_image()) & ~0x100u, 4).bytes({0x9d});
      break;
  }
}

void LongGenerator::segment_load(Emitter& code) {
  code.load(0, selector());
  switch (below(3)) {
    case 0: code.bytes({0x8e, 0xc0 | below(6) << 3}); break;
    case 1: code.bytes({0x50, 0x0f, any_of({0xa1u, 0xa9u})}); break;
    default:
      put_data(0x40, (below(2) ? 0x1234 : LONG_USER_CODE), 4), put_data(0x44, selector(), 2);
      code.width(4).bytes({0x0f, any_of({0xb2u, 0xb4u, 0xb5u})}).at(5, data_room(0x40));
      break;
  }
}

}  // namespace anykvm::oracle
