#include "isa/state.h"

namespace anykvm::isa {

unsigned lay_out(const Case& c, u8 (&out)[Case::max_code + 32]) {
  std::memcpy(out, c.code, c.code_length);
  u8* at = out + c.code_length;
  if (c.mode == Mode::code64) {
    // jmp [rip + n]: the pointer is aligned, so that RFLAGS.AC does not matter.
    u8 jump[6] = {0xff, 0x25, 0, 0, 0, 0};
    jump[2] = u8(-(c.code_offset + c.code_length + sizeof jump) & 7);
    std::memcpy(at, jump, sizeof jump), at += sizeof jump;
    for (unsigned n = jump[2]; n; --n) *at++ = 0xf4;
    std::memcpy(at, &exit_address, 8), at += 8;
  } else {
    if (c.mode == Mode::code16) *at++ = 0x66;
    *at++ = 0xea;  // jmp far
    std::memcpy(at, &exit_address, 4), at += 4;
    std::memcpy(at, &code64_selector, 2), at += 2;
  }
  return unsigned(at - out);
}

}  // namespace anykvm::isa
