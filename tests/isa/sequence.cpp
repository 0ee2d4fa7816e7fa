#include "isa/sequence.h"

#include <algorithm>
#include <utility>

#include "isa/segments.h"
#include "isa/undefined.h"
#include "x86/state.h"

namespace anykvm::isa {

namespace flag = x86::flag;
using x86::rax, x86::rcx, x86::rdx, x86::rbx, x86::rsp, x86::rbp;

namespace {

constexpr int no_gpr = -1;

int gpr_of(ZydisRegister reg) {
  switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
      return ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg));
    default: return no_gpr;
  }
}
bool is_vector(ZydisRegister reg) {
  const ZydisRegisterClass kind = ZydisRegisterGetClass(reg);
  return kind == ZYDIS_REGCLASS_XMM || kind == ZYDIS_REGCLASS_YMM || kind == ZYDIS_REGCLASS_ZMM;
}
u64 masked(u64 value, unsigned bits) { return bits >= 64 ? value : value & ((1ull << bits) - 1); }

bool is_image(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64: return true;
    default: return false;
  }
}
bool is_xsave(const ZydisDecodedInstruction& d) {
  return d.meta.category == ZYDIS_CATEGORY_XSAVE || d.meta.category == ZYDIS_CATEGORY_XSAVEOPT;
}
/// EDX:EAX chooses XSAVE components.
bool takes_components(const ZydisDecodedInstruction& d) {
  return is_xsave(d) || d.mnemonic == ZYDIS_MNEMONIC_XRSTOR || d.mnemonic == ZYDIS_MNEMONIC_XRSTOR64;
}
bool is_far_branch(const ZydisDecodedInstruction& d) { return d.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR; }

}  // namespace

Sequence::Sequence(Case& c, Random& random, u64 features, Kind kind)
    : c_(c), random_(random), features_(features), block_(kind == Kind::block) {
  // Mostly at the start of the code; sometimes across the pages' border, rarely across the end.
  c.code_offset = u16(random.one_in(8) ? page_size - random.below(block_ ? 200 : 24) : 0x100 + random.below(4) * 16);
  begin_segments();
  // RSP always points into the data; somewhere near a page's border once in a while.
  const u64 stack = data_address +
                    (random.one_in(8) ? page_size + random.below(64) - 32 : 0x800 + random.below(64) * 8) +
                    (random.one_in(8) ? random.below(8) : 0);
  pin(rsp, stack - segment_base(ZYDIS_REGISTER_SS));
}

void Sequence::begin_segments() {
  Registers& in = c_.in;
  u16* s = in.selector;
  if (c_.mode == Mode::code64) {
    s[0] = s[3] = s[4] = s[5] = 0;
    s[1] = code64_selector, s[2] = data_selector;
    const auto base = [&] { return random_.one_in(2) ? 0x1000 * u64(random_.below(256)) : u64(random_.next() >> 20); };
    in.base[0] = base();
    in.base[1] = base();
    return;
  }
  in.base[0] = in.base[1] = 0;
  const auto data = [&]() -> u16 {
    static constexpr u16 usual[] = {data_selector, data_selector, local_selector(small_data32), local_selector(data16)};
    static constexpr u16 rare[] = {local_selector(down_data), local_selector(readonly_data),
                                   local_selector(down_data32), local_selector(tiny_data), 0};
    return random_.one_in(24) ? random_.pick(rare) : random_.pick(usual);
  };
  if (c_.mode == Mode::code32) {
    static constexpr u16 code[] = {code32_selector, local_selector(flat_code32), local_selector(small_code32)};
    s[1] = random_.pick(code);
    s[2] = random_.one_in(4) ? local_selector(random_.one_in(2) ? small_data32 : data16) : data_selector;
  } else {
    s[1] = local_selector(code16);
    s[2] = local_selector(random_.one_in(4) ? small_data32 : data16);
  }
  for (unsigned n : {0u, 3u, 4u, 5u}) s[n] = data();
  // 16-bit addresses reach the data only with a base.
  if (c_.mode == Mode::code16)
    for (unsigned n : {0u, 3u, 4u, 5u})
      if (s[n] == data_selector) s[n] = local_selector(data16);
}

