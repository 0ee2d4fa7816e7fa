// Where the host puts the components of an XSAVE area, and how each is copied.
#include <cpuid.h>

#include <cstring>

#include "x86/x87_environment.h"
#include "x86/xsave_parts.h"

namespace anykvm::x86 {

namespace {

constexpr u64 known = xfeature::x87 | xfeature::sse | xfeature::avx | xfeature::opmask | xfeature::zmm_hi256 |
                      xfeature::hi16_zmm | xfeature::pkru;

XsaveLayout ask_host() {
  XsaveLayout layout;
  u32 eax, ebx, ecx, edx;
  layout.supported = xfeature::x87 | xfeature::sse;
  // What the host's kernel has turned on: a register file that it does not save is not ours to use.
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_OSXSAVE) {
    asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    layout.supported |= (eax | u64(edx) << 32) & known;
  }
  layout.component[0] = {0, 160, false};
  layout.component[1] = {xmm_offset, 256, false};
  layout.component[2] = {XsaveLayout::extended_offset, 256, false};  // by architecture
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    if (!(layout.supported >> i & 1) || !__get_cpuid_count(0xd, i, &eax, &ebx, &ecx, &edx)) continue;
    layout.component[i] = {ebx, eax, (ecx & 2) != 0};
  }
  alignas(16) u8 image[512] = {};
  asm volatile("fxsave64 %0" : "=m"(image));
  std::memcpy(&layout.mxcsr_mask, image + 28, 4);
  if (!layout.mxcsr_mask) layout.mxcsr_mask = 0xffbf;
  return layout;
}

bool any(const u8* bytes, unsigned size) {
  u64 all = 0;
  for (unsigned i = 0; i < size; i += 8) {
    u64 word;
    std::memcpy(&word, bytes + i, 8);
    all |= word;
  }
  return all;
}

bool any_part(const FpuState& fpu, unsigned first, unsigned offset, unsigned size) {
  for (unsigned i = first; i < first + 16; ++i) {
    if (any(fpu.vector[i] + offset, size)) return true;
  }
  return false;
}

/// The part of vector registers `first`... that a component holds.
struct VectorPart {
  unsigned first, offset, size;
};

bool vector_part(unsigned index, VectorPart& part) {
  switch (1ull << index) {
    case xfeature::avx: part = {0, 16, 16}; return true;
    case xfeature::zmm_hi256: part = {0, 32, 32}; return true;
    case xfeature::hi16_zmm: part = {16, 0, 64}; return true;
    default: return false;
  }
}

}  // namespace

const XsaveLayout& xsave_layout() {
  static const XsaveLayout layout = ask_host();
  return layout;
}

u32 XsaveLayout::standard_size(u64 features) const {
  u32 size = extended_offset;
  for (unsigned i = 2; i < components; ++i) {
    const u32 end = component[i].offset + component[i].size;
    if (features >> i & 1 && end > size) size = end;
  }
  return size;
}

u32 XsaveLayout::compacted_offset(u64 features, unsigned index) const {
  u32 offset = extended_offset;
  for (unsigned i = 2; i <= index; ++i) {
    if (!(features >> i & 1)) continue;
    if (component[i].aligned) offset = (offset + 63) & ~63u;
    if (i == index) break;
    offset += component[i].size;
  }
  return offset;
}

u32 XsaveLayout::compacted_size(u64 features) const {
  u32 size = extended_offset;
  for (unsigned i = 2; i < components; ++i) {
    if (features >> i & 1) size = compacted_offset(features, i) + component[i].size;
  }
  return size;
}

u64 xsave_in_use(const FpuState& fpu) {
  u64 in_use = 0;
  u8 control[x87_control_size];
  std::memcpy(control, fpu.x87, sizeof control);
  control[0] ^= 0x7f;  // FCW starts as 0x37f
  control[1] ^= 0x03;
  if (any(control, sizeof control) || any(fpu.x87 + x87_stack_offset, x87_stack_size)) in_use |= xfeature::x87;
  if (any_part(fpu, 0, 0, 16)) in_use |= xfeature::sse;
  if (any_part(fpu, 0, 16, 16)) in_use |= xfeature::avx;
  if (any_part(fpu, 0, 32, 32)) in_use |= xfeature::zmm_hi256;
  if (any_part(fpu, 16, 0, 64)) in_use |= xfeature::hi16_zmm;
  for (u64 mask : fpu.opmask) in_use |= mask ? xfeature::opmask : 0;
  if (fpu.pkru) in_use |= xfeature::pkru;
  return in_use;
}

