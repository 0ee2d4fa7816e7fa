// FpuState as clients see it: the standard-format XSAVE area of KVM_GET/SET_XSAVE and struct kvm_fpu.
// Reference: Documentation/virt/kvm/api.rst 4.22, 4.23, 4.42, 4.43.
#include <cstring>

#include "anykvm/kvm.h"
#include "x86/xsave_parts.h"

namespace anykvm::x86 {

namespace {

/// The legacy region and the header as they lie in an area.
struct Area {
  u8 legacy[XsaveLayout::legacy_size] = {};
  u64 xstate_bv = 0, xcomp_bv = 0, reserved[6] = {};
};
static_assert(sizeof(Area) == XsaveLayout::extended_offset);

}  // namespace

void fpu_to_xsave(const FpuState& fpu, u64 features, std::span<u8> image) {
  const XsaveLayout& layout = xsave_layout();
  std::memset(image.data(), 0, image.size());
  features |= xfeature::x87 | xfeature::sse;
  Area area;
  std::memcpy(area.legacy, fpu.x87, x87_control_size);  // the pointers, too, which an instruction might drop
  std::memcpy(area.legacy + mxcsr_offset, &fpu.mxcsr, 4);
  std::memcpy(area.legacy + mxcsr_offset + 4, &layout.mxcsr_mask, 4);
  std::memcpy(area.legacy + x87_stack_offset, fpu.x87 + x87_stack_offset, x87_stack_size);
  for (unsigned i = 0; i < 16; ++i) std::memcpy(area.legacy + xmm_offset + 16 * i, fpu.vector[i], 16);
  area.xstate_bv = (xsave_in_use(fpu) & features) | (fpu.mxcsr != 0x1f80 ? xfeature::sse : 0);
  std::memcpy(image.data(), &area, image.size() < sizeof area ? image.size() : sizeof area);
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    const XsaveComponent& c = layout.component[i];
    if (area.xstate_bv >> i & 1 && c.offset && c.offset + c.size <= image.size()) {
      store_component(fpu, i, 16, image.data() + c.offset);
    }
  }
}

bool xsave_to_fpu(FpuState& fpu, u64 features, std::span<const u8> image) {
  const XsaveLayout& layout = xsave_layout();
  if (image.size() < sizeof(Area)) return false;
  Area area;
  std::memcpy(&area, image.data(), sizeof area);
  features |= xfeature::x87 | xfeature::sse;
  if (area.xstate_bv & ~features || area.xcomp_bv) return false;
  for (u64 word : area.reserved) {
    if (word) return false;
  }
  u32 mxcsr;
  std::memcpy(&mxcsr, area.legacy + mxcsr_offset, 4);
  if (area.xstate_bv & (xfeature::sse | xfeature::avx) && mxcsr & ~layout.mxcsr_mask) return false;
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    const XsaveComponent& c = layout.component[i];
    if (area.xstate_bv >> i & 1 && (!c.offset || c.offset + c.size > image.size())) return false;
  }

  FpuState next;
  init_x87(next);
  if (area.xstate_bv & xfeature::x87) {
    load_x87_control(next, true, area.legacy);
    std::memcpy(next.x87 + x87_stack_offset, area.legacy + x87_stack_offset, x87_stack_size);
  }
  if (area.xstate_bv & xfeature::sse) {
    for (unsigned i = 0; i < 16; ++i) std::memcpy(next.vector[i], area.legacy + xmm_offset + 16 * i, 16);
  }
  if (area.xstate_bv & (xfeature::sse | xfeature::avx)) next.mxcsr = mxcsr;
  for (unsigned i = 2; i < XsaveLayout::components; ++i) {
    if (area.xstate_bv >> i & 1) load_component(next, i, 16, image.data() + layout.component[i].offset);
  }
  fpu = next;
  return true;
}

void fpu_to_kvm(const FpuState& fpu, kvm_fpu& out) {
  out = {};
  std::memcpy(out.fpr, fpu.x87 + x87_stack_offset, sizeof out.fpr);
  std::memcpy(&out.fcw, fpu.x87, 2);
  std::memcpy(&out.fsw, fpu.x87 + 2, 2);
  out.ftwx = fpu.x87[4];
  std::memcpy(&out.last_opcode, fpu.x87 + 6, 2);
  std::memcpy(&out.last_ip, fpu.x87 + 8, 8);
  std::memcpy(&out.last_dp, fpu.x87 + 16, 8);
  for (unsigned i = 0; i < 16; ++i) std::memcpy(out.xmm[i], fpu.vector[i], 16);
  out.mxcsr = fpu.mxcsr;
}

void kvm_to_fpu(FpuState& fpu, const kvm_fpu& in) {
  std::memcpy(fpu.x87 + x87_stack_offset, in.fpr, sizeof in.fpr);
  std::memcpy(fpu.x87, &in.fcw, 2);
  std::memcpy(fpu.x87 + 2, &in.fsw, 2);
  fpu.x87[4] = in.ftwx;
  fpu.x87[5] = 0;
  settle_x87_words(fpu);
  std::memcpy(fpu.x87 + 6, &in.last_opcode, 2);
  std::memcpy(fpu.x87 + 8, &in.last_ip, 8);
  std::memcpy(fpu.x87 + 16, &in.last_dp, 8);
  for (unsigned i = 0; i < 16; ++i) std::memcpy(fpu.vector[i], in.xmm[i], 16);
  fpu.mxcsr = in.mxcsr & xsave_layout().mxcsr_mask;
}

}  // namespace anykvm::x86
