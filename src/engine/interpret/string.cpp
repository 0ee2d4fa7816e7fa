// MOVS, STOS, LODS, CMPS, SCAS with their repeat prefixes. MOVS and STOS run whole stretches inside a page with the
// host's own REP MOVS/STOS, which has the guest's semantics even where source and destination overlap.
#include <algorithm>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

using x86::rax, x86::rcx, x86::rdi, x86::rsi;

bool backwards(const Context& c) { return c.cpu.state.other_flags & x86::flag::df; }
u64 step(const Context& c, const Instruction& i) { return backwards(c) ? -u64(i.operand_bytes) : i.operand_bytes; }
u64 counter(const Context& c, const Instruction& i) { return c.cpu.state.gpr[rcx] & size_mask(i.address_bytes); }
void advance(Context& c, const Instruction& i, u8 reg, u64 distance) {
  write_register(c, {reg, 0}, i.address_bytes, c.cpu.state.gpr[reg] + distance);
}
void count_down(Context& c, const Instruction& i, u64 done) {
  write_register(c, {rcx, 0}, i.address_bytes, counter(c, i) - done);
}

/// Between two iterations: whether to stop and let the run loop look around. RIP then stays on the instruction.
bool must_stop(const Context& c) {
  return c.cpu.attention.load(std::memory_order_relaxed) || c.cpu.mmio.has_writes() ||
         __atomic_load_n(c.cpu.immediate_exit, __ATOMIC_RELAXED) || c.one_iteration;
}

/// Runs `once` (one element, registers advanced) as the repeat prefix says.
template <class Once>
Result repeat(Context& c, const Instruction& i, Once once) {
  if (i.repeat == Repeat::none) return once();
  if (!counter(c, i)) return Result::ok;
  for (;;) {
    ANYKVM_TRY(once());
    count_down(c, i, 1);
    if (!counter(c, i)) return Result::ok;
    // A reply that this iteration used up must not answer the next one.
    if (c.cpu.mmio.replies_pending()) c.cpu.mmio.retire_instruction();
    if (must_stop(c)) {
      c.next_rip = c.cpu.state.rip;
      return Result::ok;
    }
  }
}

/// How many elements lie in the page of `address`, going up.
u64 elements_in_page(Gva address, unsigned bytes) { return (page_size - (address & ~page_mask)) / bytes; }

/// Elements of a forward REP that may run as one stretch: bounded by the counter and by the wrap of the address size.
u64 stretch(const Context& c, const Instruction& i, u64 offset) {
  const u64 room =
      i.address_bytes == 8 ? ~0ull : size_mask(i.address_bytes) - (offset & size_mask(i.address_bytes)) + 1;
  return std::min(counter(c, i), std::max<u64>(room / i.operand_bytes, 1));
}

Result source_address(Context& c, const Instruction& i, unsigned size, Gva& out) {
  return linear_address(c, i.segment, c.cpu.state.gpr[rsi] & size_mask(i.address_bytes), size, Access::read, out);
}
Result destination_address(Context& c, const Instruction& i, unsigned size, Access access, Gva& out) {
  return linear_address(c, x86::es, c.cpu.state.gpr[rdi] & size_mask(i.address_bytes), size, access, out);
}

