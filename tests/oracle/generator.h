// What the generators of tests have in common: random choices, descriptors, the memory that they write.
#pragma once

#include <random>

#include "oracle/guest.h"

namespace anykvm::oracle {

inline u64 segment(u32 base, u32 limit, u8 access, u8 flags) {
  return (limit & 0xffff) | u64(base & 0xffffff) << 16 | u64(access) << 40 | u64(limit >> 16 & 15) << 48 |
         u64(flags) << 52 | u64(base >> 24) << 56;
}
/// `extra`: the parameters of a call gate, the number of the stack of long mode's others.
inline u64 gate(u16 selector, u32 offset, u8 access, u8 extra = 0) {
  return (offset & 0xffff) | u64(selector) << 16 | u64(extra) << 32 | u64(access) << 40 | u64(offset >> 16) << 48;
}

class Generator {
 public:
  Memory take() { return std::move(memory_); }

 protected:
  explicit Generator(u64 seed) : random_(seed), memory_(guest_ram) {}

  template <class T>
  void put(u64 address, T value) {
    oracle::put<T>(memory_, address, value);
  }
  u32 below(u32 n) { return u32(random_() % n); }
  template <class T, std::size_t n>
  T any_of(const T (&list)[n]) {
    return list[below(n)];
  }

  std::mt19937_64 random_;
  Memory memory_;
  u64 at_ = 0;            ///< the test that is being written
  unsigned patches_ = 0;  ///< how many it has so far
};

}  // namespace anykvm::oracle
