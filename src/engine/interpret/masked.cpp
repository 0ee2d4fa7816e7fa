// Vector accesses to single elements that a mask chooses: MASKMOVDQU, VMASKMOV, VPMASKMOV and AVX2's gathers. An
// element that is masked off is not accessed, so it cannot fault.
#include <algorithm>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

u8* vector(Context& c, unsigned n) { return c.cpu.state.fpu.vector[n]; }
/// Bytes above a VEX result are zero.
void zero_above(Context& c, unsigned n, unsigned bytes) { std::memset(vector(c, n) + bytes, 0, 64 - bytes); }
bool selected(const u8* mask, unsigned element, unsigned bytes) { return mask[(element + 1) * bytes - 1] & 0x80; }

/// Stores the chosen elements of `data`, all or (when a page faults) none.
Result store_chosen(Context& c, Gva base, const u8* data, const u8* mask, unsigned element_bytes, unsigned count) {
  for (unsigned n = 0; n < count; ++n) {
    if (!selected(mask, n, element_bytes)) continue;
    const Gva first = base + n * element_bytes, last = first + element_bytes - 1;
    x86::Mmu::Translation page;
    ANYKVM_TRY(c.cpu.mmu.translate(c.cpu, first, Access::write, c.cpu.data_privilege, page));
    if ((first ^ last) & page_mask)
      ANYKVM_TRY(c.cpu.mmu.translate(c.cpu, last, Access::write, c.cpu.data_privilege, page));
  }
  for (unsigned n = 0; n < count; ++n)
    if (selected(mask, n, element_bytes))
      ANYKVM_TRY(c.cpu.write(base + n * element_bytes, data + n * element_bytes, element_bytes));
  return Result::ok;
}

/// What every MMX instruction does to the x87 unit: the stack's top becomes register 0, all registers are in use. The
/// image keeps ST(0) first, so that it is turned.
void enter_mmx(x86::FpuState& fpu) {
  u8* registers = fpu.x87 + 32;
  std::rotate(registers, registers + 16 * (8 - (fpu.x87[3] >> 3 & 7)) % 128, registers + 128);
  fpu.x87[3] &= u8(~0x38);
  fpu.x87[4] = 0xff;
  fpu.in_use |= x86::xfeature::x87;
}

/// MASKMOVDQU, VMASKMOVDQU: bytes to [rDI].
Result masked_move_bytes(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  Gva gva;
  ANYKVM_TRY(
      linear_address(c, i.segment, c.cpu.state.gpr[x86::rdi] & size_mask(i.address_bytes), 16, Access::write, gva));
  return store_chosen(c, gva, vector(c, i.reg[0].index), vector(c, i.reg[1].index), 1, 16);
}
/// MASKMOVQ: the same from MMX registers.
Result masked_move_mmx(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  Gva gva;
  ANYKVM_TRY(
      linear_address(c, i.segment, c.cpu.state.gpr[x86::rdi] & size_mask(i.address_bytes), 8, Access::write, gva));
  x86::FpuState& fpu = c.cpu.state.fpu;
  const unsigned top = fpu.x87[3] >> 3 & 7;
  const auto mmx = [&](unsigned n) { return fpu.x87 + 32 + 16 * ((n - top) & 7); };
  ANYKVM_TRY(store_chosen(c, gva, mmx(i.reg[0].index), mmx(i.reg[1].index), 1, 8));
  enter_mmx(fpu);
  return Result::ok;
}

Result masked_load(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  Gva gva;
  u8 result[32] = {};
  const u8* mask = vector(c, i.reg[1].index);
  const unsigned bytes = i.operand_bytes, count = i.memory_bytes / bytes;
  ANYKVM_TRY(memory_address(c, i, 1, Access::read, gva));
  for (unsigned n = 0; n < count; ++n)
    if (selected(mask, n, bytes)) ANYKVM_TRY(c.cpu.read(gva + n * bytes, result + n * bytes, bytes));
  std::memcpy(vector(c, i.reg[0].index), result, sizeof result);
  zero_above(c, i.reg[0].index, 32);
  return Result::ok;
}
Result masked_store(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  Gva gva;
  const unsigned bytes = i.operand_bytes;
  ANYKVM_TRY(memory_address(c, i, 1, Access::write, gva));
  return store_chosen(c, gva, vector(c, i.reg[1].index), vector(c, i.reg[0].index), bytes, i.memory_bytes / bytes);
}

/// AVX2 gathers. operand_bytes: data element; alignment: index element; memory_bytes: how many elements;
/// reg[0]: destination, reg[1]: mask. A fault keeps the elements that are done: their mask bits are clear.
Result gather(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  const unsigned bytes = i.operand_bytes, index_bytes = i.alignment, count = i.memory_bytes;
  u8* destination = vector(c, i.reg[0].index);
  u8* mask = vector(c, i.reg[1].index);
  const u8* indices = vector(c, unsigned(i.index));
  for (unsigned n = 0; n < count; ++n) {
    if (selected(mask, n, bytes)) {
      u64 index = 0;
      std::memcpy(&index, indices + n * index_bytes, index_bytes);
      u64 offset = u64(s64(i.displacement)) + (sign_extend(index, index_bytes) << i.scale_shift);
      if (i.base >= 0) offset += c.cpu.state.gpr[i.base];
      Gva gva;
      ANYKVM_TRY(linear_address(c, i.segment, offset & size_mask(i.address_bytes), bytes, Access::read, gva));
      ANYKVM_TRY(c.cpu.read(gva, destination + n * bytes, bytes));
    }
    std::memset(mask + n * bytes, 0, bytes);
  }
  zero_above(c, i.reg[0].index, count * bytes);
  zero_above(c, i.reg[1].index, 0);
  return Result::ok;
}

}  // namespace

Handler select_masked(const Decoded& d, Instruction& out) {
  unsigned element = 0, index = 0;
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_MASKMOVQ:
      out.unit = Unit::mmx;
      out.waits_for_x87 = true;
      return masked_move_mmx;
    case ZYDIS_MNEMONIC_MASKMOVDQU: out.unit = Unit::sse; break;
    case ZYDIS_MNEMONIC_VMASKMOVDQU: out.unit = Unit::avx; break;
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VPMASKMOVD: element = 4; break;
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ: element = 8; break;
    case ZYDIS_MNEMONIC_VGATHERDPS:
    case ZYDIS_MNEMONIC_VPGATHERDD: element = 4, index = 4; break;
    case ZYDIS_MNEMONIC_VGATHERDPD:
    case ZYDIS_MNEMONIC_VPGATHERDQ: element = 8, index = 4; break;
    case ZYDIS_MNEMONIC_VGATHERQPS:
    case ZYDIS_MNEMONIC_VPGATHERQD: element = 4, index = 8; break;
    case ZYDIS_MNEMONIC_VGATHERQPD:
    case ZYDIS_MNEMONIC_VPGATHERQQ: element = 8, index = 8; break;
    default: return nullptr;
  }
  if (d.instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) return undefined;
  if (!element) return masked_move_bytes;
  out.operand_bytes = u8(element);
  if (!index) return d.is_memory(0) ? masked_store : masked_load;
  if (out.reg[0].index == out.reg[1].index || out.reg[0].index == out.index || out.reg[1].index == out.index)
    return undefined;
  out.alignment = u8(index);
  out.memory_bytes = u8((d.instruction.avx.vector_length == 256 ? 32 : 16) / std::max(element, index));
  return gather;
}

}  // namespace anykvm::engine