Result move_string(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  return repeat(c, i, [&]() -> Result {
    Gva from, to;
    ANYKVM_TRY(source_address(c, i, bytes, from));
    if (i.repeat != Repeat::none && !backwards(c) && c.cpu.state.code_bits == 64 && !c.one_iteration &&
        destination_address(c, i, bytes, Access::write, to) == Result::ok) {
      const u64 count = std::min({stretch(c, i, c.cpu.state.gpr[rsi]), stretch(c, i, c.cpu.state.gpr[rdi]),
                                  elements_in_page(from, bytes), elements_in_page(to, bytes)});
      const unsigned length = unsigned(count * bytes);
      const u8* source = count > 1 ? c.cpu.mmu.lookup(from, length, Access::read, c.cpu.data_privilege) : nullptr;
      u8* destination = source ? c.cpu.mmu.lookup(to, length, Access::write, c.cpu.data_privilege) : nullptr;
      if (destination) {
        u64 n = count;
        const u8* s = source;
        switch (bytes) {
          case 1: __asm__ volatile("rep movsb" : "+S"(s), "+D"(destination), "+c"(n)::"memory"); break;
          case 2: __asm__ volatile("rep movsw" : "+S"(s), "+D"(destination), "+c"(n)::"memory"); break;
          case 4: __asm__ volatile("rep movsl" : "+S"(s), "+D"(destination), "+c"(n)::"memory"); break;
          default: __asm__ volatile("rep movsq" : "+S"(s), "+D"(destination), "+c"(n)::"memory"); break;
        }
        advance(c, i, rsi, length);
        advance(c, i, rdi, length);
        count_down(c, i, count - 1);  // repeat() counts the last one
        return Result::ok;
      }
    }
    u64 value = 0;
    ANYKVM_TRY(c.cpu.read(from, &value, bytes));
    ANYKVM_TRY(destination_address(c, i, bytes, Access::write, to));
    ANYKVM_TRY(c.cpu.write(to, &value, bytes));
    advance(c, i, rsi, step(c, i));
    advance(c, i, rdi, step(c, i));
    return Result::ok;
  });
}

Result store_string(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  return repeat(c, i, [&]() -> Result {
    Gva to;
    ANYKVM_TRY(destination_address(c, i, bytes, Access::write, to));
    const u64 value = c.cpu.state.gpr[rax];
    if (i.repeat != Repeat::none && !backwards(c) && c.cpu.state.code_bits == 64 && !c.one_iteration) {
      const u64 count = std::min(stretch(c, i, c.cpu.state.gpr[rdi]), elements_in_page(to, bytes));
      const unsigned length = unsigned(count * bytes);
      u8* destination = count > 1 ? c.cpu.mmu.lookup(to, length, Access::write, c.cpu.data_privilege) : nullptr;
      if (destination) {
        u64 n = count;
        switch (bytes) {
          case 1: __asm__ volatile("rep stosb" : "+D"(destination), "+c"(n) : "a"(value) : "memory"); break;
          case 2: __asm__ volatile("rep stosw" : "+D"(destination), "+c"(n) : "a"(value) : "memory"); break;
          case 4: __asm__ volatile("rep stosl" : "+D"(destination), "+c"(n) : "a"(value) : "memory"); break;
          default: __asm__ volatile("rep stosq" : "+D"(destination), "+c"(n) : "a"(value) : "memory"); break;
        }
        advance(c, i, rdi, length);
        count_down(c, i, count - 1);
        return Result::ok;
      }
    }
    ANYKVM_TRY(c.cpu.write(to, &value, bytes));
    advance(c, i, rdi, step(c, i));
    return Result::ok;
  });
}

Result load_string(Context& c, const Instruction& i) {
  return repeat(c, i, [&]() -> Result {
    Gva from;
    u64 value = 0;
    ANYKVM_TRY(source_address(c, i, i.operand_bytes, from));
    ANYKVM_TRY(c.cpu.read(from, &value, i.operand_bytes));
    write_register(c, {rax, 0}, i.operand_bytes, value);
    advance(c, i, rsi, step(c, i));
    return Result::ok;
  });
}

x86::ArithmeticFlags compare(u64 left, u64 right, unsigned bytes) {
  switch (bytes) {
    case 1: return flags_of_subtraction(u8(left), u8(right));
    case 2: return flags_of_subtraction(u16(left), u16(right));
    case 4: return flags_of_subtraction(u32(left), u32(right));
    default: return flags_of_subtraction(left, right);
  }
}

/// REPE ends on a difference, REPNE on equality: the counter's last decrement still happens.
template <class Once>
Result repeat_comparing(Context& c, const Instruction& i, Once once) {
  if (i.repeat == Repeat::none) return once();
  if (!counter(c, i)) return Result::ok;
  for (;;) {
    ANYKVM_TRY(once());
    count_down(c, i, 1);
    const bool equal = c.cpu.state.arithmetic >> 14 & 1;
    if (!counter(c, i) || equal != (i.repeat == Repeat::while_equal)) return Result::ok;
    if (c.cpu.mmio.replies_pending()) c.cpu.mmio.retire_instruction();
    if (must_stop(c)) {
      c.next_rip = c.cpu.state.rip;
      return Result::ok;
    }
  }
}

