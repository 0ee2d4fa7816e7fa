// Writes the machine code of generated tests, for code of 16, 32 and 64 bits.
#pragma once

#include <span>

#include "x86/types.h"

namespace anykvm::oracle {

class Emitter {
 public:
  Emitter(std::span<u8> room, unsigned code_bits) : room_(room), bits_(code_bits) {}

  unsigned size() const { return at_; }
  unsigned code_bits() const { return bits_; }
  bool is_full(unsigned needed) const { return at_ + needed > room_.size(); }

  Emitter& bytes(std::initializer_list<unsigned> values) {
    for (unsigned value : values) value_of(value, 1);
    return *this;
  }
  Emitter& value_of(u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes && at_ < room_.size(); ++i) room_[at_++] = u8(value >> 8 * i);
    return *this;
  }
  /// The prefix that makes the next instruction's operands `bytes` wide: 2, 4, or 8 in 64-bit code.
  Emitter& width(unsigned bytes) {
    if (bytes == 8) return this->bytes({0x48});
    return (bytes == 2) != (bits_ == 16) ? this->bytes({0x66}) : *this;
  }
  /// MOV of a constant to a register (0-7), as wide as the mode has them.
  Emitter& load(unsigned reg, u64 value) {
    if (bits_ == 64) return bytes({0x48, 0xb8 + reg}).value_of(value, 8);
    return width(4).bytes({0xb8 + reg}).value_of(value, 4);
  }
  /// ModRM (and SIB) of a memory operand [address] that needs no register; 16-bit code has 16-bit addresses.
  Emitter& at(unsigned reg, u32 address) {
    if (bits_ == 64) return bytes({0x04 | reg << 3, 0x25}).value_of(address, 4);
    if (bits_ == 32) return bytes({0x05 | reg << 3}).value_of(address, 4);
    return bytes({0x06 | reg << 3}).value_of(address & 0xffff, 2);
  }
  /// ModRM of [RAX]; in 16-bit code by a 32-bit address.
  Emitter& prefix_for_rax() { return bits_ == 16 ? bytes({0x67}) : *this; }

 private:
  std::span<u8> room_;
  unsigned bits_, at_ = 0;
};

}  // namespace anykvm::oracle
