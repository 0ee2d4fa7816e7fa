// The XSAVE area: where each component lies, and conversions between FpuState and the images that KVM_GET/SET_XSAVE
// and KVM_GET/SET_FPU carry. Components lie where the host's CPUID leaf 0xD puts them, so that guest, client and
// host mean the same bytes.
// Reference: Intel SDM volume 1 chapter 13, AMD64 manual volume 2 section 11.5.
#pragma once

#include <span>

#include "x86/state.h"

struct kvm_fpu;

namespace anykvm::x86 {

struct XsaveComponent {
  u32 offset = 0;  ///< in the standard format; 0: the component is not known
  u32 size = 0;
  bool aligned = false;  ///< starts at a multiple of 64 in the compacted format
};

struct XsaveLayout {
  static constexpr unsigned components = 10;
  static constexpr u32 legacy_size = 512, header_size = 64, extended_offset = legacy_size + header_size;

  XsaveComponent component[components];
  u64 supported = 0;   ///< XCR0 bits that this machine can give a guest: what the host has and FpuState holds
  u32 mxcsr_mask = 0;  ///< MXCSR bits that may be 1

  /// Bytes of an area in the standard format with these components enabled; leaf 0xD's EBX and ECX.
  u32 standard_size(u64 features) const;
  /// Bytes of an area in the compacted format; leaf 0xD subleaf 1's EBX.
  u32 compacted_size(u64 features) const;
  /// Where component `index` starts in a compacted area that holds `features`.
  u32 compacted_offset(u64 features, unsigned index) const;
};

/// The same for the whole process; the host is asked once.
const XsaveLayout& xsave_layout();

/// The components that are not in their initial state (XINUSE), computed from the registers.
u64 xsave_in_use(const FpuState& fpu);

/// FpuState as a standard-format image. Components outside `features` are left out (x87 and SSE never are); `image` is
/// zeroed first and may be shorter or longer than the components need.
void fpu_to_xsave(const FpuState& fpu, u64 features, std::span<u8> image);
/// The way back. false, with nothing changed, when the header names components outside `features`, is not a
/// standard-format header, or its MXCSR has reserved bits (KVM: EINVAL).
bool xsave_to_fpu(FpuState& fpu, u64 features, std::span<const u8> image);

void fpu_to_kvm(const FpuState& fpu, kvm_fpu& out);
void kvm_to_fpu(FpuState& fpu, const kvm_fpu& in);

}  // namespace anykvm::x86
