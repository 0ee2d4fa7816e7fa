// KVM_GET_SUPPORTED_CPUID: the host's CPUID, masked to what the engines execute, plus what they provide by themselves.
// The entries are laid out as KVM lays them out: basic leaves, extended leaves, KVM's own.
#include <cpuid.h>

#include <cstring>

#include "os/tsc.h"
#include "paravirt/features.h"
#include "x86/cpuid.h"
#include "x86/xsave.h"

namespace anykvm::x86 {
namespace {

struct Regs {
  u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Regs host(u32 leaf, u32 subleaf = 0) {
  Regs r;
  if (__get_cpuid_max(leaf & 0x80000000, nullptr) < leaf) return r;
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

constexpr u32 bits(std::initializer_list<Feature> features) {
  u32 word = 0;
  for (Feature f : features) word |= 1u << (unsigned(f) % 32);
  return word;
}

/// Leaf 7 EBX facts about the host's x87 unit, which is the guest's: FDP_EXCPTN_ONLY and ZERO_FCS_FDS.
constexpr u32 x87_facts = 1u << 6 | 1u << 13;

/// AVX-512, which is offered together with its components of XCR0 or not at all.
constexpr u32 avx512(CpuidWord word) {
  using enum Feature;
  switch (word) {
    case CpuidWord::leaf7_ebx: return bits({avx512f, avx512dq, avx512ifma, avx512cd, avx512bw, avx512vl});
    case CpuidWord::leaf7_ecx: return bits({avx512vbmi, avx512_vbmi2, avx512_vnni, avx512_bitalg, avx512_vpopcntdq});
    case CpuidWord::leaf7_edx: return bits({avx512_vp2intersect, avx512_fp16});
    case CpuidWord::leaf7_1_eax: return bits({avx512_bf16});
    default: return 0;
  }
}

/// Instructions that run on the host's own units: offered when the host CPU has them.
constexpr u32 native(CpuidWord word) {
  using enum Feature;
  switch (word) {
    case CpuidWord::leaf1_ecx:
      return bits({sse3, pclmulqdq, ssse3, fma, cx16, sse4_1, sse4_2, movbe, popcnt, aes, xsave, avx, f16c, rdrand});
    case CpuidWord::leaf1_edx: return bits({fpu, tsc, cx8, cmov, clflush, mmx, fxsr, sse, sse2});
    case CpuidWord::leaf7_ebx: return bits({bmi1, avx2, bmi2, erms, rdseed, adx, clflushopt, clwb, sha}) | x87_facts;
    case CpuidWord::leaf7_ecx: return bits({gfni, vaes, vpclmulqdq});
    case CpuidWord::leaf7_edx: return bits({fsrm});
    case CpuidWord::leaf7_1_eax: return bits({avx_vnni});
    case CpuidWord::leafd_1_eax: return bits({xsaveopt, xsavec, xgetbv1, xsaves});
    case CpuidWord::ext1_ecx:
      return bits({lahf_lm, alt_mov_cr8, abm, sse4a, misalignsse, prefetchw, osvw, topoext}) | 1u << 1 /* CmpLegacy */;
    case CpuidWord::ext1_edx: return 1u << 22 /* MMX extensions */;
    case CpuidWord::ext8_ebx: return bits({clzero});
    case CpuidWord::ext21_eax: return 1u << 2 /* LFENCE serialises */;
    default: return 0;
  }
}

/// What the machine provides whatever the host is: paging, modes, system registers, the local APIC. Not the APIC's
/// deadline timer: it is the client's to add, for KVM_CAP_TSC_DEADLINE_TIMER, where it has not an APIC of its own
/// (api.rst 4.46).
constexpr u32 provided(CpuidWord word) {
  using enum Feature;
  switch (word) {
    case CpuidWord::leaf1_ecx: return bits({pcid, x2apic, hypervisor});
    case CpuidWord::leaf1_edx: return bits({vme, de, pse, msr, pae, mce, apic, sep, mtrr, pge, mca, pat, pse36});
    case CpuidWord::leaf7_ebx: return bits({fsgsbase, tsc_adjust, smep, invpcid, smap});
    case CpuidWord::leaf7_ecx: return bits({umip, rdpid});
    case CpuidWord::leaf7_edx: return bits({arch_capabilities});
    case CpuidWord::ext1_edx: return bits({syscall, nx, gbpages, rdtscp, long_mode});
    // SRSO_NO: a guest's returns are the engine's, the host's return predictor learns nothing from them. Without the
    // bit Linux warns and turns its mitigation on.
    case CpuidWord::ext21_eax: return 1u << 9 /* no SMM_CTL MSR */ | 1u << 29 /* SRSO_NO */;
    default: return 0;
  }
}

class Table {
 public:
  Table() {
    avx_ = supported_xcr0() & xfeature::avx;
    avx512_ = supported_xcr0() & xfeature::zmm_hi256;
    basic();
    extended();
    kvm();
  }
  std::vector<kvm_cpuid_entry2> entries;
  u32 words[unsigned(CpuidWord::count)] = {};

 private:
  void add(u32 leaf, Regs r) { entries.push_back({leaf, 0, 0, r.eax, r.ebx, r.ecx, r.edx, {}}); }
  void add(u32 leaf, u32 subleaf, Regs r) {
    entries.push_back({leaf, subleaf, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, r.eax, r.ebx, r.ecx, r.edx, {}});
  }

  u32 word(CpuidWord w, u32 from_host) {
    u32 value = (from_host & (native(w) | (avx512_ ? avx512(w) : 0))) | provided(w);
    // What works on YMM registers goes with XCR0's AVX.
    using enum Feature;
    if (!avx_ && w == CpuidWord::leaf1_ecx) value &= ~bits({avx, fma, f16c});
    if (!avx_ && w == CpuidWord::leaf7_ebx) value &= ~bits({avx2});
    if (!avx_ && w == CpuidWord::leaf7_ecx) value &= ~bits({vaes, vpclmulqdq});
    if (!avx_ && w == CpuidWord::leaf7_1_eax) value &= ~bits({avx_vnni});
    return words[unsigned(w)] = value;
  }

  /// Cache leaves end at the first subleaf of type 0, which is listed too.
  void caches(u32 leaf) {
    for (u32 i = 0;; ++i) {
      const Regs r = host(leaf, i);
      add(leaf, i, r);
      if (!(r.eax & 0x1f)) return;
    }
  }

  void xsave() {
    const XsaveLayout& layout = xsave_layout();
    const u64 components = supported_xcr0() | supported_xss;
    const u32 all = layout.standard_size(supported_xcr0());
    add(0xd, 0, {u32(supported_xcr0()), all, all, u32(supported_xcr0() >> 32)});
    Regs features;
    features.eax = word(CpuidWord::leafd_1_eax, host(0xd, 1).eax);
    if (features.eax & bits({Feature::xsavec, Feature::xsaves})) features.ebx = layout.compacted_size(components);
    features.ecx = u32(supported_xss);
    features.edx = u32(supported_xss >> 32);
    add(0xd, 1, features);
    for (u32 i = 2; i < XsaveLayout::components; ++i)
      if (components >> i & 1) {
        const XsaveComponent& c = layout.component[i];
        add(0xd, i, {c.size, c.offset, c.aligned ? 2u : 0u, 0});
      }
  }

  void basic() {
    Regs first = host(0);
    if (first.eax < 0xd) first.eax = 0xd;
    if (first.eax > 0x1f) first.eax = 0x1f;
    for (u32 leaf = 0; leaf <= first.eax; ++leaf) {
      Regs r = host(leaf);
      switch (leaf) {
        case 0: add(leaf, first); break;
        case 1:
          r.ebx &= 0xff00;  // CLFLUSH's line; which CPU of the host this is, is nobody's business
          r.ecx = word(CpuidWord::leaf1_ecx, r.ecx);
          r.edx = word(CpuidWord::leaf1_edx, r.edx);
          add(leaf, r);
          break;
        case 2: add(leaf, r); break;
        case 4: caches(leaf); break;
        case 6: add(leaf, {.eax = 4}); break;  // the local APIC's timer never stops
        case 7: {
          const u32 last = r.eax ? 1 : 0;
          add(leaf, 0,
              {last, word(CpuidWord::leaf7_ebx, r.ebx), word(CpuidWord::leaf7_ecx, r.ecx),
               word(CpuidWord::leaf7_edx, r.edx)});
          if (last) add(leaf, 1, {.eax = word(CpuidWord::leaf7_1_eax, host(7, 1).eax)});
          break;
        }
        case 0xd: xsave(); break;
        case 0xb:
        case 0xf:
        case 0x10:
        case 0x12:
        case 0x14:
        case 0x17:
        case 0x18:
        case 0x1d:
        case 0x1e:
        case 0x1f:
          add(leaf, 0, {});  // topology is the client's to describe; the rest is not there
          break;
        default: add(leaf, {}); break;
      }
    }
  }

  void extended() {
    Regs first = host(0x80000000);
    const u32 host_last = first.eax;
    if (first.eax < 0x80000008) first.eax = 0x80000008;
    if (host_last >= 0x8000001d) first.eax = 0x80000021;
    if (first.eax > 0x80000021) first.eax = 0x80000021;
    for (u32 leaf = 0x80000000; leaf <= first.eax; ++leaf) {
      Regs r = host(leaf);
      switch (leaf) {
        case 0x80000000: add(leaf, first); break;
        case 0x80000001:
          r.ebx &= 0xf000ffff;
          // AMD repeats leaf 1's bits here; those that were masked there are masked here.
          if (r.edx & 1)
            r.edx = word(CpuidWord::ext1_edx, r.edx) | (words[unsigned(CpuidWord::leaf1_edx)] & 0x0183f3ff);
          else
            r.edx = word(CpuidWord::ext1_edx, r.edx);
          words[unsigned(CpuidWord::ext1_edx)] = r.edx;
          r.ecx = word(CpuidWord::ext1_ecx, r.ecx);
          add(leaf, r);
          break;
        case 0x80000002:
        case 0x80000003:
        case 0x80000004:
        case 0x80000005: add(leaf, r); break;
        case 0x80000006: r.edx &= ~0x30000u, add(leaf, r); break;
        case 0x80000007:
          r = {.edx = os::host_tsc_is_invariant() ? bits({Feature::invariant_tsc}) : 0};
          words[unsigned(CpuidWord::ext7_edx)] = r.edx;
          add(leaf, r);
          break;
        case 0x80000008: {
          const u32 physical = r.eax & 0xff ? r.eax & 0xff : 36;
          add(leaf, {physical | 48u << 8 | (physical < 48 ? physical : 48) << 16, word(CpuidWord::ext8_ebx, r.ebx),
                     r.ecx & 0xf0ff, 0});
          break;
        }
        case 0x80000019: add(leaf, {r.eax, r.ebx, 0, 0}); break;
        case 0x8000001a: add(leaf, {.eax = r.eax & 7}); break;
        case 0x8000001d: caches(leaf); break;
        case 0x80000021: add(leaf, {.eax = word(CpuidWord::ext21_eax, r.eax)}); break;
        default: add(leaf, {}); break;
      }
    }
  }

  void kvm() {
    add(KVM_CPUID_SIGNATURE, {KVM_CPUID_FEATURES, 0x4b4d564b, 0x564b4d56, 0x4d});  // "KVMKVMKVM\0\0\0"
    add(KVM_CPUID_FEATURES, {.eax = words[unsigned(CpuidWord::kvm_eax)] = paravirt::offered_features});
  }

  bool avx_, avx512_;
};

const Table& table() {
  static const Table instance;
  return instance;
}

}  // namespace

u64 supported_xcr0() {
  using namespace xfeature;
  static const u64 supported = [] {
    // Without byte masks and the shorter vectors (the Xeon Phi) it is another instruction set: not offered.
    constexpr u32 basis = bits({Feature::avx512f, Feature::avx512bw, Feature::avx512vl});
    const bool avx512 = (host(7).ebx & basis) == basis;
    return xsave_layout().supported & (x87 | sse | avx | (avx512 ? opmask | zmm_hi256 | hi16_zmm : 0));
  }();
  return supported;
}

std::span<const kvm_cpuid_entry2> supported_cpuid() { return table().entries; }

std::span<const kvm_cpuid_entry2> emulated_cpuid() {
  static const kvm_cpuid_entry2 none{};
  return {&none, 1};
}

bool supports(Feature feature) { return table().words[unsigned(feature) / 32] >> (unsigned(feature) % 32) & 1; }

}  // namespace anykvm::x86
