// The source of randomness of one case: small, fast, seeded by the run's seed and the case's number.
#pragma once

#include "x86/types.h"

namespace anykvm::isa {

class Random {
 public:
  Random(u64 seed, u64 stream) : state_(seed * 0x9e3779b97f4a7c15 ^ (stream + 1) * 0xd1342543de82ef95) { (void)next(); }

  u64 next() {  // splitmix64
    u64 z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  unsigned below(unsigned n) { return unsigned((next() >> 32) * n >> 32); }
  bool one_in(unsigned n) { return below(n) == 0; }
  template <class T, unsigned n>
  T pick(const T (&from)[n]) {
    return from[below(n)];
  }

 private:
  u64 state_;
};

}  // namespace anykvm::isa