void store_component(const FpuState& fpu, unsigned index, unsigned vectors, u8* out) {
  if (VectorPart part; vector_part(index, part)) {
    for (unsigned i = 0; i < vectors; ++i) {
      std::memcpy(out + i * part.size, fpu.vector[part.first + i] + part.offset, part.size);
    }
  } else if (1ull << index == xfeature::opmask) {
    std::memcpy(out, fpu.opmask, sizeof fpu.opmask);
  } else if (1ull << index == xfeature::pkru) {
    std::memset(out, 0, 8);
    std::memcpy(out, &fpu.pkru, 4);
  }
}

void load_component(FpuState& fpu, unsigned index, unsigned vectors, const u8* in) {
  if (VectorPart part; vector_part(index, part)) {
    for (unsigned i = 0; i < vectors; ++i) {
      std::memcpy(fpu.vector[part.first + i] + part.offset, in + i * part.size, part.size);
    }
  } else if (1ull << index == xfeature::opmask) {
    std::memcpy(fpu.opmask, in, sizeof fpu.opmask);
  } else if (1ull << index == xfeature::pkru) {
    std::memcpy(&fpu.pkru, in, 4);
  }
}

void store_x87_control(const FpuState& fpu, bool wide, u8* out) {
  std::memcpy(out, fpu.x87, x87_control_size);
  const bool exception_waits = fpu.x87[2] & 0x80;
  if (x87_behaviour().drops_pointers && !exception_waits) {
    std::memset(out + 6, 0, x87_control_size - 6);
    return;
  }
  if (wide) return;
  const u32 selectors[] = {fpu.x87_code_selector, fpu.x87_data_selector};
  std::memcpy(out + 12, &selectors[0], 4);
  std::memcpy(out + 20, &selectors[1], 4);
}

void load_x87_control(FpuState& fpu, bool wide, const u8* in) {
  std::memcpy(fpu.x87, in, x87_control_size);
  fpu.x87[5] = 0;   // reserved, next to the abridged tag word
  fpu.x87[7] &= 7;  // FOP has 11 bits
  settle_x87_words(fpu);
  fpu.x87_code_selector = fpu.x87_data_selector = 0;
  if (wide) {
    const unsigned above = 64 - x87_behaviour().pointer_bits;
    for (u8* pointer : {fpu.x87 + 8, fpu.x87 + 16}) {
      s64 value;
      std::memcpy(&value, pointer, sizeof value);
      value = s64(u64(value) << above) >> above;
      std::memcpy(pointer, &value, sizeof value);
    }
    return;
  }
  if (x87_behaviour().keeps_selectors) {
    std::memcpy(&fpu.x87_code_selector, in + 12, 2);
    std::memcpy(&fpu.x87_data_selector, in + 20, 2);
  }
  std::memset(fpu.x87 + 12, 0, 4);
  std::memset(fpu.x87 + 20, 0, 4);
}

void settle_x87_words(FpuState& fpu) {
  u16 control, status;
  std::memcpy(&control, fpu.x87, 2);
  std::memcpy(&status, fpu.x87 + 2, 2);
  control = (control & 0x1f3f) | 0x40;
  const bool waits = status & ~control & 0x3f;
  status = (status & 0x7f7f) | (waits ? 0x8080 : 0);
  std::memcpy(fpu.x87, &control, 2);
  std::memcpy(fpu.x87 + 2, &status, 2);
}

void init_x87(FpuState& fpu) {
  std::memset(fpu.x87, 0, x87_control_size);  // MXCSR's place is the engine's
  std::memset(fpu.x87 + x87_stack_offset, 0, x87_stack_size);
  fpu.x87[0] = 0x7f;
  fpu.x87[1] = 0x03;
  fpu.x87_code_selector = fpu.x87_data_selector = 0;
}

}  // namespace anykvm::x86
