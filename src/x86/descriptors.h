// Segment descriptors: their form in memory, and the tables they are read from.
// Reference: Intel SDM volume 3 chapter 3.4-3.5; AMD64 manual volume 2 chapter 4.
#pragma once

#include "x86/cpu.h"

/// Leaves the function with a result that is not ok.
#define ANYKVM_TRY(expression)                                                                          \
  do {                                                                                                  \
    if (const ::anykvm::x86::Result try_result = (expression); try_result != ::anykvm::x86::Result::ok) \
      return try_result;                                                                                \
  } while (0)

namespace anykvm::x86 {

/// Types of system descriptors.
namespace system_type {
inline constexpr u8 tss16 = 1, ldt = 2, tss16_busy = 3, call_gate16 = 4, task_gate = 5, interrupt_gate16 = 6,
                    trap_gate16 = 7, tss = 9, tss_busy = 11, call_gate = 12, interrupt_gate = 14, trap_gate = 15;
}

struct Descriptor {
  u64 low = 0, high = 0;  ///< high: second half of a 16-byte one
  Gva address = 0;
  Segment segment;  ///< hidden part that a load would give

  bool code() const { return segment.s && segment.type & 8; }
  bool data() const { return segment.s && !(segment.type & 8); }
  bool conforming() const { return code() && segment.type & 4; }
  bool readable() const { return data() || (code() && segment.type & 2); }
  bool writable() const { return data() && segment.type & 2; }
  // as a gate
  u16 gate_selector() const { return u16(low >> 16); }
  u64 gate_offset() const { return (low & 0xffff) | (low >> 32 & 0xffff0000) | high << 32; }
};

inline bool null_selector(u16 selector) { return !(selector & ~3); }

/// A segment register that holds a null selector.
inline Segment null_segment(u16 selector, u8 dpl = 0) { return {.selector = selector, .dpl = dpl, .unusable = true}; }

/// Flat segments as SYSCALL and SYSENTER set them.
inline Segment flat_code(u16 selector, u8 dpl, bool long_code) {
  return {.limit = 0xffffffff,
          .selector = selector,
          .type = 0xb,
          .dpl = dpl,
          .present = true,
          .s = true,
          .l = long_code,
          .db = !long_code,
          .g = true};
}
inline Segment flat_data(u16 selector, u8 dpl) {
  return {.limit = 0xffffffff,
          .selector = selector,
          .type = 3,
          .dpl = dpl,
          .present = true,
          .s = true,
          .db = true,
          .g = true};
}
/// A segment of virtual-8086 mode.
Segment v86_segment(u16 selector);

Segment parse_segment(u64 raw, u16 selector);

/// Whether [start, start + size) lies in the segment, expand-down ones included.
bool inside_limit(const Segment& segment, u32 start, unsigned size);

/// Reads a selector's descriptor from the GDT or LDT. Outside the table: fault `vector` with the selector | ext.
Result read_descriptor(Cpu& cpu, u16 selector, u8 vector, u32 ext, Descriptor& out);
/// Whether the selector lies inside its table, for the instructions that ask instead of faulting.
bool selector_in_table(const Cpu& cpu, u16 selector);
/// In long mode reads the second half of a system descriptor and completes its base. The same fault.
Result read_upper_half(Cpu& cpu, u16 selector, u8 vector, u32 ext, Descriptor& descriptor);
/// Sets the accessed bit of a code or data segment in its table and in `descriptor`.
Result mark_accessed(Cpu& cpu, Descriptor& descriptor);

/// The error code that names a selector.
inline u32 selector_error(u16 selector, u32 ext = 0) { return (selector & 0xfffcu) | ext; }

/// The instruction or event pointer fits the code segment it goes to; else #GP(ext).
Result check_target(Cpu& cpu, const Segment& code, u64 rip, u32 ext = 0);

}  // namespace anykvm::x86