u64 Sequence::segment_base(ZydisRegister segment) const {
  const Registers& in = c_.in;
  if (c_.mode == Mode::code64)
    return segment == ZYDIS_REGISTER_FS ? in.base[0] : segment == ZYDIS_REGISTER_GS ? in.base[1] : 0;
  const unsigned id = unsigned(ZydisRegisterGetId(segment));
  return id < 6 ? extent_of(in.selector[id]).base : 0;
}

u64 Sequence::next_ip(unsigned length) const {
  const u64 base = c_.mode == Mode::code64 ? 0 : extent_of(c_.in.selector[1]).base;
  return code_address + c_.code_offset + c_.code_length + length - base;
}

u16 Sequence::any_selector() {
  static constexpr u16 pool[] = {0,
                                 1,
                                 3,
                                 data_selector,
                                 data_selector,
                                 0x28,
                                 code32_selector,
                                 code64_selector,
                                 0x10,
                                 0x43,
                                 0x50,
                                 local_selector(flat_code32),
                                 local_selector(small_data32),
                                 local_selector(data16),
                                 local_selector(down_data),
                                 local_selector(readonly_data),
                                 local_selector(absent_data),
                                 local_selector(hidden_code),
                                 local_selector(data16) & ~1,
                                 local_selector(11),
                                 0x85};
  return random_.pick(pool);
}

/// For far branches: where they stay in the mode, or fault. What comes behind them is made for this mode.
u16 Sequence::branch_selector() {
  static constexpr u16 faulting[] = {
      0, 3, data_selector, 0x10, 0x43, local_selector(data16), local_selector(absent_data), local_selector(11), 0x85};
  return random_.one_in(4) ? random_.pick(faulting) : c_.in.selector[1];
}

Fields Sequence::draw_fields(const Form& form) {
  // The upper bits of mask registers' numbers mean nothing to some processors, and #UD to the decoder.
  const unsigned registers = c_.mode != Mode::code64 || (form.masks && form.encoding == Encoding::vex) ? 8
                             : form.encoding == Encoding::evex                                         ? 32
                                                                                                       : 16;
  const auto any = [&] {
    unsigned n = random_.below(registers);
    if (n == rsp && random_.one_in(2)) n = random_.below(registers);
    return u8(n);
  };
  Fields f;
  f.reg = any();
  f.rm = any();
  f.vvvv = form.takes_vvvv || random_.one_in(64) ? any() : u8(0);
  f.rex = random_.one_in(4);
  f.short_vex = random_.one_in(2);
  if (form.takes_mask && !random_.one_in(3)) f.mask = u8(random_.below(8));
  if (form.needs_mask) f.mask = u8(1 + random_.below(7));
  f.zeroing = form.takes_zeroing && f.mask && random_.one_in(2);
  if (form.kind != Form::memory) return f;
  // Addresses from registers that still hold what they began with.
  f.mod = u8(random_.below(3));
  for (unsigned tries = 0; tries < 8; ++tries) {
    f.rm = u8(random_.below(registers > 16 ? 16 : registers));
    if (is_known(f.rm) && f.rm != rsp) break;
  }
  if (form.needs_sib || random_.one_in(4)) f.rm = u8((f.rm & 8) | 4);
  f.index_high = random_.one_in(2);
  f.sib = u8(random_.next());
  for (unsigned tries = 0; tries < 8; ++tries, f.sib = u8(random_.next())) {
    const unsigned base = (f.sib & 7u) | (f.rm & 8u), index = (f.sib >> 3 & 7u) | f.index_high * 8u;
    if (is_known(base) && (is_known(index) || index == rsp)) break;
  }
  return f;
}

