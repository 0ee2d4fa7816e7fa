// Operands: general registers by size, memory addresses, the stack, near branches.
#pragma once

#include <cstring>

#include "engine/interpret/instruction.h"
#include "engine/native/decoded.h"

namespace anykvm::engine {

using x86::Access;
using x86::Cpu;
using x86::Result;

/// Returns from the enclosing handler unless the step succeeded.
#define ANYKVM_TRY(step)                                                                                 \
  do {                                                                                                   \
    if (const ::anykvm::x86::Result result_ = (step); result_ != ::anykvm::x86::Result::ok) [[unlikely]] \
      return result_;                                                                                    \
  } while (0)

constexpr u64 size_mask(unsigned bytes) { return bytes >= 8 ? ~0ull : (1ull << bytes * 8) - 1; }
constexpr u64 sign_extend(u64 value, unsigned bytes) {
  const unsigned shift = 64 - bytes * 8;
  return u64(s64(value << shift) >> shift);
}
constexpr bool is_canonical(u64 address) { return u64(s64(address << 16) >> 16) == address; }

inline u64 read_register(const Context& c, RegisterOperand reg, unsigned bytes) {
  return c.cpu.state.gpr[reg.index] >> reg.shift() & size_mask(bytes);
}
/// 32-bit writes clear the upper half; 8- and 16-bit writes leave the rest.
inline void write_register(Context& c, RegisterOperand reg, unsigned bytes, u64 value) {
  u64& full = c.cpu.state.gpr[reg.index];
  switch (bytes) {
    case 8: full = value; break;
    case 4: full = u32(value); break;
    case 2: std::memcpy(&full, &value, 2); break;
    default: std::memcpy(reinterpret_cast<u8*>(&full) + (reg.is_high_byte), &value, 1); break;
  }
}

/// While it exists, an access that leaves RAM ends in ExitKind::internal_error. See may_reach_devices().
class DeviceBar {
 public:
  explicit DeviceBar(Context& c) : port_(c.cpu.mmio) { port_.bar(true); }
  ~DeviceBar() { port_.bar(false); }
  DeviceBar(const DeviceBar&) = delete;
  DeviceBar& operator=(const DeviceBar&) = delete;

