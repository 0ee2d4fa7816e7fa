// DIV and IDIV: the host CPU divides, after a check that it will not raise #DE.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

/// The dividend is rDX:rAX (AX for bytes).
template <unsigned bytes>
u128 dividend(const Context& c) {
  const u64* gpr = c.cpu.state.gpr;
  if constexpr (bytes == 1) return u16(gpr[x86::rax]);
  return u128(gpr[x86::rdx] & size_mask(bytes)) << bytes * 8 | (gpr[x86::rax] & size_mask(bytes));
}

template <unsigned bytes>
bool overflows_unsigned(u128 value, u64 divisor) {
  return divisor == 0 || u64(value >> bytes * 8) >= divisor;
}

template <unsigned bytes>
bool overflows_signed(u128 value, u64 raw_divisor) {
  if (raw_divisor == 0) return true;
  const unsigned shift = 128 - 2 * bytes * 8;
  const s128 numerator = s128(value << shift) >> shift;
  const s64 divisor = s64(sign_extend(raw_divisor, bytes));
  const s128 limit = s128(1) << (bytes * 8 - 1);
  if (divisor == -1) return numerator <= -limit || numerator > limit;
  const s128 quotient = numerator / divisor;
  return quotient < -limit || quotient >= limit;
}

template <unsigned bytes, bool is_signed>
Result divide(Context& c, const Instruction& i) {
  u64 divisor;  // a copy: what was checked is what divides
  ANYKVM_TRY(read_operand(c, i, 0, bytes, divisor));
  const u128 value = dividend<bytes>(c);
  if (is_signed ? overflows_signed<bytes>(value, divisor) : overflows_unsigned<bytes>(value, divisor))
    return c.cpu.raise(x86::exception::de);
  i.native(&c.cpu.state, &divisor);
  return Result::ok;
}

template <bool is_signed>
Handler by_size(unsigned bytes) {
  return bytes == 8   ? divide<8, is_signed>
         : bytes == 4 ? divide<4, is_signed>
         : bytes == 2 ? divide<2, is_signed>
                      : divide<1, is_signed>;
}

}  // namespace

Handler select_divide(const Decoded& d, Instruction& out, std::span<u8> code) {
  const bool is_signed = d.mnemonic() == ZYDIS_MNEMONIC_IDIV;
  if (!is_signed && d.mnemonic() != ZYDIS_MNEMONIC_DIV) return nullptr;
  if (!make_native(d, out, code)) return nullptr;
  return is_signed ? by_size<true>(d.bytes(0)) : by_size<false>(d.bytes(0));
}

}  // namespace anykvm::engine