/// An encoding of the form with random tail; returns the bytes of prefixes, opcode, ModRM and SIB.
unsigned Sequence::draw(const Form& form, u8 (&bytes)[32]) {
  for (u8& byte : bytes) byte = u8(random_.next());
  u8* at = bytes;
  const auto prefix = [&](unsigned n, u8 value) {
    if (random_.one_in(n)) *at++ = value;
  };
  if (random_.one_in(8)) {
    static constexpr u8 segments[] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65};
    *at++ = random_.pick(segments);
  }
  prefix(24, 0x67);
  if (form.encoding == Encoding::legacy) {
    // LOCK with VERR, VERW and their group: the operand's page fault comes before #UD, sometimes.
    if (form.map != 1 || form.opcode != 0) prefix(form.kind == Form::memory ? 12 : 48, 0xf0);
    if (!form.pp) prefix(12, 0xf3), prefix(24, 0xf2);
    if (form.pp != 1) prefix(form.map < 2 ? 6 : 48, 0x66);
  } else {
    prefix(400, 0xf0), prefix(400, 0xf3), prefix(400, 0x66), prefix(400, 0x48);
  }
  if (!form.faults && at == bytes && random_.one_in(200))  // on the way to the limit of 15 bytes
    for (unsigned n = random_.below(12); n; --n) *at++ = 0x3e;
  return unsigned(at - bytes) + form.assemble(draw_fields(form), c_.mode, at);
}

/// Whether the addresses come from registers whose value is known here.
bool Sequence::reaches(const ZydisDecodedInstruction& d, const Operands& operands) const {
  for (unsigned n = 0; n < d.operand_count; ++n) {
    const ZydisDecodedOperand& o = operands[n];
    if (o.type != ZYDIS_OPERAND_TYPE_MEMORY || o.mem.type == ZYDIS_MEMOP_TYPE_AGEN) continue;
    const int base = gpr_of(o.mem.base), index = gpr_of(o.mem.index);
    if (base != rsp && base >= 0 && !is_known(unsigned(base))) return false;
    if (index >= 0 && !is_known(unsigned(index))) return false;
    if (index >= 0 && index == base && x87_selectors(d, 0).code) return false;  // where it goes must be known
    if (is_vector(o.mem.index) && vectors_written_ >> ZydisRegisterGetId(o.mem.index) & 1) return false;
  }
  return true;
}

