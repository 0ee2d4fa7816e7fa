// The architectural state of one x86 CPU: what KVM_GET_REGS, SREGS, FPU, XSAVE, MSRS, VCPU_EVENTS show, and no more.
// Plain data; the rules for changing it live beside it (control_registers, segmentation, msr, fpu ...).
#pragma once

#include "x86/types.h"

namespace anykvm::x86 {

enum Gpr : u8 { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };
enum SegmentName : u8 { es, cs, ss, ds, fs, gs };  ///< the encoding order of segment registers

/// RFLAGS bits.
namespace flag {
inline constexpr u64 cf = 1u << 0, fixed1 = 1u << 1, pf = 1u << 2, af = 1u << 4, zf = 1u << 6, sf = 1u << 7,
                     tf = 1u << 8, if_ = 1u << 9, df = 1u << 10, of = 1u << 11, iopl = 3u << 12, nt = 1u << 14,
                     rf = 1u << 16, vm = 1u << 17, ac = 1u << 18, vif = 1u << 19, vip = 1u << 20, id = 1u << 21;
inline constexpr u64 arithmetic = cf | pf | af | zf | sf | of;
}  // namespace flag

namespace cr0 {
inline constexpr u64 pe = 1u << 0, mp = 1u << 1, em = 1u << 2, ts = 1u << 3, et = 1u << 4, ne = 1u << 5, wp = 1u << 16,
                     am = 1u << 18, nw = 1u << 29, cd = 1u << 30, pg = 1u << 31;
}
namespace cr4 {
inline constexpr u64 vme = 1u << 0, pvi = 1u << 1, tsd = 1u << 2, de = 1u << 3, pse = 1u << 4, pae = 1u << 5,
                     mce = 1u << 6, pge = 1u << 7, pce = 1u << 8, osfxsr = 1u << 9, osxmmexcpt = 1u << 10,
                     umip = 1u << 11, la57 = 1u << 12, vmxe = 1u << 13, smxe = 1u << 14, fsgsbase = 1u << 16,
                     pcide = 1u << 17, osxsave = 1u << 18, smep = 1u << 20, smap = 1u << 21, pke = 1u << 22,
                     cet = 1u << 23;
}
namespace efer {
inline constexpr u64 sce = 1u << 0, lme = 1u << 8, lma = 1u << 10, nx = 1u << 11, svme = 1u << 12, ffxsr = 1u << 14;
}
namespace xfeature {
inline constexpr u64 x87 = 1u << 0, sse = 1u << 1, avx = 1u << 2, opmask = 1u << 5, zmm_hi256 = 1u << 6,
                     hi16_zmm = 1u << 7, pkru = 1u << 9;
}

/// A segment register with its hidden part; the fields of struct kvm_segment.
struct Segment {
  u64 base = 0;
  u32 limit = 0;  ///< in bytes, granularity already applied
  u16 selector = 0;
  u8 type = 0;  ///< the descriptor's 4-bit type
  u8 dpl = 0;
  bool present = false;
  bool s = false;   ///< code or data (not a system segment)
  bool l = false;   ///< 64-bit code
  bool db = false;  ///< 32-bit code / big stack
  bool g = false;
  bool avl = false;
  bool unusable = false;
};

struct DescriptorTable {
  u64 base = 0;
  u16 limit = 0;
};

/// RFLAGS' six arithmetic bits the way lahf + seto deliver them, so that code which runs on the host's flags can load
/// them with `add al, 0x7f; sahf` and store them with `lahf; seto al`: low byte OF (0 or 1), high byte SF ZF - AF - PF
/// - CF.
using ArithmeticFlags = u16;

/// x87, SSE, AVX and AVX-512 registers. Registers, not an XSAVE image: x86/xsave converts.
struct FpuState {
  alignas(64) u8 vector[32][64] = {};  ///< zmm0-31; xmm and ymm are their low parts
  u64 opmask[8] = {};
  /// FXSAVE64 image; only the x87 part (bytes 0-23 and the ST registers at 32-159) is meant. MXCSR is `mxcsr`.
  alignas(16) u8 x87[512] = {};
  u16 x87_code_selector = 0, x87_data_selector = 0;  ///< FCS and FDS
  u32 mxcsr = 0x1f80;
  u32 pkru = 0;
};

/// MSRs whose value is plain CPU state.
struct MsrState {
  u64 efer = 0, star = 0, lstar = 0, cstar = 0, sfmask = 0, kernel_gs_base = 0;
  u64 sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
  u64 pat = 0x0007040600070406, tsc_aux = 0, tsc_adjust = 0, misc_enable = 0x1801, debugctl = 0, spec_ctrl = 0, xss = 0;
  u64 mtrr_def_type = 0, mtrr_fixed[11] = {}, mtrr_physbase[8] = {}, mtrr_physmask[8] = {};
  u64 mcg_status = 0, mcg_ctl = 0, mc_bank[4 * 32] = {};  ///< 32 banks of CTL, STATUS, ADDR, MISC
  u64 smbase = 0x30000, smi_count = 0, feature_control = 0, arch_capabilities = 0, power_ctl = 0, ucode_rev = 0,
      platform_info = 0, misc_features_enables = 0;
  u64 mcg_cap = 32, mci_ctl2[32] = {};                                             ///< mcg_cap: KVM_X86_SETUP_MCE
  u64 hwcr = 0, de_cfg = 0, virt_spec_ctrl = 0, osvw_length = 0, osvw_status = 0;  ///< AMD's
};

inline constexpr u64 misc_enable_mwait = 1 << 18;

/// What is waiting to be delivered or holds delivery back; struct kvm_vcpu_events.
struct EventState {
  bool exception_pending = false;   ///< raised (also by KVM_SET_VCPU_EVENTS), delivery not yet begun
  bool exception_injected = false;  ///< delivery was begun and must be done again
  u8 exception_vector = 0;
  bool exception_has_error = false;
  u32 exception_error = 0;
  bool exception_has_payload = false;
  u64 exception_payload = 0;  ///< CR2 of a #PF, DR6 bits of a #DB
  bool interrupt_injected = false;
  bool interrupt_soft = false;
  u8 interrupt_vector = 0;
  u8 shadow = 0;  ///< KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI
  bool nmi_injected = false;
  u8 nmi_pending = 0;  ///< 0-2
  bool nmi_masked = false;
  u32 sipi_vector = 0;
  bool triple_fault_pending = false;
};

struct CpuState {
  u64 gpr[16] = {};
  u64 rip = 0xfff0;
  ArithmeticFlags arithmetic = 0;
  u64 other_flags = flag::fixed1;  ///< RFLAGS without the arithmetic bits
  u8 cpl = 0;                      ///< == segment[ss].dpl
  u8 code_bits = 16;               ///< 16, 32 or 64: default size of the code that runs; see update_mode()
  Segment segment[6];
  Segment ldtr, tr;
  DescriptorTable gdtr, idtr;
  u64 cr0 = 0x60000010, cr2 = 0, cr3 = 0, cr4 = 0;
  u64 pdpte[4] = {};  ///< PAE paging's four registers
  u64 xcr0 = xfeature::x87;
  u64 dr[4] = {}, dr6 = 0xffff0ff0, dr7 = 0x400;
  u64 tsc_offset = 0;  ///< guest TSC = host TSC * tsc_ratio + offset
  u64 tsc_ratio = 0;   ///< 16.48 fixed point; 0: unscaled
  MsrState msr;
  EventState event;
  FpuState fpu;

  bool long_mode() const { return msr.efer & efer::lma; }
  bool protected_mode() const { return cr0 & cr0::pe; }
  bool real_mode() const { return !(cr0 & cr0::pe); }
  bool v86() const { return other_flags & flag::vm; }
  bool paging() const { return cr0 & cr0::pg; }

  u64 rflags() const {
    u64 ah = arithmetic >> 8;
    return other_flags | (ah & (flag::cf | flag::pf | flag::af | flag::zf | flag::sf)) |
           (arithmetic & 1 ? flag::of : 0);
  }
  /// The low 16 flags as a virtual-8086 program without IOPL sees them under CR4.VME: IF is VIF, IOPL is 3.
  u16 virtual_flags() const {
    return u16((rflags() & ~flag::if_) | flag::iopl | (other_flags & flag::vif ? flag::if_ : 0));
  }
  /// Sets every bit as given. Callers mask by privilege first.
  void set_rflags(u64 value) {
    arithmetic = ArithmeticFlags((value & (flag::cf | flag::pf | flag::af | flag::zf | flag::sf)) << 8 |
                                 (value & flag::of ? 1 : 0));
    other_flags = (value & ~flag::arithmetic) | flag::fixed1;
  }
};

}  // namespace anykvm::x86
