#include "isa/minimise.h"

#include <vector>

#include "isa/forms.h"

namespace anykvm::isa {

namespace {

/// The sequence without its instruction number `drop`; false: it has no such.
bool without(const Case& from, unsigned drop, Case& out) {
  unsigned at = 0, number = 0;
  while (at < from.code_length) {
    engine::Decoded d;
    u8 bytes[Case::max_code + 32];
    lay_out(from, bytes);
    const unsigned length =
        decode(from.mode, bytes + at, 15, d) ? d.instruction.length : unsigned(from.code_length - at);
    if (number++ == drop) {
      if (at + length > from.code_length) return false;
      out = from;
      std::memmove(out.code + at, out.code + at + length, from.code_length - at - length);
      out.code_length = u16(from.code_length - length);
      --out.instructions;
      return true;
    }
    at += length;
  }
  return false;
}

}  // namespace

Case minimise(const Case& from, const std::function<bool(const Case&)>& fails) {
  Case best = from;
  const auto attempt = [&](const Case& next) {
    if (!std::memcmp(&next, &best, sizeof best)) return false;
    if (!fails(next)) return false;
    best = next;
    return true;
  };
  // Back to front: what comes after the difference goes first.
  for (unsigned n = best.instructions; n-- > 0 && best.code_length;) {
    Case next;
    if (without(best, n, next) && next.code_length) attempt(next);
  }
  const auto with = [&](auto&& change) {
    Case next = best;
    change(next);
    return attempt(next);
  };
  for (unsigned n = best.poke_count; n-- > 0;) with([&](Case& c) { c.pokes[n] = c.pokes[--c.poke_count]; });
  for (unsigned n = 0; n < 16; ++n)
    if (!with([&](Case& c) { c.in.gpr[n] = 0; })) with([&](Case& c) { c.in.gpr[n] = u32(c.in.gpr[n]); });
  with([](Case& c) { c.in.rflags = 0x202; });
  for (unsigned bit = 0; bit < 22; ++bit)
    if (bit != 1 && bit != 9) with([&](Case& c) { c.in.rflags &= ~(1ull << bit); });
  with([](Case& c) { c.in.set_mxcsr(0x1f80); });
  with([](Case& c) { c.in.base[0] = c.in.base[1] = 0; });
  with([](Case& c) {
    std::memset(c.in.fx, 0, 24), std::memset(c.in.fx + 32, 0, 128);
    c.in.fx[0] = 0x7f, c.in.fx[1] = 3;
  });
  for (unsigned n = 0; n < 8; ++n) with([&](Case& c) { std::memset(c.in.fx + 32 + 16 * n, 0, 16); });
  for (unsigned n = 0; n < 16; ++n) {
    with([&](Case& c) { std::memset(c.in.ymm_high[n], 0, 16), std::memset(c.in.zmm_high[n], 0, 32); });
    for (unsigned half = 0; half < 2; ++half) with([&](Case& c) { std::memset(c.in.xmm(n) + 8 * half, 0, 8); });
    with([&](Case& c) { std::memset(c.in.zmm_upper[n], 0, 64); });
  }
  with([](Case& c) { std::memset(c.in.opmask, 0, sizeof c.in.opmask); });
  return best;
}

}  // namespace anykvm::isa
