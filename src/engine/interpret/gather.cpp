// Gathers and scatters: accesses to single elements that a mask chooses, each of which may fault by itself.
#include <algorithm>
#include <utility>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

u8* vector(Context& c, unsigned n) { return c.cpu.state.fpu.vector[n]; }
/// Bytes above a VEX result are zero.
void zero_above(Context& c, unsigned n, unsigned bytes) { std::memset(vector(c, n) + bytes, 0, 64 - bytes); }
bool selected(const u8* mask, unsigned element, unsigned bytes) { return mask[(element + 1) * bytes - 1] & 0x80; }

/// Gathers and scatters, which access one element after the other. operand_bytes: data element; alignment: index
/// element; memory_bytes: how many elements; reg[0]: data; reg[1]: mask, a vector's signs (AVX2) or an opmask
/// (AVX-512). A fault keeps the elements that are done: their mask bits are clear. A pending single step is taken in
/// front of it. Alignment is not checked.
template <bool opmask, Access access>
Result element_by_element(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  const unsigned bytes = i.operand_bytes, index_bytes = i.alignment, count = i.memory_bytes;
  u8* data = vector(c, i.reg[0].index);
  u8* mask = vector(c, i.reg[1].index);
  u64& bits = c.cpu.state.fpu.opmask[i.reg[1].index & 7];
  const u8* indices = vector(c, unsigned(i.index));
  const x86::Privilege rights = unaligned_rights(c);
  const auto transfer = [&](unsigned n) {
    u64 index = 0;
    std::memcpy(&index, indices + n * index_bytes, index_bytes);
    u64 offset = u64(s64(i.displacement)) + (sign_extend(index, index_bytes) << i.scale_shift);
    if (i.base >= 0) offset += c.cpu.state.gpr[i.base];
    Gva gva;
    ANYKVM_TRY(linear_address(c, i.segment, offset & size_mask(i.address_bytes), bytes, access, gva));
    return access == Access::read ? c.cpu.read_as(gva, data + n * bytes, bytes, rights)
                                  : c.cpu.write_as(gva, data + n * bytes, bytes, rights);
  };
  bool any = false;
  for (unsigned n = 0; n < count; ++n) {
    if (opmask ? bits >> n & 1 : selected(mask, n, bytes)) {
      if (const Result result = transfer(n); result != Result::ok) {
        if (!any) return result;
        // AVX-512's loads have written registers of their vector length by then.
        if (opmask && access == Access::read) zero_above(c, i.reg[0].index, count * std::max(bytes, index_bytes));
        if (result != Result::fault || !(c.cpu.state.other_flags & x86::flag::tf)) return result;
        c.next_rip = c.cpu.state.rip;
        return Result::ok;
      }
      any = true;
    }
    if (opmask)
      bits &= ~(1ull << n);
    else
      std::memset(mask + n * bytes, 0, bytes);
  }
  if (access == Access::read) zero_above(c, i.reg[0].index, count * bytes);
  if (opmask)
    bits = 0;
  else
    zero_above(c, i.reg[1].index, 0);
  return Result::ok;
}

}  // namespace

Handler select_gather(const Decoded& d, Instruction& out) {
  unsigned element = 0, index = 0;
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_VGATHERDPS:
    case ZYDIS_MNEMONIC_VPGATHERDD:
    case ZYDIS_MNEMONIC_VSCATTERDPS:
    case ZYDIS_MNEMONIC_VPSCATTERDD: element = 4, index = 4; break;
    case ZYDIS_MNEMONIC_VGATHERDPD:
    case ZYDIS_MNEMONIC_VPGATHERDQ:
    case ZYDIS_MNEMONIC_VSCATTERDPD:
    case ZYDIS_MNEMONIC_VPSCATTERDQ: element = 8, index = 4; break;
    case ZYDIS_MNEMONIC_VGATHERQPS:
    case ZYDIS_MNEMONIC_VPGATHERQD:
    case ZYDIS_MNEMONIC_VSCATTERQPS:
    case ZYDIS_MNEMONIC_VPSCATTERQD: element = 4, index = 8; break;
    case ZYDIS_MNEMONIC_VGATHERQPD:
    case ZYDIS_MNEMONIC_VPGATHERQQ:
    case ZYDIS_MNEMONIC_VSCATTERQPD:
    case ZYDIS_MNEMONIC_VPSCATTERQQ: element = 8, index = 8; break;
    default: return nullptr;
  }
  if (!host_has(d)) return undefined;
  out.operand_bytes = u8(element);
  out.alignment = u8(index);
  out.memory_bytes = u8(d.instruction.avx.vector_length / 8 / std::max(element, index));
  if (d.instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX) {
    if (out.reg[0].index == out.reg[1].index || out.reg[0].index == out.index || out.reg[1].index == out.index)
      return undefined;
    return element_by_element<false, Access::read>;
  }
  if (d.is_memory(0)) {  // a scatter: memory, mask, data
    std::swap(out.reg[0], out.reg[1]);
    return element_by_element<true, Access::write>;
  }
  return out.reg[0].index == out.index ? undefined : element_by_element<true, Access::read>;
}

}  // namespace anykvm::engine
