// Faults whose gates do not work.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::broken_delivery() {
  // Faults of these instructions meet gates that do not work: double faults. The double fault's own gate stays.
  for (unsigned n = 1 + below(2); n-- > 0;) {
    static constexpr u8 vectors[] = {0, 1, 5, 6, 10, 11, 12, 13, 14, 17, 0x50};
    const u64 at = LONG_IDT + 16 * any_of(vectors);
    const u64 value = pristine(at);
    switch (below(5)) {
      case 0: patch(at, value & ~(1ull << 47)); break;
      case 1: patch(at, value ^ 1ull << (40 + below(4))); break;
      case 2: patch(at, (value & ~0xffff0000ull) | u64(selector()) << 16); break;
      case 3: patch(at, (value & ~(7ull << 32)) | u64(5 + below(3)) << 32); break;
      default: patch(at, random_gate()); break;
    }
  }
  if (below(3) == 0) window_tables();
  if (below(6) == 0) patch(LONG_TSS + 4, strange_address());
}

void LongGenerator::faulting(Emitter& code) {
  switch (below(10)) {
    case 0: code.bytes({0x31, 0xc9, 0xf7, 0xf1}); break;  // DIV by 0
    case 1: code.bytes({0x0f, 0x0b}); break;
    case 2:
    case 3: code.load(0, selector()).bytes({0x8e, 0xc0}); break;
    case 4: code.load(0, 0xd8).bytes({0x8e, any_of({0xd0u, 0xe0u})}); break;
    case 5:
      if (bits_ == 64) code.load(0, strange_address()).bytes({0x48, any_of({0x8bu, 0x89u}), 0x08});
      break;
    case 6:
      if (bits_ == 64) code.load(0, window_address()).bytes({0x48, any_of({0x8bu, 0x89u}), 0x08});
      break;
    case 7: code.bytes({0xcd, any_of({0x50u, 0x0du, 0x03u, 0x20u, 0x60u, 0xffu})}); break;
    case 8: code.bytes({0xcc}); break;
    default: code.load(0, LONG_USER_STACK + 64 - base_).prefix_for_rax().bytes({0x89, 0x00}); break;
  }
}

}  // namespace anykvm::oracle