 private:
  x86::MmioPort& port_;
};

/// The offset that a memory operand names, before segmentation.
inline u64 effective_offset(const Context& c, const Instruction& i) {
  const u64* gpr = c.cpu.state.gpr;
  u64 offset = u64(s64(i.displacement));
  if (i.base >= 0) [[likely]]
    offset += i.base == Instruction::rip_relative ? c.next_rip : gpr[i.base];
  if (i.index >= 0) offset += gpr[i.index] << i.scale_shift;
  return offset & size_mask(i.address_bytes);
}

/// Applies segmentation to an offset. size: bytes accessed, for the limit check.
inline Result linear_address(Context& c, x86::SegmentName segment, u64 offset, unsigned size, Access access, Gva& out) {
  if (c.cpu.state.code_bits == 64) [[likely]] {
    out = offset;
    if (segment >= x86::fs) {
      out += c.cpu.state.segment[segment].base;
      // AMD's check the offset, too.
      if (!is_canonical(offset) && !c.cpu.canonical(offset) && host_is_amd()) [[unlikely]]
        return c.cpu.gp();
    }
    if ((!is_canonical(out) || !is_canonical(out + size - 1)) &&
        (!c.cpu.canonical(out) || !c.cpu.canonical(out + size - 1))) [[unlikely]]
      return c.cpu.raise(segment == x86::ss ? x86::exception::ss : x86::exception::gp, 0);
    return Result::ok;
  }
  return c.cpu.linear(segment, offset, size, access, out);
}

/// For accesses whose alignment is not checked.
inline x86::Privilege unaligned_rights(const Context& c) {
  return c.cpu.data_privilege == x86::Privilege::user_aligned ? x86::Privilege::user : c.cpu.data_privilege;
}

inline Result memory_address(Context& c, const Instruction& i, unsigned size, Access access, Gva& out) {
  return linear_address(c, i.segment, effective_offset(c, i), size, access, out);
}

inline Result read_memory(Context& c, const Instruction& i, unsigned bytes, u64& value) {
  Gva gva;
  ANYKVM_TRY(memory_address(c, i, bytes, Access::read, gva));
  value = 0;
  return c.cpu.read(gva, &value, bytes);
}
inline Result write_memory(Context& c, const Instruction& i, unsigned bytes, u64 value) {
  Gva gva;
  ANYKVM_TRY(memory_address(c, i, bytes, Access::write, gva));
  return c.cpu.write(gva, &value, bytes);
}

/// Reads the operand that ModRM.rm names: memory if there is any, else reg[which].
inline Result read_operand(Context& c, const Instruction& i, unsigned which, unsigned bytes, u64& value) {
  if (i.has_memory) return read_memory(c, i, bytes, value);
  value = read_register(c, i.reg[which], bytes);
  return Result::ok;
}
inline Result write_operand(Context& c, const Instruction& i, unsigned which, unsigned bytes, u64 value) {
  if (i.has_memory) return write_memory(c, i, bytes, value);
  write_register(c, i.reg[which], bytes, value);
  return Result::ok;
}

// --- the stack -----------------------------------------------------------------------------------------------------
inline unsigned stack_bytes(const Context& c) {
  return c.cpu.state.code_bits == 64 ? 8 : c.cpu.state.segment[x86::ss].db ? 4 : 2;
}
inline void set_stack_pointer(Context& c, u64 value) { write_register(c, {x86::rsp, 0}, stack_bytes(c), value); }

/// Stores below the stack pointer and moves it, or does neither.
inline Result push(Context& c, unsigned bytes, u64 value) {
  const u64 top = (c.cpu.state.gpr[x86::rsp] - bytes) & size_mask(stack_bytes(c));
  Gva gva;
  ANYKVM_TRY(linear_address(c, x86::ss, top, bytes, Access::write, gva));
  ANYKVM_TRY(c.cpu.write(gva, &value, bytes));
  set_stack_pointer(c, top);
  return Result::ok;
}
/// Reads the stack at `above` bytes over the stack pointer without moving it.
inline Result peek(Context& c, unsigned above, unsigned bytes, u64& value) {
  Gva gva;
  ANYKVM_TRY(linear_address(c, x86::ss, (c.cpu.state.gpr[x86::rsp] + above) & size_mask(stack_bytes(c)), bytes,
                            Access::read, gva));
  value = 0;
  return c.cpu.read(gva, &value, bytes);
}
inline Result pop(Context& c, unsigned bytes, u64& value) {
  ANYKVM_TRY(peek(c, 0, bytes, value));
  set_stack_pointer(c, c.cpu.state.gpr[x86::rsp] + bytes);
  return Result::ok;
}

// --- branches ------------------------------------------------------------------------------------------------------
/// Checks a near branch's target: canonical in 64-bit mode, inside the code segment elsewhere.
inline Result check_branch(Context& c, u64 target) {
  if (c.cpu.state.code_bits == 64) {
    if (!is_canonical(target) && !c.cpu.canonical(target)) [[unlikely]]
      return c.cpu.gp();
  } else if (target > c.cpu.state.segment[x86::cs].limit) [[unlikely]] {
    return c.cpu.gp();
  }
  return Result::ok;
}
inline Result branch(Context& c, u64 target) {
  ANYKVM_TRY(check_branch(c, target));
  c.next_rip = target;
  return Result::ok;
}

/// Cpu's operations that move RIP themselves (far transfers, IRET, SYSCALL) end an instruction like this.
inline Result moved_rip(Context& c, Result result) {
  if (result == Result::ok) c.next_rip = c.cpu.state.rip;
  return result;
}

/// The stack is made of 8, 4 or 2 byte elements as the operand size says; far pointers and pushes use it.
template <class T>
x86::ArithmeticFlags flags_of_subtraction(T left, T right) {
  x86::ArithmeticFlags flags;
  __asm__("cmp %2, %1\n\tlahf\n\tseto %%al\n\tmovw %%ax, %0" : "=m"(flags) : "q"(left), "q"(right) : "rax", "cc");
  return flags;
}

}  // namespace anykvm::engine
