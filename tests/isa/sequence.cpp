#include "isa/sequence.h"

#include <algorithm>
#include <utility>

#include "isa/operands.h"
#include "isa/segments.h"
#include "isa/undefined.h"
#include "x86/state.h"

namespace anykvm::isa {

namespace flag = x86::flag;
using x86::rax, x86::rcx, x86::rdx, x86::rbx, x86::rsp, x86::rbp;

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
  // What the translator emits: 32-bit code on flat segments.
  const bool flat = c_.mode == Mode::code32 && (block_ ? !random_.one_in(8) : random_.one_in(2));
  if (flat) {
    s[1] = random_.one_in(2) ? code32_selector : local_selector(flat_code32);
    s[0] = s[2] = s[3] = data_selector;
    s[4] = data(), s[5] = data();
    return;
  }
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
  if (loops_ && undefined_flags_of(d.mnemonic)) return false;
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
    loop_counter_ = u8(random_.below(c_.mode == Mode::code64 ? 16 : 8));
    loops_ = is_open(loop_counter_);
  }
  if (!loops_) return;
  pin(loop_counter_, 2 + random_.below(5));
  loop_start_ = c_.code_length;
}

void Sequence::end_loop() {
  if (!std::exchange(loops_, false)) return;
  u8 bytes[10];
  unsigned length = 0;
  if (c_.mode == Mode::code64) bytes[length++] = u8(0x48 | loop_counter_ >> 3);
  if (random_.one_in(2)) {  // dec, which keeps CF
    bytes[length++] = 0xff, bytes[length++] = u8(0xc8 | (loop_counter_ & 7));
  } else {  // sub, 1
    bytes[length++] = 0x83, bytes[length++] = u8(0xe8 | (loop_counter_ & 7)), bytes[length++] = 1;
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