Result compare_strings(Context& c, const Instruction& i) {
  return repeat_comparing(c, i, [&]() -> Result {
    u64 left = 0, right = 0;
    const auto read_source = [&] {
      Gva at;
      ANYKVM_TRY(source_address(c, i, i.operand_bytes, at));
      return c.cpu.read(at, &left, i.operand_bytes);
    };
    const auto read_destination = [&] {
      Gva at;
      ANYKVM_TRY(destination_address(c, i, i.operand_bytes, Access::read, at));
      return c.cpu.read(at, &right, i.operand_bytes);
    };
    // Where both fault, the processor reports the one at ES:rDI, but for REPE CMPSB, which goes by another way.
    if (i.repeat == Repeat::while_equal && i.operand_bytes == 1) {
      ANYKVM_TRY(read_source());
      ANYKVM_TRY(read_destination());
    } else {
      ANYKVM_TRY(read_destination());
      ANYKVM_TRY(read_source());
    }
    c.cpu.state.arithmetic = compare(left, right, i.operand_bytes);
    advance(c, i, rsi, step(c, i));
    advance(c, i, rdi, step(c, i));
    return Result::ok;
  });
}

Result scan_string(Context& c, const Instruction& i) {
  return repeat_comparing(c, i, [&]() -> Result {
    Gva at;
    u64 value = 0;
    ANYKVM_TRY(destination_address(c, i, i.operand_bytes, Access::read, at));
    ANYKVM_TRY(c.cpu.read(at, &value, i.operand_bytes));
    c.cpu.state.arithmetic = compare(c.cpu.state.gpr[rax], value, i.operand_bytes);
    advance(c, i, rdi, step(c, i));
    return Result::ok;
  });
}

}  // namespace

x86::SegmentName source_segment(const Decoded& d) {
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_ES) return x86::es;
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_CS) return x86::cs;
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_SS) return x86::ss;
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_FS) return x86::fs;
  if (d.instruction.attributes & ZYDIS_ATTRIB_HAS_SEGMENT_GS) return x86::gs;
  return x86::ds;
}

Handler select_string(const Decoded& d, Instruction& out) {
  if (d.instruction.meta.category != ZYDIS_CATEGORY_STRINGOP) return nullptr;
  out.segment = source_segment(d);
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_MOVSB: out.operand_bytes = 1; return move_string;
    case ZYDIS_MNEMONIC_MOVSW: out.operand_bytes = 2; return move_string;
    case ZYDIS_MNEMONIC_MOVSD: out.operand_bytes = 4; return move_string;
    case ZYDIS_MNEMONIC_MOVSQ: out.operand_bytes = 8; return move_string;
    case ZYDIS_MNEMONIC_STOSB: out.operand_bytes = 1; return store_string;
    case ZYDIS_MNEMONIC_STOSW: out.operand_bytes = 2; return store_string;
    case ZYDIS_MNEMONIC_STOSD: out.operand_bytes = 4; return store_string;
    case ZYDIS_MNEMONIC_STOSQ: out.operand_bytes = 8; return store_string;
    case ZYDIS_MNEMONIC_LODSB: out.operand_bytes = 1; return load_string;
    case ZYDIS_MNEMONIC_LODSW: out.operand_bytes = 2; return load_string;
    case ZYDIS_MNEMONIC_LODSD: out.operand_bytes = 4; return load_string;
    case ZYDIS_MNEMONIC_LODSQ: out.operand_bytes = 8; return load_string;
    case ZYDIS_MNEMONIC_CMPSB: out.operand_bytes = 1; return compare_strings;
    case ZYDIS_MNEMONIC_CMPSW: out.operand_bytes = 2; return compare_strings;
    case ZYDIS_MNEMONIC_CMPSD: out.operand_bytes = 4; return compare_strings;
    case ZYDIS_MNEMONIC_CMPSQ: out.operand_bytes = 8; return compare_strings;
    case ZYDIS_MNEMONIC_SCASB: out.operand_bytes = 1; return scan_string;
    case ZYDIS_MNEMONIC_SCASW: out.operand_bytes = 2; return scan_string;
    case ZYDIS_MNEMONIC_SCASD: out.operand_bytes = 4; return scan_string;
    case ZYDIS_MNEMONIC_SCASQ: out.operand_bytes = 8; return scan_string;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
