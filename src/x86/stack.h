// Pushes and pops of control transfers: nothing reaches the registers before the transfer is certain.
#pragma once

#include "x86/descriptors.h"

namespace anykvm::x86 {

class Stack {
 public:
  /// `flat`: the 64-bit stack, without a segment. error: of the #SS that an overrun raises.
  Stack(Cpu& cpu, const Segment& segment, u64 rsp, Privilege privilege, bool flat, u32 error = 0)
      : cpu_(cpu), segment_(segment), rsp_(rsp), privilege_(privilege), flat_(flat), error_(error) {}
  /// The stack as it is.
  explicit Stack(Cpu& cpu)
      : Stack(cpu, cpu.state.segment[ss], cpu.state.gpr[x86::rsp], cpu.data_privilege, cpu.state.code_bits == 64) {}

  Result push(u64 value, unsigned bytes) {
    move(-s64(bytes));
    Gva gva;
    ANYKVM_TRY(address(bytes, gva));
    const u64 room[2] = {value};  // as wide as the widest single copy
    return cpu_.write_as(gva, room, bytes, privilege_);
  }
  /// Reads `above` bytes over the stack pointer.
  Result peek(unsigned above, u64& value, unsigned bytes) const {
    Stack there = *this;
    there.move(above);
    return there.pop(value, bytes);
  }
  Result pop(u64& value, unsigned bytes) {
    Gva gva;
    ANYKVM_TRY(address(bytes, gva));
    u64 room[2] = {};
    ANYKVM_TRY(cpu_.read_as(gva, room, bytes, privilege_));
    value = room[0];
    move(bytes);
    return Result::ok;
  }
  void move(s64 bytes) {
    if (flat_) {
      rsp_ += bytes;
    } else if (segment_.db) {
      rsp_ = u32(rsp_ + bytes);
    } else {
      rsp_ = (rsp_ & ~0xffffull) | u16(rsp_ + bytes);
    }
  }
  u64 rsp() const { return rsp_; }

 private:
  Result address(unsigned bytes, Gva& gva) {
    if (flat_) {
      gva = rsp_;
      return cpu_.canonical(gva) && cpu_.canonical(gva + bytes - 1) ? Result::ok : cpu_.raise(exception::ss, error_);
    }
    const u32 offset = segment_.db ? u32(rsp_) : u16(rsp_);
    gva = u32(segment_.base + offset);
    return inside_limit(segment_, offset, bytes) ? Result::ok : cpu_.raise(exception::ss, error_);
  }

  Cpu& cpu_;
  const Segment segment_;
  u64 rsp_;
  Privilege privilege_;
  bool flat_;
  u32 error_;
};

/// Rights of pushes onto a stack of privilege level `cpl`.
inline Privilege stack_privilege(const Cpu& cpu, u8 cpl) {
  if (cpl == 3) return Privilege::user;
  const bool smap = cpu.state.cr4 & cr4::smap && !(cpu.state.other_flags & flag::ac);
  return smap ? Privilege::supervisor : Privilege::supervisor_ac;
}

/// 64-bit TSS: RSP0-2 (index 0-2) or IST1-7 (index 4-10 is IST1-7).
Result read_tss_rsp(Cpu& cpu, unsigned index, u32 ext, u64& rsp);
/// 16/32-bit TSS: the stack of privilege level dpl, every check of its SS done.
Result read_tss_stack(Cpu& cpu, u8 dpl, u32 ext, Segment& segment, u64& rsp);

/// The checks of IRET and far RET on the code segment that they return to.
Result check_return_code(Cpu& cpu, u16 selector, Descriptor& code);
/// ... and on the stack segment, for the code segment's RPL. A null SS is taken where 64-bit mode allows it.
Result check_return_stack(Cpu& cpu, u16 selector, u8 rpl, bool to_long_code, Descriptor& stack);
/// Takes away data segments that the less privileged code at `cpl` may not use.
void drop_inner_segments(Cpu& cpu, u8 cpl);

}  // namespace anykvm::x86
