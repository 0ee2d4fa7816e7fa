// The bytes that a fuzzer made up, read as the decisions of a test. Behind their end everything is zero, so that every
// prefix of an input is an input.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "x86/types.h"

namespace anykvm::fuzz {

class Input {
 public:
  explicit Input(std::span<const u8> bytes) : bytes_(bytes) {}

  bool empty() const { return bytes_.empty(); }
  template <class T>
  T take() {
    T value{};
    const std::span<const u8> from = bytes(sizeof value);
    std::memcpy(&value, from.data(), from.size());
    return value;
  }
  u8 byte() { return take<u8>(); }
  bool flag() { return byte() & 1; }
  /// 0 .. count - 1
  unsigned below(unsigned count) { return byte() % count; }
  /// Up to count bytes.
  std::span<const u8> bytes(std::size_t count) {
    const std::span<const u8> result = bytes_.first(std::min(count, bytes_.size()));
    bytes_ = bytes_.subspan(result.size());
    return result;
  }
  /// As bytes(), their number first.
  std::span<const u8> chunk(unsigned limit) { return bytes(byte() % (limit + 1)); }

  /// A number of the kind that code gets wrong: small, a power of two, an edge of an address space, or anything.
  u64 number() {
    const u8 kind = byte();
    switch (kind & 7) {
      case 0: return byte();
      case 1: return take<u16>();
      case 2: return take<u32>();
      case 3: return take<u64>();
      case 4: return u64(s64(take<signed char>()));
      case 5: return 1ull << (kind >> 3) << (byte() & 32);
      case 6: return (1ull << (byte() & 63)) - 1 - (kind >> 3);
      default: {
        static constexpr u64 edges[] = {0,          0x7fffffff,         0x80000000,         0xffffffff,
                                        0xffff,     0x7fffffffffff,     0x800000000000,     0xffff800000000000,
                                        1ull << 32, 0x8000000000000000, 0x7fffffffffffffff, ~0ull,
                                        0xfee00000, 0xfec00000,         0xfffffffffffff,    0xff};
        return edges[kind >> 4] - (kind >> 3 & 1);
      }
    }
  }

 private:
  std::span<const u8> bytes_;
};

/// One target: never crashes, hangs or leaks, whatever the bytes. Aborts when something that must hold does not.
using Target = void(std::span<const u8>);
Target ioctl_sequence;  ///< calls on the ABI
Target guest;           ///< guest code on a CPU in any state
Target loader;          ///< kernel images, and what a driver puts into virtqueues

}  // namespace anykvm::fuzz
