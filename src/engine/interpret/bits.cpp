// BT, BTS, BTR, BTC with a register bit offset into memory: the offset reaches beyond the operand, so the address moves
// first; then the host executes the instruction with the offset that is left.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

Result bit_string(Context& c, const Instruction& i) {
  const unsigned bytes = i.operand_bytes;
  u64& reg = c.cpu.state.gpr[i.reg[0].index];
  const u64 given = reg;
  const s64 bit = s64(sign_extend(given, bytes));
  const s64 element = bit >> (bytes == 8 ? 6 : bytes == 4 ? 5 : 4);
  const u64 offset = (effective_offset(c, i) + u64(element) * bytes) & size_mask(i.address_bytes);
  Gva gva;
  x86::Operand operand;
  ANYKVM_TRY(linear_address(c, i.segment, offset, bytes, i.use == Cpu::Use::read ? Access::read : Access::write, gva));
  ANYKVM_TRY(c.cpu.open_operand(gva, bytes, i.use, operand));
  reg = u64(bit) & (bytes * 8 - 1);
  const Result result = run_native(c, i, operand.host);
  reg = given;
  ANYKVM_TRY(result);
  c.cpu.close_operand(operand, i.use);
  return Result::ok;
}

}  // namespace

Handler select_bits(const Decoded& d, Instruction& out, std::span<u8> code) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC: break;
    default: return nullptr;
  }
  if (!d.is_memory(0) || !d.is_register(1)) return nullptr;
  if (!make_native(d, out, code)) return nullptr;
  return bit_string;
}

}  // namespace anykvm::engine
