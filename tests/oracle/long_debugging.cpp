// Breakpoints and single steps.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::breakpoints() {
  u64 dr7 = 0x400 | (random_() & 0x300);
  for (unsigned n = 0; n < 4; ++n) {
    static constexpr u64 data[] = {LONG_USER_STACK,
                                   LONG_USER_STACK + 8,
                                   LONG_SUPER_DATA + 0x800,
                                   LONG_SUPER_DATA + 0x7f8,
                                   LONG_SUPER_DATA + 0x10,
                                   LONG_USER_STACK - 8,
                                   window + 0x10};
    if (below(2)) {
      set(at_ + LONG_TEST_DR + 8 * n, code_ + base_ + below(24));
      if (below(2)) dr7 |= u64(1 + below(3)) << 2 * n;
    } else {
      const unsigned kind = any_of({1u, 3u}), length = below(4);
      const u64 size = length == 2 ? 8 : length + 1;
      set(at_ + LONG_TEST_DR + 8 * n, (any_of(data) + below(8)) & ~(size - 1));
      if (below(4)) dr7 |= u64(1 + below(3)) << 2 * n;
      dr7 |= u64(kind | length << 2) << (16 + 4 * n);
    }
  }
  set(at_ + LONG_TEST_DR7, below(4) ? dr7 : 0x400);
  if (below(3) == 0) flags_ |= 0x100;
  if (below(6) == 0) flags_ |= 0x10000;
  set(at_ + LONG_TEST_FRAME + 16, flags_);
  if (below(4) == 0) set(at_ + LONG_TEST_CR4, boot_cr4_ | 8);
}

void LongGenerator::debugged(Emitter& code) {
  // Aligned: unaligned stores meet TCG's watchpoints all over the page.
  static constexpr u64 data[] = {LONG_USER_STACK, LONG_USER_STACK + 4, LONG_SUPER_DATA + 0x800, LONG_SUPER_DATA + 0xc};
  const u64 address = bits_ == 64 && below(4) == 0 ? window + 8 + below(3) * 4 : any_of(data) - base_;
  switch (below(15)) {
    case 0: code.bytes({0x90}); break;
    case 1: code.load(0, address).prefix_for_rax().bytes({0x8b, 0x08}); break;
    case 2: code.load(0, address).prefix_for_rax().bytes({0x89, 0x08}); break;
    case 3: code.load(0, address).prefix_for_rax().bytes({0x01, 0x08}); break;
    case 4: code.bytes({0x50}); break;
    case 5: code.bytes({0x58}); break;
    case 6:  // (not ICEBP, which TCG takes for its own debugger's)
    case 7: code.load(0, random_() & 0xefff).bytes({0x0f, any_of({0x21u, 0x23u}), 0xf0}); break;
    case 8: code.width(4).bytes({0x68}).value_of(u32(flags_image()), 4).bytes({0x9d}); break;
    case 9: code.bytes({0x9c}); break;
    case 10: code.bytes({0xeb, 0x01, 0x90}); break;
    case 11:  // MOV SS
      if (cpl_ == 0 || cpl_ == 3)
        code.load(0, cpl_ == 3 ? (bits_ == 16 ? data16_r3 : data_r3) : data_r0).bytes({0x8e, 0xd0});
      break;
    case 12: code.bytes({0xcd, 0x50}); break;
    case 13: code.bytes({any_of({0xfbu, 0xfbu, 0xfau})}); break;  // STI, whose shadow is for interrupts, CLI
    default:                                                      // a string operation
      code.load(1, 2).load(7, address).bytes({0xf3, any_of({0xaau, 0xabu})});
      break;
  }
}

}  // namespace anykvm::oracle
