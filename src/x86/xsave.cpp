// FXSAVE, XSAVE and their relatives on guest memory.
// Reference: Intel SDM volume 1 chapter 13, volume 2 FXSAVE ... XSAVES; AMD64 manual volume 4.
//
// A save first makes sure that the whole area can be written, then writes the parts that the instruction writes and no
// others. A restore reads everything before it changes a register.
#include "x86/xsave.h"

#include <cstring>

#include "x86/descriptors.h"
#include "x86/xsave_parts.h"

namespace anykvm::x86 {

namespace {

constexpr u64 compacted = 1ull << 63;
constexpr unsigned xstate_bv_offset = 512;

/// Components that lie behind the header.
constexpr u64 extended = ~(xfeature::x87 | xfeature::sse);

struct Header {
  u64 xstate_bv = 0, xcomp_bv = 0, reserved[6] = {};
};

/// Vector registers that the mode reaches.
unsigned vectors(const Cpu& cpu) { return cpu.state.code_bits == 64 ? 16 : 8; }

/// zmm16-31 do not exist outside 64-bit mode.
bool reachable(const Cpu& cpu, unsigned index) { return cpu.state.code_bits == 64 || index != 7; }

Result check_writable(Cpu& cpu, Gva gva, unsigned size) {
  Mmu::Translation translation;
  for (Gva page = gva & page_mask; page < gva + size; page += page_size) {
    ANYKVM_TRY(cpu.mmu.translate(cpu, page < gva ? gva : page, Access::write, cpu.data_privilege, translation));
  }
  return Result::ok;
}

Result write_x87(Cpu& cpu, Gva gva, bool wide) {
  u8 control[x87_control_size];
  store_x87_control(cpu.state.fpu, wide, control);
  ANYKVM_TRY(cpu.write(gva, control, sizeof control));
  return cpu.write(gva + x87_stack_offset, cpu.state.fpu.x87 + x87_stack_offset, x87_stack_size);
}

Result write_mxcsr(Cpu& cpu, Gva gva) {
  const u32 words[2] = {cpu.state.fpu.mxcsr, xsave_layout().mxcsr_mask};
  return cpu.write(gva + mxcsr_offset, words, sizeof words);
}

Result write_xmm(Cpu& cpu, Gva gva) {
  u8 registers[256];
  const unsigned count = vectors(cpu);
  for (unsigned i = 0; i < count; ++i) std::memcpy(registers + 16 * i, cpu.state.fpu.vector[i], 16);
  return cpu.write(gva + xmm_offset, registers, 16 * count);
}

/// What a restore has read, before it is believed.
struct Restore {
  u8 legacy[xmm_offset + 256];
  alignas(8) u8 extended[XsaveLayout::components][1024];
};

void apply_x87(Cpu& cpu, const Restore& restore, bool wide) {
  load_x87_control(cpu.state.fpu, wide, restore.legacy);
  std::memcpy(cpu.state.fpu.x87 + x87_stack_offset, restore.legacy + x87_stack_offset, x87_stack_size);
  constexpr unsigned register_size = 10, slot_size = 16;
  for (unsigned at = register_size; at < x87_stack_size; at += slot_size)
    std::memset(cpu.state.fpu.x87 + x87_stack_offset + at, 0, slot_size - register_size);
}

void apply_xmm(Cpu& cpu, const Restore& restore) {
  for (unsigned i = 0; i < vectors(cpu); ++i) {
    std::memcpy(cpu.state.fpu.vector[i], restore.legacy + xmm_offset + 16 * i, 16);
  }
}

/// EFER.FFXSR: kernels' FXSAVE leaves the XMM registers alone.
bool fast_fxsave(const Cpu& cpu) {
  return cpu.state.msr.efer & efer::ffxsr && cpu.state.cpl == 0 && cpu.state.code_bits == 64;
}

}  // namespace

Result Cpu::fxsave(Gva gva, bool rex_w) {
  ANYKVM_TRY(check_writable(*this, gva, XsaveLayout::legacy_size));
  ANYKVM_TRY(write_x87(*this, gva, rex_w));
  ANYKVM_TRY(write_mxcsr(*this, gva));
  return fast_fxsave(*this) ? Result::ok : write_xmm(*this, gva);
}

Result Cpu::fxrstor(Gva gva, bool rex_w) {
  Restore restore;
  ANYKVM_TRY(read(gva, restore.legacy, sizeof restore.legacy));
  u32 mxcsr;
  std::memcpy(&mxcsr, restore.legacy + mxcsr_offset, 4);
  if (mxcsr & ~xsave_layout().mxcsr_mask) return gp();
  apply_x87(*this, restore, rex_w);
  state.fpu.mxcsr = mxcsr;
  if (!fast_fxsave(*this)) apply_xmm(*this, restore);
  return Result::ok;
}

Result Cpu::xsave(Gva gva, u64 mask, Xsave form, bool rex_w) {
  const XsaveLayout& layout = xsave_layout();
  const FpuState& fpu = state.fpu;
  const bool compact = form == Xsave::xsavec || form == Xsave::xsaves;
  const u64 enabled = form == Xsave::xsaves ? state.xcr0 | state.msr.xss : state.xcr0;
  const u64 requested = mask & enabled;
  u64 in_use = xsave_in_use(fpu) & requested;
  if (compact && fpu.mxcsr != 0x1f80) in_use |= xfeature::sse & requested;
  const u64 saved = form == Xsave::xsave ? requested : in_use;

  ANYKVM_TRY(check_writable(*this, gva, compact ? layout.compacted_size(requested) : layout.standard_size(requested)));
  Header header = {.xstate_bv = in_use, .xcomp_bv = requested | compacted};
  if (!compact) {
    u64 before;
    ANYKVM_TRY(read(gva + xstate_bv_offset, before));
    header.xstate_bv |= before & ~requested;
  }

  if (saved & xfeature::x87) ANYKVM_TRY(write_x87(*this, gva, rex_w));
  if (compact ? saved & xfeature::sse : requested & (xfeature::sse | xfeature::avx)) {
    ANYKVM_TRY(write_mxcsr(*this, gva));
  }
  if (saved & xfeature::sse) ANYKVM_TRY(write_xmm(*this, gva));
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    if (!(saved & extended & layout.supported & 1ull << i) || !reachable(*this, i)) continue;
    u8 bytes[1024];
    const unsigned count = vectors(*this), full = layout.component[i].size;
    const unsigned size = i == 2 ? 16 * count : i == 6 ? 32 * count : full;
    store_component(fpu, i, i == 7 ? 16 : count, bytes);
    const u32 offset = compact ? layout.compacted_offset(requested, i) : layout.component[i].offset;
    ANYKVM_TRY(write(gva + offset, bytes, size));
  }
  return write(gva + xstate_bv_offset, &header, compact ? 16 : 8);
}

