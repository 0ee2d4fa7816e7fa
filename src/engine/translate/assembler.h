// Appends x86-64 machine code to a buffer: the few instructions that the translator adds around the guest's own.
#pragma once

#include <cstddef>
#include <cstring>

#include "x86/types.h"

namespace anykvm::engine::translate {

/// Host registers by number; the guest's keep their own where they can (see registers.h).
using Register = u8;

/// Where a memory operand lies: [base + index + displacement] of the host's.
struct Place {
  int base = -1, index = -1;  ///< host registers; -1: none
  s32 displacement = 0;
};

class Assembler {
 public:
  Assembler(u8* at, u8* end) : at_(at), end_(end) {}

  u8* here() const { return at_; }
  bool overflowed() const { return overflowed_; }

  void byte(unsigned value) { append(u8(value)); }
  /// Up to eight.
  template <class... T>
  void bytes(T... values) {
    static_assert(sizeof...(T) <= sizeof(u64));
    u64 word = 0;
    unsigned shift = 0;
    ((word |= u64(u8(values)) << shift, shift += 8), ...);
    append_word(word, sizeof...(T));
  }
  void word(u32 value) { append(u16(value)); }
  void dword(u32 value) { append(value); }
  void qword(u64 value) { append(value); }
  /// Where up to `most` bytes may be put before advance(); nullptr: there is no room.
  u8* reserve(unsigned most) {
    if (end_ - at_ >= std::ptrdiff_t(most)) return at_;
    overflowed_ = true;
    return nullptr;
  }
  void advance(u8* to) { at_ = to; }

  // --- register to register
  // -------------------------------------------------------------------------------------------
  void move(Register to, Register from) { bytes(rex(1, from, 0, to), 0x89, 0xc0 | (from & 7) << 3 | (to & 7)); }
  void move32(Register to, Register from) { bytes(rex(0, from, 0, to), 0x89, 0xc0 | (from & 7) << 3 | (to & 7)); }
  void move_immediate32(Register to, u32 value) {
    bytes(rex(0, 0, 0, to), 0xb8 | (to & 7));
    dword(value);
  }
  void move_signed32(Register to, s32 value) {
    bytes(rex(1, 0, 0, to), 0xc7, 0xc0 | (to & 7));
    dword(u32(value));
  }
  void move_immediate64(Register to, u64 value) {
    bytes(rex(1, 0, 0, to), 0xb8 | (to & 7));
    qword(value);
  }
  void and_immediate32(Register reg, u32 value) {
    bytes(rex(0, 0, 0, reg), 0x81, 0xe0 | (reg & 7));
    dword(value);
  }
  void compare_immediate(Register reg, s32 value) {
    bytes(rex(1, 0, 0, reg), 0x81, 0xf8 | (reg & 7));
    dword(u32(value));
  }
  void compare32_immediate(Register reg, u32 value) {
    bytes(rex(0, 0, 0, reg), 0x81, 0xf8 | (reg & 7));
    dword(value);
  }
  void test_byte_immediate(Register reg, u8 value) { bytes(rex(0, 0, 0, reg), 0xf6, 0xc0 | (reg & 7), value); }

  /// lea to, [base + index * 2^shift + displacement]; flags stay. index < 0: none. base < 0: none.
  void lea(Register to, int base, int index, unsigned shift, s32 displacement, bool wide = true) {
    bytes(rex(wide, to, index, base), 0x8d);
    if (base >= 0) {
      address(to, Register(base), displacement, index, shift);
      return;
    }
    bytes((to & 7) << 3 | 4, shift << 6 | (index < 0 ? 4 : unsigned(index) & 7) << 3 | 5);
    dword(u32(displacement));
  }

  /// lea to, [rip + ...]: the address of what is aimed at later.
  u8* load_address_later(Register to) {
    bytes(rex(1, to, 0, 0), 0x8d, (to & 7) << 3 | 5);
    return hole();
  }

