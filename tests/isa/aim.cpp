// Where the operands of a sequence's instructions lie and what they hold: registers, memory, immediates, targets.
#include "isa/operands.h"
#include "isa/segments.h"
#include "isa/sequence.h"
#include "isa/undefined.h"
#include "x86/state.h"

namespace anykvm::isa {

namespace flag = x86::flag;
using x86::rax, x86::rcx, x86::rdx, x86::rbx, x86::rsp, x86::rbp;

u64 Sequence::target(unsigned size, unsigned align) {
  if (!size) size = 1;
  const unsigned room = unsigned(data_bytes);
  u64 at;
  const unsigned kind = random_.below(120);
  if (kind < 80)
    at = data_address + 64 * random_.below(size >= room ? 1 : (room - size) / 64 + 1);
  else if (kind < 104)
    at = data_address + random_.below(size >= room ? 1 : room - size + 1);
  else if (kind < 112)
    at = data_address + page_size - random_.below(size + 1);
  else
    switch (kind) {
      case 112: at = data_address + data_bytes + random_.below(64); break;        // only readable
      case 113: at = data_address + data_bytes - random_.below(size + 1); break;  // half
      case 114: at = data_address + data_total - random_.below(size + 1); break;  // across the end
      case 115: at = data_address - random_.below(size + 1); break;               // across the start
      case 116: at = code_address + random_.below(unsigned(code_bytes)); break;
      case 117: at = data_address + 0x100000 + random_.below(0x1000); break;  // nothing there
      case 118: at = random_.next() | 1ull << 62; break;                      // not canonical
      default: at = data_address + random_.below(room); break;
    }
  if (align > 1 && !random_.one_in(24)) at &= ~u64(align - 1);
  return at;
}

/// Small offsets for the elements of a gather's index.
void Sequence::aim_vector_index(const ZydisDecodedInstruction& d, const ZydisDecodedOperand& o) {
  const unsigned reg = unsigned(ZydisRegisterGetId(o.mem.index));
  if ((vectors_written_ | vectors_pinned_) >> reg & 1) return;
  vectors_pinned_ |= 1u << reg;
  bool wide = false;  // elements of 8 bytes
  switch (d.mnemonic) {
    case ZYDIS_MNEMONIC_VGATHERQPS:
    case ZYDIS_MNEMONIC_VGATHERQPD:
    case ZYDIS_MNEMONIC_VPGATHERQD:
    case ZYDIS_MNEMONIC_VPGATHERQQ:
    case ZYDIS_MNEMONIC_VSCATTERQPS:
    case ZYDIS_MNEMONIC_VSCATTERQPD:
    case ZYDIS_MNEMONIC_VPSCATTERQD:
    case ZYDIS_MNEMONIC_VPSCATTERQQ: wide = true; break;
    default: break;
  }
  u8 lanes[64];
  for (unsigned at = 0; at < 64; at += 8) {
    u64 value = random_.next() & 0x0000007f0000007f;
    if (wide) value = u64(s64(random_.below(256)) - 128);
    if (random_.one_in(64)) value = random_.next();
    std::memcpy(lanes + at, &value, 8);
  }
  if (reg < 16) {
    std::memcpy(c_.in.xmm(reg), lanes, 16);
    std::memcpy(c_.in.ymm_high[reg], lanes + 16, 16);
    if (features_ >> 6 & 1) std::memcpy(c_.in.zmm_high[reg], lanes + 32, 32);
  } else {
    std::memcpy(c_.in.zmm_upper[reg - 16], lanes, 64);
  }
}

/// Points a memory operand somewhere; returns its linear address (0: unknown).
u64 Sequence::aim(u8* bytes, const ZydisDecodedInstruction& d, const ZydisDecodedOperand& o, unsigned align) {
  const unsigned bits = d.address_width;
  const u64 base_of_segment = segment_base(o.mem.segment);
  const int base = gpr_of(o.mem.base), index = gpr_of(o.mem.index);
  const bool hidden = o.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;
  if (hidden && base == rsp) return is_known(rsp) ? base_of_segment + c_.in.gpr[rsp] + u64(o.mem.disp.value) : 0;
  if (is_vector(o.mem.index)) aim_vector_index(d, o);

  u64 at = target(o.size / 8, align);
  // Which byte of a large image a page fault names is the processor's choice: it lies within the data.
  if (o.size > 64 * 8) at = data_address + random_.below(4) * 0x400 + (random_.one_in(16) ? random_.below(64) : 0);
  if (is_vector(o.mem.index)) at = data_address + page_size + random_.below(256);
  if (is_image(d.mnemonic) && !random_.one_in(8)) at = data_address + image_offset;
  const u64 offset = masked(at - base_of_segment, bits);
  const auto displace = [&](u64 value) {  // false: there is no room for it
    const unsigned size = d.raw.disp.size;
    if (size < 16) return false;
    std::memcpy(bytes + d.raw.disp.offset, &value, size / 8);
    const u64 reach = size >= 64 ? value : size == 32 ? u64(s64(s32(value))) : u64(s64(s16(value)));
    return masked(reach, bits) == masked(value, bits);
  };
  // What the index adds.
  u64 indexed = 0;
  if (index >= 0) {
    if (!is_known(unsigned(index))) return 0;
    if (is_open(unsigned(index)) && index != base) pin(unsigned(index), any_integer(random_));
    indexed = index == base ? 0 : c_.in.gpr[index] * o.mem.scale;
  }
  const u64 displacement = u64(o.mem.disp.value);
  const u64 garbage = bits < 64 && c_.mode == Mode::code64 && random_.one_in(4) ? random_.next() << 32 : 0;
  if (o.mem.base == ZYDIS_REGISTER_RIP || o.mem.base == ZYDIS_REGISTER_EIP)
    return displace(offset - next_ip(d.length)) ? at : 0;
  if (base < 0) return displace(offset - indexed) ? at : 0;
  if (!is_known(unsigned(base))) return 0;
  if (is_open(unsigned(base))) {
    u64 value = offset - displacement - indexed;
    if (index == base) value /= 1u + o.mem.scale;
    if (bits == 16) value = masked(value, 16) | (random_.next() & 0xffff0000);
    pin(unsigned(base), bits == 32 ? u32(value) | garbage : value);
    return index == base ? 0 : at;
  }
  if (index == base) return 0;
  if (displace(offset - indexed - c_.in.gpr[base])) return at;
  return masked(c_.in.gpr[base] + indexed + displacement, bits) + base_of_segment;
}

/// Values of the operand's kind in memory.
void Sequence::fill_memory(u64 at, const ZydisDecodedOperand& o) {
  if (!at) return;
  switch (o.element_type) {
    case ZYDIS_ELEMENT_TYPE_FLOAT32:
    case ZYDIS_ELEMENT_TYPE_FLOAT64:
    case ZYDIS_ELEMENT_TYPE_FLOAT16: {
      const Lanes lanes = o.element_type == ZYDIS_ELEMENT_TYPE_FLOAT32   ? Lanes::singles
                          : o.element_type == ZYDIS_ELEMENT_TYPE_FLOAT64 ? Lanes::doubles
                                                                         : Lanes::halves;
      for (unsigned n = 0; n < o.size / 8u && n < 64; n += 8) c_.poke(at + n, any_lane(random_, lanes));
      break;
    }
    case ZYDIS_ELEMENT_TYPE_FLOAT80: {
      u8 value[16] = {};
      any_extended(random_, value);
      u64 halves[2];
      std::memcpy(halves, value, 16);
      c_.poke(at, halves[0]), c_.poke(at + 8, halves[1]);
      break;
    }
    default:
      for (unsigned n = 0; n < o.size / 8u && n < 32; n += 8) c_.poke(at + n, any_integer(random_));
  }
}

/// What single instructions need so that they do not always end the same way.
void Sequence::settle_special(u8* bytes, const ZydisDecodedInstruction& d, const Operands& operands) {
  const auto limit_to = [&](unsigned gpr, u64 value) {
    if (is_open(gpr)) pin(gpr, value);
  };
  switch (d.mnemonic) {
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
      if (!random_.one_in(3)) limit_to(rdx, random_.below(2)), limit_to(rax, any_integer(random_) & 0x7fff);
      break;
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
      if (operands[0].type == ZYDIS_OPERAND_TYPE_MEMORY && operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
        limit_to(unsigned(gpr_of(operands[1].reg.value)), u64(s64(random_.below(8192)) - 4096));
      break;
    case ZYDIS_MNEMONIC_ENTER:
      if (!random_.one_in(8)) {  // a small frame
        const u16 size = u16(random_.below(256));
        std::memcpy(bytes + d.raw.imm[0].offset, &size, 2);
        bytes[d.raw.imm[0].offset + 2] &= 0xe7;
      }
      if (is_open(rbp)) pin(rbp, data_address + 0x600 + random_.below(64) * 8 - segment_base(ZYDIS_REGISTER_SS));
      break;
    case ZYDIS_MNEMONIC_LEAVE:
      if (is_open(rbp)) pin(rbp, data_address + 0x600 + random_.below(64) * 8 - segment_base(ZYDIS_REGISTER_SS));
      break;
    case ZYDIS_MNEMONIC_XLAT:
      if (is_open(rbx)) pin(rbx, target(256, 1) - segment_base(ZYDIS_REGISTER_DS));
      break;
    default: break;
  }
  if (d.mnemonic == ZYDIS_MNEMONIC_XGETBV) limit_to(rcx, random_.below(3));
  if (d.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE))
    limit_to(rcx, random_.one_in(32) ? any_integer(random_) : random_.below(random_.one_in(4) ? 600 : 20));
  if (takes_components(d)) {  // those that the host has enabled and the guest has not stay out
    limit_to(rax, (random_.one_in(4) ? features_ : random_.next()) & (features_ | ~0xe0ull));
    limit_to(rdx, random_.one_in(2) ? 0 : random_.next());
  }
}

void Sequence::settle(u8* bytes, const ZydisDecodedInstruction& d, const Operands& operands) {
  settle_special(bytes, d, operands);
  unsigned align = 1;
  if (takes_components(d))
    align = 64;
  else if (is_image(d.mnemonic) || d.mnemonic == ZYDIS_MNEMONIC_FXSAVE || d.mnemonic == ZYDIS_MNEMONIC_FXSAVE64)
    align = 16;
  u64 memory = 0, stack = 0;
  for (unsigned n = 0; n < d.operand_count; ++n) {
    const ZydisDecodedOperand& o = operands[n];
    if (o.type != ZYDIS_OPERAND_TYPE_MEMORY || o.mem.type == ZYDIS_MEMOP_TYPE_AGEN) continue;
    const u64 at = aim(bytes, d, o, align > 1 ? align : o.size >= 128 ? o.size / 8 : 1);
    if (const Selectors selectors = x87_selectors(d, o.size); selectors.code && at) {
      c_.ignore(at + selectors.code), c_.ignore(at + selectors.data);
      closed_ = true;  // nothing may read them
    }
    const bool on_stack = o.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN && gpr_of(o.mem.base) == rsp;
    (on_stack ? stack : memory) = at;
    if (at && !on_stack && o.actions & ZYDIS_OPERAND_ACTION_MASK_READ && !is_image(d.mnemonic) && random_.one_in(2))
      fill_memory(at, o);
  }
  if (is_image(d.mnemonic) && memory == data_address + image_offset) {
    if (random_.one_in(2)) {
      const u64 control = (random_.one_in(2) ? 0x37f : random_.next() & 0x1fff) | (random_.next() & 0xffff) << 16;
      c_.poke(memory, (control & 0xffffffff) | (random_.next() & 0x07ff00ff) << 32);
    }
    if (random_.one_in(2))
      c_.poke(memory + 24, (random_.one_in(32) ? random_.next() : random_.next() & 0xffff) & 0xffffffff);
    if (random_.one_in(2)) c_.poke(memory + 512, random_.next() & features_);
  }
  if (d.mnemonic == ZYDIS_MNEMONIC_LDMXCSR || d.mnemonic == ZYDIS_MNEMONIC_VLDMXCSR)
    c_.poke(memory, (random_.next() & (random_.one_in(8) ? 0xffffffff : 0xffff)));

  // Where branches go: to the next instruction, mostly.
  const u64 next = next_ip(d.length);
  const unsigned word = d.operand_width / 8;
  if (d.raw.imm[0].size && d.raw.imm[0].is_relative && branch_count_ < std::size(branches_) &&
      d.mnemonic != ZYDIS_MNEMONIC_XBEGIN)
    branches_[branch_count_++] = {u16(c_.code_length + d.raw.imm[0].offset), u8(d.raw.imm[0].size / 8),
                                  u16(c_.code_length + d.length)};
  if ((d.mnemonic == ZYDIS_MNEMONIC_JMP || d.mnemonic == ZYDIS_MNEMONIC_CALL) && !random_.one_in(16)) {
    if (operands[0].type == ZYDIS_OPERAND_TYPE_REGISTER && is_open(unsigned(gpr_of(operands[0].reg.value))))
      pin(unsigned(gpr_of(operands[0].reg.value)), next);
    if (operands[0].type == ZYDIS_OPERAND_TYPE_MEMORY && memory) {
      c_.poke(memory, next);
      if (is_far_branch(d)) c_.poke(memory + word, branch_selector());
    }
  }
  if (operands[0].type == ZYDIS_OPERAND_TYPE_POINTER) {
    const u16 selector = branch_selector();
    std::memcpy(bytes + d.raw.imm[0].offset, &next, d.raw.imm[0].size / 8);
    std::memcpy(bytes + d.raw.imm[1].offset, &selector, 2);
  }
  if (d.meta.category == ZYDIS_CATEGORY_RET && stack && !random_.one_in(16)) {
    const bool interrupt =
        d.mnemonic == ZYDIS_MNEMONIC_IRET || d.mnemonic == ZYDIS_MNEMONIC_IRETD || d.mnemonic == ZYDIS_MNEMONIC_IRETQ;
    c_.poke(stack, next);
    if (is_far_branch(d) || interrupt) c_.poke(stack + word, branch_selector());
    if (interrupt) {
      c_.poke(stack + 2 * word, random_.next() & 0x247fd7 & ~(random_.one_in(8) ? 0 : flag::tf));
      c_.poke(stack + 3 * word, data_address + 0x800 - segment_base(ZYDIS_REGISTER_SS));
      c_.poke(stack + 4 * word, random_.one_in(4) ? any_selector() : c_.in.selector[2]);
    }
  }
  if ((d.mnemonic == ZYDIS_MNEMONIC_POPF || d.mnemonic == ZYDIS_MNEMONIC_POPFQ || d.mnemonic == ZYDIS_MNEMONIC_POPFD) &&
      stack)
    c_.poke(stack, random_.next() & ~(random_.one_in(8) ? 0 : flag::tf));

  // Selectors.
  bool selects = d.mnemonic == ZYDIS_MNEMONIC_LAR || d.mnemonic == ZYDIS_MNEMONIC_LSL ||
                 d.mnemonic == ZYDIS_MNEMONIC_VERR || d.mnemonic == ZYDIS_MNEMONIC_VERW;
  unsigned above = 0;
  for (unsigned n = 0; n < d.operand_count; ++n)
    if (operands[n].type == ZYDIS_OPERAND_TYPE_REGISTER && operands[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE &&
        ZydisRegisterGetClass(operands[n].reg.value) == ZYDIS_REGCLASS_SEGMENT && !is_far_branch(d)) {
      selects = true;
      if (d.mnemonic != ZYDIS_MNEMONIC_MOV && d.mnemonic != ZYDIS_MNEMONIC_POP) above = word;  // LDS ...
    }
  if (selects) {
    const u64 selector = any_selector() | (random_.next() & ~0xffffull);
    const u64 at = d.mnemonic == ZYDIS_MNEMONIC_POP ? stack : memory;
    if (at) c_.poke(at + above, selector);
    if (operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER || d.operand_count_visible == 1) {
      const int reg = gpr_of(operands[d.operand_count_visible == 1 ? 0 : 1].reg.value);
      if (reg >= 0 && is_open(unsigned(reg))) pin(unsigned(reg), selector);
    }
  }
  // Immediates: edges, too.
  for (const auto& immediate : d.raw.imm)
    if (immediate.size && !immediate.is_relative && operands[0].type != ZYDIS_OPERAND_TYPE_POINTER &&
        d.mnemonic != ZYDIS_MNEMONIC_INT && d.mnemonic != ZYDIS_MNEMONIC_ENTER && random_.one_in(2)) {
      const u64 value = any_integer(random_);
      std::memcpy(bytes + immediate.offset, &value, immediate.size / 8);
    }
  note_uses(d, operands);
}

}  // namespace anykvm::isa