/// What neither ends the block nor spoils the addresses of those behind it, and in a loop those before it. Now and then
/// it may.
bool Sequence::suits_block(const ZydisDecodedInstruction& d, const Operands& operands) {
  if (x87_selectors(d, 0).code || d.meta.category == ZYDIS_CATEGORY_RET || is_far_branch(d)) return false;
  const bool may_spoil = random_.one_in(16);
  for (unsigned n = 0; n < d.operand_count; ++n) {
    if (operands[n].type != ZYDIS_OPERAND_TYPE_REGISTER || !(operands[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
      continue;
    const int gpr = gpr_of(operands[n].reg.value);
    if (gpr < 0) continue;
    if (loops_ && gpr == loop_counter_) return false;
    const bool stack = gpr == rsp && operands[n].visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;
    if (!may_spoil && !stack && (gpr == rsp || pinned_ >> gpr & 1)) return false;
  }
  return true;
}

void Sequence::begin_loop() {
  for (unsigned tries = 0; tries < 8 && !loops_; ++tries) {
    loop_counter_ = u8(random_.below(16));
    loops_ = is_open(loop_counter_);
  }
  if (!loops_) return;
  pin(loop_counter_, 2 + random_.below(5));
  loop_start_ = c_.code_length;
}

void Sequence::end_loop() {
  if (!std::exchange(loops_, false)) return;
  u8 bytes[10] = {u8(0x48 | loop_counter_ >> 3)};
  unsigned length = 3;
  if (random_.one_in(2)) {  // dec, which keeps CF
    bytes[1] = 0xff, bytes[2] = u8(0xc8 | (loop_counter_ & 7));
  } else {  // sub, 1
    bytes[1] = 0x83, bytes[2] = u8(0xe8 | (loop_counter_ & 7)), bytes[length++] = 1;
  }
  bytes[length++] = 0x0f, bytes[length++] = 0x85;  // jnz
  if (c_.code_length + length + 4 > Case::max_code) return;
  const s32 back = s32(loop_start_) - s32(c_.code_length + length + 4);
  std::memcpy(bytes + length, &back, 4), length += 4;
  std::memcpy(c_.code + c_.code_length, bytes, length);
  c_.code_length = u16(c_.code_length + length);
  c_.instructions = u8(c_.instructions + 2);
  written_ |= 1u << loop_counter_;
  add_boundary();
}

bool Sequence::add(const Form& form) {
  if (closed_) return false;
  for (unsigned tries = 0; tries < 12; ++tries) {
    u8 bytes[32];
    const unsigned head = draw(form, bytes);
    engine::Decoded decoded;
    const auto& [d, operands] = decoded;
    unsigned length;
    if (decode(c_.mode, bytes, 15, decoded)) {
      if (exclusion(d, operands) || (!is_known(rsp) && has_erratum(d, operands))) continue;
      if (block_ && !suits_block(d, operands)) continue;
      const bool must_reach = block_ || x87_selectors(d, 0).code != 0;
      if ((tries < 8 || must_reach) && !reaches(d, operands)) continue;
      if (takes_components(d) && !is_open(rax)) continue;
      length = d.length;
      if (c_.code_length + length > Case::max_code) return false;
      settle(bytes, d, operands);
    } else {
      if (form.defined && tries < 6 && !random_.one_in(32)) continue;
      length = head + random_.below(5);
      if (c_.code_length + length > Case::max_code) return false;
    }
    std::memcpy(c_.code + c_.code_length, bytes, length);
    c_.code_length = u16(c_.code_length + length);
    ++c_.instructions;
    add_boundary();
    return true;
  }
  return false;
}

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

void Sequence::note_uses(const ZydisDecodedInstruction& d, const Operands& operands) {
  if (ignores_alignment(d.mnemonic)) alignment_checks_ = false;
  if (undefined_flags_of(d.mnemonic)) closed_ = true;  // nothing may depend on them
  if (d.meta.isa_ext == ZYDIS_ISA_EXT_X87 || d.meta.isa_ext == ZYDIS_ISA_EXT_MMX || is_image(d.mnemonic) || is_xsave(d))
    x87_ = true;
  for (unsigned n = 0; n < d.operand_count; ++n) {
    const ZydisDecodedOperand& o = operands[n];
    const bool written = o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    if (o.element_type == ZYDIS_ELEMENT_TYPE_FLOAT32) lanes_ = Lanes::singles;
    if (o.element_type == ZYDIS_ELEMENT_TYPE_FLOAT64) lanes_ = Lanes::doubles;
    if (o.element_type == ZYDIS_ELEMENT_TYPE_FLOAT16) lanes_ = Lanes::halves;
    if (o.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
    const ZydisRegister reg = o.reg.value;
    if (const int gpr = gpr_of(reg); gpr >= 0 && written) written_ |= 1u << gpr;
    if (is_vector(reg)) {
      const u32 bit = 1u << ZydisRegisterGetId(reg);
      vectors_ |= bit;
      if (written) vectors_written_ |= bit;
    }
    const ZydisRegisterClass kind = ZydisRegisterGetClass(reg);
    if (kind == ZYDIS_REGCLASS_MASK) opmasks_ |= u8(1u << ZydisRegisterGetId(reg));
    if (kind == ZYDIS_REGCLASS_MMX || kind == ZYDIS_REGCLASS_X87) x87_ = true;
  }
}

void Sequence::finish_x87() {
  u8* fx = c_.in.fx;
  std::memset(fx, 0, 24);
  u16 control = 0x37f, status = 0;
  if (x87_) {
    if (random_.one_in(2)) control = u16(0x7f | (random_.next() & 0x0f00));
    if (random_.one_in(4)) control &= u16(0xffc0 | random_.next());
    status = u16(random_.next() & 0x7f00);
    if (random_.one_in(4)) status |= u16(random_.next() & 0x7f);
    if (random_.one_in(3)) status &= 0x3800;
    // A pending exception ends the case: rarely.
    if (status & ~control & 0x3f && !random_.one_in(8)) status &= u16(~0x3f | control);
    fx[4] = random_.one_in(3) ? u8(random_.next()) : 0xff;
    for (unsigned n = 0; n < 8; ++n) {
      std::memset(fx + 32 + 16 * n, 0, 16);
      any_extended(random_, fx + 32 + 16 * n);
    }
  } else {
    std::memset(fx + 32, 0, 128);
  }
  if (status & ~control & 0x3f) status |= 0x8080;
  std::memcpy(fx, &control, 2);
  std::memcpy(fx + 2, &status, 2);
}

void Sequence::finish() {
  Registers& in = c_.in;
  const unsigned registers = c_.mode == Mode::code64 ? 16 : 8;
  for (unsigned n = 0; n < 16; ++n) {
    if (!(pinned_ >> n & 1)) in.gpr[n] = any_integer(random_);
    if (c_.mode != Mode::code64) in.gpr[n] = n < registers ? u32(in.gpr[n]) : 0;
  }
  if (c_.mode != Mode::code64 && !is_wide(in.selector[2])) in.gpr[rsp] = u16(in.gpr[rsp]) | narrow_stack_high;
  in.rflags = (random_.next() & flag::arithmetic) | flag::fixed1 | flag::if_ | (random_.one_in(6) ? flag::df : 0) |
              (alignment_checks_ && random_.one_in(48) ? flag::ac : 0) | (random_.one_in(200) ? flag::tf : 0) |
              (random_.one_in(8) ? flag::id : 0) | (random_.one_in(32) ? flag::nt : 0);
  for (unsigned n = 0; n < 32; ++n) {
    if (!(vectors_ >> n & 1) || vectors_pinned_ >> n & 1) continue;
    const Lanes lanes = random_.one_in(6) ? Lanes::mixed : lanes_;
    const auto fill = [&](u8* to, unsigned bytes) {
      for (unsigned at = 0; at < bytes; at += 8) {
        const u64 lane = any_lane(random_, lanes);
        std::memcpy(to + at, &lane, 8);
      }
    };
    fill(in.xmm(n), n < 16 ? 16 : 64);
    if (n < 16) fill(in.ymm_high[n], 16);
    if (n < 16 && features_ >> 6 & 1) fill(in.zmm_high[n], 32);
  }
  for (unsigned n = 0; n < 8; ++n)
    if (opmasks_ >> n & 1) in.opmask[n] = any_integer(random_);
  u32 mxcsr = 0x1f80;
  if (vectors_) {
    if (random_.one_in(2)) mxcsr |= u32(random_.next()) & 0xe040;
    if (random_.one_in(4)) mxcsr |= u32(random_.next()) & 0x3f;
    if (random_.one_in(8)) mxcsr &= u32(random_.next()) | ~0x1f80u;
  }
  in.set_mxcsr(mxcsr);
  finish_x87();

  for (unsigned n = 0; n < branch_count_; ++n) {
    const Branch& branch = branches_[n];
    if (branch.bytes > 1 && random_.one_in(32)) continue;  // anywhere
    u16 to = branch.end;
    if (block_) {
      unsigned next = 0;
      while (next < boundary_count_ && boundaries_[next] <= branch.end) ++next;
      next += random_.below(4);  // as far as 8 bits reach
      if (next && next <= boundary_count_) to = std::max(to, boundaries_[next - 1]);
    } else if (random_.one_in(2))
      for (unsigned k = 0; k < boundary_count_; ++k)
        if (boundaries_[k] > branch.end && random_.one_in(2)) to = boundaries_[k];
    const s32 displacement = s32(to) - s32(branch.end);
    std::memcpy(c_.code + branch.field, &displacement, branch.bytes);
  }
  in.rip = next_ip(0) - c_.code_length;
  std::memset(in.unused, 0, sizeof in.unused);
  in.in_use = 0;
}

}  // namespace anykvm::isa
