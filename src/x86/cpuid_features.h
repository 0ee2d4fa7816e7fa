// The CPUID feature bits that the machine itself looks at, by name. A name's value is its place in Cpuid's cached
// words: word * 32 + bit. Reference: Intel SDM volume 2 (CPUID), AMD64 manual volume 3 appendix E.
#pragma once

#include "x86/types.h"

namespace anykvm::x86 {

/// The feature registers that are cached at KVM_SET_CPUID2.
enum class CpuidWord : u8 {
  leaf1_ecx,
  leaf1_edx,
  leaf7_ebx,
  leaf7_ecx,
  leaf7_edx,
  leaf7_1_eax,
  leafd_1_eax,
  ext1_ecx,  ///< 0x80000001
  ext1_edx,
  ext7_edx,   ///< 0x80000007
  ext8_ebx,   ///< 0x80000008
  ext21_eax,  ///< 0x80000021
  kvm_eax,    ///< KVM's feature leaf
  count,
};

namespace detail {
constexpr u16 bit(CpuidWord word, unsigned n) { return u16(unsigned(word) * 32 + n); }
}  // namespace detail

enum class Feature : u16 {
  // leaf 1 ECX
  sse3 = detail::bit(CpuidWord::leaf1_ecx, 0),
  pclmulqdq = detail::bit(CpuidWord::leaf1_ecx, 1),
  mwait = detail::bit(CpuidWord::leaf1_ecx, 3),
  ssse3 = detail::bit(CpuidWord::leaf1_ecx, 9),
  fma = detail::bit(CpuidWord::leaf1_ecx, 12),
  cx16 = detail::bit(CpuidWord::leaf1_ecx, 13),
  pcid = detail::bit(CpuidWord::leaf1_ecx, 17),
  sse4_1 = detail::bit(CpuidWord::leaf1_ecx, 19),
  sse4_2 = detail::bit(CpuidWord::leaf1_ecx, 20),
  x2apic = detail::bit(CpuidWord::leaf1_ecx, 21),
  movbe = detail::bit(CpuidWord::leaf1_ecx, 22),
  popcnt = detail::bit(CpuidWord::leaf1_ecx, 23),
  tsc_deadline = detail::bit(CpuidWord::leaf1_ecx, 24),
  aes = detail::bit(CpuidWord::leaf1_ecx, 25),
  xsave = detail::bit(CpuidWord::leaf1_ecx, 26),
  osxsave = detail::bit(CpuidWord::leaf1_ecx, 27),
  avx = detail::bit(CpuidWord::leaf1_ecx, 28),
  f16c = detail::bit(CpuidWord::leaf1_ecx, 29),
  rdrand = detail::bit(CpuidWord::leaf1_ecx, 30),
  hypervisor = detail::bit(CpuidWord::leaf1_ecx, 31),
  // leaf 1 EDX
  fpu = detail::bit(CpuidWord::leaf1_edx, 0),
  vme = detail::bit(CpuidWord::leaf1_edx, 1),
  de = detail::bit(CpuidWord::leaf1_edx, 2),
  pse = detail::bit(CpuidWord::leaf1_edx, 3),
  tsc = detail::bit(CpuidWord::leaf1_edx, 4),
  msr = detail::bit(CpuidWord::leaf1_edx, 5),
  pae = detail::bit(CpuidWord::leaf1_edx, 6),
  mce = detail::bit(CpuidWord::leaf1_edx, 7),
  cx8 = detail::bit(CpuidWord::leaf1_edx, 8),
  apic = detail::bit(CpuidWord::leaf1_edx, 9),
  sep = detail::bit(CpuidWord::leaf1_edx, 11),
  mtrr = detail::bit(CpuidWord::leaf1_edx, 12),
  pge = detail::bit(CpuidWord::leaf1_edx, 13),
  mca = detail::bit(CpuidWord::leaf1_edx, 14),
  cmov = detail::bit(CpuidWord::leaf1_edx, 15),
  pat = detail::bit(CpuidWord::leaf1_edx, 16),
  pse36 = detail::bit(CpuidWord::leaf1_edx, 17),
  clflush = detail::bit(CpuidWord::leaf1_edx, 19),
  mmx = detail::bit(CpuidWord::leaf1_edx, 23),
  fxsr = detail::bit(CpuidWord::leaf1_edx, 24),
  sse = detail::bit(CpuidWord::leaf1_edx, 25),
  sse2 = detail::bit(CpuidWord::leaf1_edx, 26),
  // leaf 7 EBX
  fsgsbase = detail::bit(CpuidWord::leaf7_ebx, 0),
  tsc_adjust = detail::bit(CpuidWord::leaf7_ebx, 1),
  bmi1 = detail::bit(CpuidWord::leaf7_ebx, 3),
  hle = detail::bit(CpuidWord::leaf7_ebx, 4),
  avx2 = detail::bit(CpuidWord::leaf7_ebx, 5),
  smep = detail::bit(CpuidWord::leaf7_ebx, 7),
  bmi2 = detail::bit(CpuidWord::leaf7_ebx, 8),
  erms = detail::bit(CpuidWord::leaf7_ebx, 9),
  invpcid = detail::bit(CpuidWord::leaf7_ebx, 10),
  rtm = detail::bit(CpuidWord::leaf7_ebx, 11),
  avx512f = detail::bit(CpuidWord::leaf7_ebx, 16),
  avx512dq = detail::bit(CpuidWord::leaf7_ebx, 17),
  rdseed = detail::bit(CpuidWord::leaf7_ebx, 18),
  adx = detail::bit(CpuidWord::leaf7_ebx, 19),
  smap = detail::bit(CpuidWord::leaf7_ebx, 20),
  avx512ifma = detail::bit(CpuidWord::leaf7_ebx, 21),
  clflushopt = detail::bit(CpuidWord::leaf7_ebx, 23),
  clwb = detail::bit(CpuidWord::leaf7_ebx, 24),
  avx512cd = detail::bit(CpuidWord::leaf7_ebx, 28),
  sha = detail::bit(CpuidWord::leaf7_ebx, 29),
  avx512bw = detail::bit(CpuidWord::leaf7_ebx, 30),
  avx512vl = detail::bit(CpuidWord::leaf7_ebx, 31),
  // leaf 7 ECX
  avx512vbmi = detail::bit(CpuidWord::leaf7_ecx, 1),
  umip = detail::bit(CpuidWord::leaf7_ecx, 2),
  pku = detail::bit(CpuidWord::leaf7_ecx, 3),
  ospke = detail::bit(CpuidWord::leaf7_ecx, 4),
  avx512_vbmi2 = detail::bit(CpuidWord::leaf7_ecx, 6),
  gfni = detail::bit(CpuidWord::leaf7_ecx, 8),
  vaes = detail::bit(CpuidWord::leaf7_ecx, 9),
  vpclmulqdq = detail::bit(CpuidWord::leaf7_ecx, 10),
  avx512_vnni = detail::bit(CpuidWord::leaf7_ecx, 11),
  avx512_bitalg = detail::bit(CpuidWord::leaf7_ecx, 12),
  avx512_vpopcntdq = detail::bit(CpuidWord::leaf7_ecx, 14),
  la57 = detail::bit(CpuidWord::leaf7_ecx, 16),
  rdpid = detail::bit(CpuidWord::leaf7_ecx, 22),
  // leaf 7 EDX
  fsrm = detail::bit(CpuidWord::leaf7_edx, 4),
  avx512_vp2intersect = detail::bit(CpuidWord::leaf7_edx, 8),
  avx512_fp16 = detail::bit(CpuidWord::leaf7_edx, 23),
  spec_ctrl = detail::bit(CpuidWord::leaf7_edx, 26),  ///< IBRS and IBPB
  intel_stibp = detail::bit(CpuidWord::leaf7_edx, 27),
  flush_l1d = detail::bit(CpuidWord::leaf7_edx, 28),
  arch_capabilities = detail::bit(CpuidWord::leaf7_edx, 29),
  intel_ssbd = detail::bit(CpuidWord::leaf7_edx, 31),
  // leaf 7.1 EAX
  avx_vnni = detail::bit(CpuidWord::leaf7_1_eax, 4),
  avx512_bf16 = detail::bit(CpuidWord::leaf7_1_eax, 5),
  // leaf 0xD.1 EAX
  xsaveopt = detail::bit(CpuidWord::leafd_1_eax, 0),
  xsavec = detail::bit(CpuidWord::leafd_1_eax, 1),
  xgetbv1 = detail::bit(CpuidWord::leafd_1_eax, 2),
  xsaves = detail::bit(CpuidWord::leafd_1_eax, 3),
  // 0x80000001 ECX
  lahf_lm = detail::bit(CpuidWord::ext1_ecx, 0),
  alt_mov_cr8 = detail::bit(CpuidWord::ext1_ecx, 4),
  abm = detail::bit(CpuidWord::ext1_ecx, 5),
  sse4a = detail::bit(CpuidWord::ext1_ecx, 6),
  misalignsse = detail::bit(CpuidWord::ext1_ecx, 7),
  prefetchw = detail::bit(CpuidWord::ext1_ecx, 8),
  osvw = detail::bit(CpuidWord::ext1_ecx, 9),
  topoext = detail::bit(CpuidWord::ext1_ecx, 22),
  // 0x80000001 EDX
  syscall = detail::bit(CpuidWord::ext1_edx, 11),
  nx = detail::bit(CpuidWord::ext1_edx, 20),
  fxsr_opt = detail::bit(CpuidWord::ext1_edx, 25),
  gbpages = detail::bit(CpuidWord::ext1_edx, 26),
  rdtscp = detail::bit(CpuidWord::ext1_edx, 27),
  long_mode = detail::bit(CpuidWord::ext1_edx, 29),
  // 0x80000007 EDX
  invariant_tsc = detail::bit(CpuidWord::ext7_edx, 8),
  // 0x80000008 EBX
  clzero = detail::bit(CpuidWord::ext8_ebx, 0),
  xsaveerptr = detail::bit(CpuidWord::ext8_ebx, 2),
  wbnoinvd = detail::bit(CpuidWord::ext8_ebx, 9),
  amd_ibpb = detail::bit(CpuidWord::ext8_ebx, 12),
  amd_ibrs = detail::bit(CpuidWord::ext8_ebx, 14),
  amd_stibp = detail::bit(CpuidWord::ext8_ebx, 15),
  amd_ssbd = detail::bit(CpuidWord::ext8_ebx, 24),
  virt_ssbd = detail::bit(CpuidWord::ext8_ebx, 25),
  amd_psfd = detail::bit(CpuidWord::ext8_ebx, 28),
  // 0x80000021 EAX
  autoibrs = detail::bit(CpuidWord::ext21_eax, 8),
};

}  // namespace anykvm::x86