  // --- the context, through the GS base
  // -------------------------------------------------------------------------------
  /// op reg, gs:[offset + index * 2^shift]
  void context_op(u8 opcode, Register reg, u32 offset, int index = -1, unsigned shift = 0, bool wide = true) {
    bytes(0x65, rex(wide, reg, index, 0), opcode, (reg & 7) << 3 | 4,
          shift << 6 | (index < 0 ? 4 : unsigned(index) & 7) << 3 | 5);
    dword(offset);
  }
  void load(Register to, u32 offset, int index = -1, unsigned shift = 0) { context_op(0x8b, to, offset, index, shift); }
  void store(u32 offset, Register from, int index = -1, unsigned shift = 0) {
    context_op(0x89, from, offset, index, shift);
  }
  /// 64 bits, the value sign-extended, or 32.
  void store_immediate(u32 offset, u32 value, bool wide) {
    byte(0x65);
    if (wide) byte(0x48);
    bytes(0xc7, 0x04, 0x25);
    dword(offset);
    dword(value);
  }
  /// cmp dword gs:[offset], value
  void compare_context(u32 offset, u8 value) {
    bytes(0x65, 0x83, 0x3c, 0x25);
    dword(offset);
    byte(value);
  }
  void add(Register to, u32 offset, int index = -1) { context_op(0x03, to, offset, index); }
  void subtract(Register from, u32 offset, int index) { context_op(0x2b, from, offset, index); }
  void jump_context(u32 offset, int index, unsigned shift) {
    byte(0x65);
    if (index >= 8) byte(0x42);
    bytes(0xff, 0x24, shift << 6 | (unsigned(index) & 7) << 3 | 5);
    dword(offset);
  }
  /// pext to, from, gs:[offset]: gathers the masked bits; flags stay.
  void extract_bits(Register to, Register from, u32 offset) { parallel_bits(0x02, to, from, offset); }
  /// pdep to, from, gs:[offset]: spreads the low bits to the masked ones; flags stay.
  void deposit_bits(Register to, Register from, u32 offset) { parallel_bits(0x03, to, from, offset); }

  // --- shifts that leave the flags alone
  // -------------------------------------------------------------------------------
  void shift_left(Register to, Register from, Register count) { shift(0x01, to, from, count); }
  void shift_right_signed(Register to, Register from, Register count) { shift(0x02, to, from, count); }
  void shift_right_unsigned(Register to, Register from, Register count) { shift(0x03, to, from, count); }
  /// rorx to, from, count
  void rotate_right(Register to, Register from, u8 count) {
    bytes(0xc4, (~to >> 3 & 1) << 7 | 0x40 | (~from >> 3 & 1) << 5 | 0x03, 0xfb, 0xf0,
          0xc0 | (to & 7) << 3 | (from & 7), count);
  }
  void move8(Register to, Register from) { bytes(rex(0, from, 0, to), 0x88, 0xc0 | (from & 7) << 3 | (to & 7)); }
  void sign_extend32(Register to, Register from) {
    bytes(rex(1, to, 0, from), 0x63, 0xc0 | (to & 7) << 3 | (from & 7));
  }

  // --- memory through a register
  // --------------------------------------------------------------------------------------
  void load_from(Register to, Register base, s32 displacement, bool wide = true) {
    bytes(rex(wide, to, 0, base), 0x8b);
    address(to, base, displacement);
  }
  /// movzx to, word [base + displacement]
  void load_word(Register to, Register base, s32 displacement) {
    bytes(rex(0, to, 0, base), 0x0f, 0xb7);
    address(to, base, displacement);
  }
  /// movsxd to, dword [base + displacement]
  void load_signed32(Register to, Register base, s32 displacement) {
    bytes(rex(1, to, 0, base), 0x63);
    address(to, base, displacement);
  }
  void store_to(Register base, s32 displacement, Register from) {
    bytes(rex(1, from, 0, base), 0x89);
    address(from, base, displacement);
  }
  /// 64 bits, or 32.
  void load_from(Register to, const Place& from, bool wide) {
    bytes(rex(wide, to, from.index, from.base), 0x8b);
    address(to, from);
  }
  void store_to(const Place& to, Register from, bool wide) {
    bytes(rex(wide, from, to.index, to.base), 0x89);
    address(from, to);
  }
  void store_signed32(const Place& to, s32 value, bool wide) {
    bytes(rex(wide, 0, to.index, to.base), 0xc7);
    address(0, to);
    dword(u32(value));
  }
  void address(unsigned reg, const Place& place, bool scaled = false) {
    address(reg, Register(place.base), place.displacement, place.index, 0, scaled);
  }
  /// ModRM, SIB and displacement of [base + index * 2^shift + displacement], the shortest there is. index < 0: none.
  /// scaled: a displacement of 8 bits counts in units (EVEX).
  void address(unsigned reg, Register base, s32 displacement, int index = -1, unsigned shift = 0, bool scaled = false) {
    if (u8* at = reserve(most_address_bytes)) at_ = put_address(at, reg, base, displacement, index, shift, scaled);
  }
  static constexpr unsigned most_address_bytes = 8;
  static u8* put_address(u8* at, unsigned reg, const Place& place, bool scaled) {
    return put_address(at, reg, Register(place.base), place.displacement, place.index, 0, scaled);
  }
  /// As address(), at `at`; returns what is behind it. Up to most_address_bytes are written.
  static u8* put_address(u8* at, unsigned reg, Register base, s32 displacement, int index, unsigned shift,
                         bool scaled) {
    const bool none = displacement == 0 && (base & 7) != 5;
    const bool narrow = displacement == 0 || (!scaled && displacement == s8(displacement));
    const bool sib = index >= 0 || (base & 7) == 4;
    *at++ = u8((none ? 0u : narrow ? 0x40u : 0x80u) | (reg & 7) << 3 | (sib ? 4u : base & 7u));
    *at = u8(shift << 6 | (index < 0 ? 4 : unsigned(index) & 7) << 3 | (base & 7u));
    at += sib;
    std::memcpy(at, &displacement, sizeof displacement);
    return at + (none ? 0 : narrow ? 1 : 4);
  }