Result Cpu::xrstor(Gva gva, u64 mask, bool supervisor, bool rex_w) {
  const XsaveLayout& layout = xsave_layout();
  const u64 enabled = supervisor ? state.xcr0 | state.msr.xss : state.xcr0;
  const u64 requested = mask & enabled;

  Header header;
  ANYKVM_TRY(read(gva + xstate_bv_offset, &header, sizeof header));
  const bool compact = header.xcomp_bv & compacted;
  const u64 present = compact ? header.xcomp_bv & ~compacted : enabled;
  if (supervisor && !compact) return gp();
  if (compact ? present & ~enabled : header.xcomp_bv != 0) return gp();
  if (header.xstate_bv & ~present) return gp();
  for (unsigned i = 0; i < (compact ? 6 : 1); ++i) {
    if (header.reserved[i]) return gp();
  }

  const u64 loaded = requested & header.xstate_bv;
  // The standard format has MXCSR whatever XSTATE_BV says of SSE.
  const bool load_mxcsr = compact ? loaded & xfeature::sse : requested & (xfeature::sse | xfeature::avx);
  Restore restore;
  if (loaded & (xfeature::x87 | xfeature::sse) || load_mxcsr) {
    ANYKVM_TRY(read(gva, restore.legacy, sizeof restore.legacy));
  }
  u32 mxcsr = 0x1f80;
  if (load_mxcsr) {
    std::memcpy(&mxcsr, restore.legacy + mxcsr_offset, 4);
    if (mxcsr & ~layout.mxcsr_mask) return gp();
  }
  const unsigned count = vectors(*this);
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    if (!(loaded & layout.supported & 1ull << i) || !reachable(*this, i)) continue;
    const u32 offset = compact ? layout.compacted_offset(present, i) : layout.component[i].offset;
    ANYKVM_TRY(read(gva + offset, restore.extended[i], layout.component[i].size));
  }

  // Nothing can fail from here on.
  FpuState& fpu = state.fpu;
  const u32 pkru = fpu.pkru;
  if (loaded & xfeature::x87) {
    apply_x87(*this, restore, rex_w);
  } else if (requested & xfeature::x87) {
    init_x87(fpu);
  }
  if (load_mxcsr || (compact && requested & xfeature::sse)) fpu.mxcsr = mxcsr;
  if (loaded & xfeature::sse) {
    apply_xmm(*this, restore);
  } else if (requested & xfeature::sse) {
    for (unsigned i = 0; i < count; ++i) std::memset(fpu.vector[i], 0, 16);
  }
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    if (!(requested & layout.supported & 1ull << i) || !reachable(*this, i)) continue;
    if (!(loaded >> i & 1)) std::memset(restore.extended[i], 0, sizeof restore.extended[i]);
    load_component(fpu, i, i == 7 ? 16 : count, restore.extended[i]);
  }
  if (fpu.pkru != pkru && state.cr4 & cr4::pke) enter_address_space(false);
  return Result::ok;
}

}  // namespace anykvm::x86
