// What only 16- and 32-bit code has and the host's 64-bit mode has not: decimal adjustment, SALC, BOUND, ARPL.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

using x86::rax;
namespace flag = x86::flag;

u8 al(const Context& c) { return u8(c.cpu.state.gpr[rax]); }
u8 ah(const Context& c) { return u8(c.cpu.state.gpr[rax] >> 8); }
void set_al(Context& c, unsigned value) { write_register(c, {rax, 0}, 1, value); }
void set_ax(Context& c, unsigned value) { write_register(c, {rax, 0}, 2, value); }

/// SF, ZF and PF of a byte, with CF and AF as given; OF is undefined and cleared.
void set_flags(Context& c, u8 value, bool cf, bool af) {
  u64 flags = c.cpu.state.other_flags;
  if (value & 0x80) flags |= flag::sf;
  if (!value) flags |= flag::zf;
  if (!__builtin_parity(value)) flags |= flag::pf;
  if (cf) flags |= flag::cf;
  if (af) flags |= flag::af;
  c.cpu.state.set_rflags(flags);
}
bool carry(const Context& c) { return c.cpu.state.rflags() & flag::cf; }
bool adjust(const Context& c) { return c.cpu.state.rflags() & flag::af; }

template <int sign>
Result decimal_adjust(Context& c, const Instruction&) {  // DAA, DAS
  const u8 old = al(c);
  const bool old_cf = carry(c);
  bool cf = false, af = false;
  int value = old;
  if ((old & 0xf) > 9 || adjust(c)) {
    value += sign * 6;
    cf = old_cf || (sign > 0 ? value > 0xff : value < 0);
    af = true;
  }
  if (old > 0x99 || old_cf) {
    value += sign * 0x60;
    cf = true;
  } else if (sign > 0) {
    cf = false;
  }
  set_al(c, u8(value));
  set_flags(c, u8(value), cf, af);
  return Result::ok;
}

template <int sign>
Result ascii_adjust(Context& c, const Instruction&) {  // AAA, AAS
  const bool needed = (al(c) & 0xf) > 9 || adjust(c);
  unsigned ax = unsigned(c.cpu.state.gpr[rax] & 0xffff);
  if (needed) ax = unsigned(int(ax) + sign * 0x106) & 0xffff;
  set_ax(c, ax & 0xff0f);
  set_flags(c, u8(ax & 0xf), needed, needed);
  return Result::ok;
}

Result ascii_adjust_multiply(Context& c, const Instruction& i) {
  const u8 base = u8(i.immediate);
  if (!base) return c.cpu.raise(x86::exception::de);
  const u8 value = al(c);
  set_ax(c, unsigned(value / base) << 8 | value % base);
  set_flags(c, value % base, false, false);
  return Result::ok;
}
Result ascii_adjust_divide(Context& c, const Instruction& i) {
  const u8 value = u8(al(c) + ah(c) * u8(i.immediate));
  set_ax(c, value);
  set_flags(c, value, false, false);
  return Result::ok;
}

Result set_al_on_carry(Context& c, const Instruction&) {
  set_al(c, carry(c) ? 0xff : 0);
  return Result::ok;
}

Result check_bounds(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  Gva gva;
  u64 low = 0, high = 0;
  ANYKVM_TRY(memory_address(c, i, 2 * bytes, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, &low, bytes));
  ANYKVM_TRY(c.cpu.read(gva + bytes, &high, bytes));
  const s64 index = s64(sign_extend(read_register(c, i.reg[0], bytes), bytes));
  const bool inside = index >= s64(sign_extend(low, bytes)) && index <= s64(sign_extend(high, bytes));
  return inside ? Result::ok : c.cpu.raise(x86::exception::br);
}

Result adjust_rpl(Context& c, const Instruction& i) {
  if (c.cpu.state.real_mode() || c.cpu.state.v86()) return c.cpu.ud();
  u64 selector;
  ANYKVM_TRY(read_operand(c, i, 0, 2, selector));
  const u64 rpl = read_register(c, i.reg[i.has_memory ? 0 : 1], 2) & 3;
  const bool raise = (selector & 3) < rpl;
  if (raise) ANYKVM_TRY(write_operand(c, i, 0, 2, (selector & ~3ull) | rpl));
  const u64 flags = c.cpu.state.rflags() & ~flag::zf;
  c.cpu.state.set_rflags(raise ? flags | flag::zf : flags);
  return Result::ok;
}

}  // namespace

Handler select_decimal(const Decoded& d, Instruction&) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_DAA: return decimal_adjust<1>;
    case ZYDIS_MNEMONIC_DAS: return decimal_adjust<-1>;
    case ZYDIS_MNEMONIC_AAA: return ascii_adjust<1>;
    case ZYDIS_MNEMONIC_AAS: return ascii_adjust<-1>;
    case ZYDIS_MNEMONIC_AAM: return ascii_adjust_multiply;
    case ZYDIS_MNEMONIC_AAD: return ascii_adjust_divide;
    case ZYDIS_MNEMONIC_SALC: return set_al_on_carry;
    case ZYDIS_MNEMONIC_BOUND: return check_bounds;
    case ZYDIS_MNEMONIC_ARPL: return adjust_rpl;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