  // --- branches
  // -------------------------------------------------------------------------------------------------------
  void jump(const u8* target) {
    byte(0xe9);
    relative(target);
  }
  void call(const u8* target) {
    byte(0xe8);
    relative(target);
  }
  /// jmp [rip + ...]: through what is aimed at later.
  u8* jump_through_later() {
    bytes(0xff, 0x25);
    return hole();
  }
  /// jmp [base + index * 8]
  void jump_through(Register base, Register index) {
    bytes(rex(0, 0, index, base), 0xff);
    address(4, base, 0, index, 3);
  }
  /// A jump to be aimed later: returns the place of its 32-bit displacement.
  u8* jump_later() {
    byte(0xe9);
    return hole();
  }
  u8* jump_if_later(unsigned condition) {
    bytes(0x0f, 0x80 | condition);
    return hole();
  }
  u8* jump_if_rcx_zero_later() {
    bytes(0xe3, 0);
    return at_ - 1;
  }
  u8* jump_if_short_later(unsigned condition) {
    bytes(0x70 | condition, 0);
    return at_ - 1;
  }
  u8* jump_short_later() {
    bytes(0xeb, 0);
    return at_ - 1;
  }
  void aim_short(u8* at) {
    if (!overflowed_) *at = u8(at_ - (at + 1));
  }
  void aim(u8* at, const u8* target) {
    if (overflowed_) return;
    const s32 distance = s32(target - (at + 4));
    std::memcpy(at, &distance, 4);
  }
  void aim(u8* at) { aim(at, at_); }

  void push(Register reg) {
    if (reg >= 8) byte(0x41);
    byte(0x50 | (reg & 7));
  }
  void pop(Register reg) {
    if (reg >= 8) byte(0x41);
    byte(0x58 | (reg & 7));
  }
  /// add qword [rsp + displacement], value
  void add_to_stack(u8 displacement, u8 value) { bytes(0x48, 0x83, 0x44, 0x24, displacement, value); }
  void push_flags() { byte(0x9c); }
  void ret() { byte(0xc3); }

 private:
  /// index < 0: none.
  static unsigned rex(unsigned w, unsigned reg, int index, int base) {
    return 0x40 | (w ? 8u : 0u) | (reg >> 3 & 1) << 2 | (index >= 8) << 1 | (base >= 8);
  }
  /// VEX.0F38 /r with mandatory prefix pp, 64 bits: [C4] [R~ X~ B~ map 2] [W vvvv~ L pp].
  void parallel_bits(unsigned pp, Register to, Register from, u32 offset) {
    byte(0x65);
    bytes(0xc4, (~to >> 3 & 1) << 7 | 0x60 | 0x02, 0x80 | (~from & 15) << 3 | pp, 0xf5, (to & 7) << 3 | 4, 0x25);
    dword(offset);
  }
  void shift(unsigned pp, Register to, Register from, Register count) {
    bytes(0xc4, (~to >> 3 & 1) << 7 | 0x40 | (~from >> 3 & 1) << 5 | 0x02, 0x80 | (~count & 15) << 3 | pp, 0xf7,
          0xc0 | (to & 7) << 3 | (from & 7));
  }
  template <class T>
  void append(T value) {
    if (end_ - at_ < std::ptrdiff_t(sizeof value)) {
      overflowed_ = true;
      return;
    }
    std::memcpy(at_, &value, sizeof value);
    at_ += sizeof value;
  }
  /// `count` bytes of it: there has to be room for all eight.
  void append_word(u64 word, unsigned count) {
    if (end_ - at_ < std::ptrdiff_t(sizeof word)) {
      overflowed_ = true;
      return;
    }
    std::memcpy(at_, &word, sizeof word);
    at_ += count;
  }
  void relative(const u8* target) { dword(u32(s32(target - (at_ + 4)))); }
  u8* hole() {
    u8* at = at_;
    dword(0);
    return at;
  }

  u8* at_;
  u8* end_;
  bool overflowed_ = false;
};

}  // namespace anykvm::engine::translate
