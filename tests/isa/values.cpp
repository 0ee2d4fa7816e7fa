#include "isa/values.h"

#include <cstring>

namespace anykvm::isa {

u64 any_integer(Random& random) {
  switch (random.below(9)) {
    case 0: return 0;
    case 1: return ~0ull;
    case 2: return 1ull << random.below(64);
    case 3: return (1ull << random.below(64)) - 1;
    case 4: return random.below(70);
    case 5: return -u64(random.below(70));
    case 6: {
      static constexpr u64 edges[] = {0x7f,       0x80,        0xff,       0x7fff,     0x8000,     0xffff,
                                      0x7fffffff, 0x80000000u, 0xffffffff, ~0ull >> 1, 1ull << 63, 0x8080808080808080};
      return random.pick(edges);
    }
    default: return random.next();
  }
}

u32 any_single(Random& random) {
  static constexpr u32 edges[] = {0,          0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000,
                                  0x7fc00000, 0xffc00001, 0x7f800001, 0xffbfffff, 0x00000001, 0x807fffff,
                                  0x00800000, 0x80800000, 0x7f7fffff, 0xff7fffff, 0x4f000000, 0xcf000000,
                                  0x5f000000, 0x4b000001, 0x3f000000, 0x34000000, 0x33ffffff, 0x00400000};
  switch (random.below(3)) {
    case 0: return random.pick(edges);
    case 1: return u32(random.next());
    default: return (u32(random.next()) & 0x807fffff) | (100 + random.below(60)) << 23;  // near 1
  }
}

u64 any_double(Random& random) {
  static constexpr u64 edges[] = {0,
                                  1ull << 63,
                                  0x3ff0000000000000,
                                  0xbff0000000000000,
                                  0x7ff0000000000000,
                                  0xfff0000000000000,
                                  0x7ff8000000000000,
                                  0xfff8000000000001,
                                  0x7ff0000000000001,
                                  0xfff7ffffffffffff,
                                  1,
                                  0x800fffffffffffff,
                                  0x0010000000000000,
                                  0x8010000000000000,
                                  0x7fefffffffffffff,
                                  0xffefffffffffffff,
                                  0x41e0000000000000,
                                  0xc1e0000000000000,
                                  0x43e0000000000000,
                                  0xc3e0000000000000,
                                  0x3fe0000000000000,
                                  0x47efffffe0000000,
                                  0x36a0000000000000,
                                  0x380fffffffffffff};
  switch (random.below(3)) {
    case 0: return random.pick(edges);
    case 1: return random.next();
    default: return (random.next() & 0x800fffffffffffff) | u64(1023 - 40 + random.below(100)) << 52;
  }
}

void any_extended(Random& random, u8* out) {
  u64 mantissa = random.next();
  u16 exponent = u16(random.next() & 0x8000);
  static constexpr u64 mantissas[] = {0,
                                      1ull << 63,
                                      1,
                                      ~0ull,
                                      0xc000000000000000,
                                      0x8000000000000001,
                                      0x4000000000000000,
                                      0x7fffffffffffffff,
                                      0xfffffffffffff800,
                                      0xffffff0000000000};
  if (random.one_in(2)) mantissa = random.pick(mantissas);
  switch (random.below(8)) {
    case 0: break;                                           // zero, denormal, pseudo-denormal
    case 1: exponent |= 0x7fff; break;                       // infinity, NaN, and those without the integer bit
    case 2: exponent |= u16(random.next() & 0x7fff); break;  // any, unnormal ones too
    case 3: exponent |= random.one_in(2) ? 1 : 0x7ffe; break;
    case 4: {  // an integer
      const long double value = static_cast<long double>(s64(any_integer(random)));
      std::memcpy(out, &value, 10);
      return;
    }
    default:
      exponent |= u16(0x3fff - 70 + random.below(140));
      mantissa |= 1ull << 63;
      break;
  }
  std::memcpy(out, &mantissa, 8);
  std::memcpy(out + 8, &exponent, 2);
}

u64 any_lane(Random& random, Lanes lanes) {
  switch (lanes) {
    case Lanes::integers: return any_integer(random);
    case Lanes::singles: return any_single(random) | u64(any_single(random)) << 32;
    case Lanes::doubles: return any_double(random);
    case Lanes::halves: {
      static constexpr u16 edges[] = {0,      0x8000, 0x3c00, 0x7c00, 0xfc00, 0x7e00,
                                      0x7c01, 0xfdff, 1,      0x83ff, 0x0400, 0x7bff};
      u64 value = random.next();
      for (unsigned at = 0; at < 64; at += 16)
        if (random.one_in(2)) value = (value & ~(0xffffull << at)) | u64(random.pick(edges)) << at;
      return value;
    }
    default: return any_lane(random, Lanes(1 + random.below(4)));
  }
}

}  // namespace anykvm::isa
