// MSRs that tell which CPU this is and switch its peculiarities: microcode, side channel controls, platform
// information, and those of AMD and Intel that systems touch at boot. Most read 0 and take no effect; they exist
// because a real CPU has them, and they are those that KVM answers for. Reference: Intel SDM volume 4; AMD64 manual
// volume 2 appendix A; AMD's family guides.
#include "x86/msr_parts.h"

namespace anykvm::x86 {
namespace {

enum : u32 {
  platform_id = 0x17,
  ebl_cr_poweron = 0x2a,
  ebc_frequency_id = 0x2c,
  smi_count = 0x34,
  feature_control = 0x3a,
  spec_ctrl = 0x48,
  pred_cmd = 0x49,
  ucode_write = 0x79,
  ucode_rev = 0x8b,  // AMD: patch level
  smbase = 0x9e,
  p6_perfctr0 = 0xc1,
  p6_perfctr1 = 0xc2,
  fsb_frequency = 0xcd,
  platform_info = 0xce,
  arch_capabilities = 0x10a,
  flush_cmd = 0x10b,
  bbl_cr_ctl3 = 0x119,
  misc_features_enables = 0x140,
  p6_evntsel0 = 0x186,
  p6_evntsel1 = 0x187,
  perf_status = 0x198,
  perf_ctl = 0x199,
  misc_enable = 0x1a0,
  debugctl = 0x1d9,
  last_branch_first = 0x1db,
  last_branch_last = 0x1de,
  power_ctl = 0x1fc,
  perf_capabilities = 0x345,
  rapl_power_unit = 0x606,
  pkg_energy_status = 0x611,
  dram_energy_status = 0x619,
  pp0_energy_status = 0x639,
  pp1_energy_status = 0x641,
  k7_evntsel0 = 0xc0010000,
  k7_perfctr3 = 0xc0010007,
  amd_syscfg = 0xc0010010,
  k7_hwcr = 0xc0010015,
  top_mem = 0xc001001a,
  k7_clk_ctl = 0xc001001b,
  top_mem2 = 0xc001001d,
  nb_cfg = 0xc001001f,
  patch_loader = 0xc0010020,
  int_pending_msg = 0xc0010055,
  mmio_conf_base = 0xc0010058,
  tseg_addr = 0xc0010112,
  tseg_mask = 0xc0010113,
  vm_cr = 0xc0010114,
  vm_hsave_pa = 0xc0010117,
  virt_spec_ctrl = 0xc001011f,
  osvw_id_length = 0xc0010140,
  osvw_status = 0xc0010141,
  ic_cfg = 0xc0011021,
  dc_cfg = 0xc0011022,
  tw_cfg = 0xc0011023,
  de_cfg = 0xc0011029,
  bu_cfg2 = 0xc001102a,
  ex_cfg = 0xc001102c,
};

constexpr u64 misc_enable_emon = 1 << 7, misc_enable_no_bts_pebs = 3 << 11;
constexpr u64 platform_info_cpuid_fault = 1ull << 31, cpuid_fault = 1;
constexpr u64 de_cfg_lfence_serialize = 1 << 1;
constexpr u64 hwcr_ignored = 1 << 3 | 1 << 6 | 1 << 8, hwcr_kept = 1 << 18 | 1 << 24;
constexpr u64 debugctl_lbr_btf = 3;

/// SPEC_CTRL's bits that the guest's CPUID offers. Setting them changes nothing: a userspace engine cannot reach the
/// host's controls, which is why the supported CPUID does not name them.
u64 spec_ctrl_bits(const Cpuid& cpuid) {
  using enum Feature;
  u64 bits = 0;
  if (cpuid.has(spec_ctrl) || cpuid.has(amd_ibrs)) bits |= 1 << 0;
  if (cpuid.has(intel_stibp) || cpuid.has(amd_stibp)) bits |= 1 << 1;
  if (cpuid.has(intel_ssbd) || cpuid.has(amd_ssbd)) bits |= 1 << 2;
  if (cpuid.has(amd_psfd)) bits |= 1 << 7;
  return bits;
}

bool has_pred_cmd(const Cpuid& cpuid) { return cpuid.has(Feature::spec_ctrl) || cpuid.has(Feature::amd_ibpb); }

}  // namespace

MsrAccess get_model_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator) {
  const MsrState& msr = cpu.state.msr;
  const Cpuid& cpuid = cpu.cpuid;
  const bool host = initiator == Initiator::host;
  value = 0;
  switch (index) {
    case platform_id:
    case ebl_cr_poweron:
    case p6_perfctr0:
    case p6_perfctr1:
    case p6_evntsel0:
    case p6_evntsel1:
    case perf_ctl:
    case last_branch_first ... last_branch_last:
    case rapl_power_unit:
    case pkg_energy_status:
    case dram_energy_status:
    case pp0_energy_status:
    case pp1_energy_status:
    case k7_evntsel0 ... k7_perfctr3:
    case amd_syscfg:
    case top_mem:
    case top_mem2:
    case nb_cfg:
    case int_pending_msg:
    case mmio_conf_base:
    case tseg_addr:
    case tseg_mask:
    case vm_cr:
    case vm_hsave_pa:
    case ic_cfg:
    case dc_cfg:
    case tw_cfg:
    case bu_cfg2:
    case ex_cfg: return MsrAccess::done;

    case ebc_frequency_id: value = 1 << 24; return MsrAccess::done;  // never 0: guests divide by it
    case fsb_frequency: value = 3; return MsrAccess::done;
    case perf_status: value = 1000 | 4ull << 40; return MsrAccess::done;
    case bbl_cr_ctl3: value = 0xbe702111; return MsrAccess::done;  // an L2 cache, enabled
    case k7_clk_ctl: value = 0x20000000; return MsrAccess::done;

    case smi_count: value = msr.smi_count; return MsrAccess::done;
    case feature_control: value = msr.feature_control; return allow_if(host || cpuid.vendor() == Vendor::intel);
    case spec_ctrl: value = msr.spec_ctrl; return allow_if(host || spec_ctrl_bits(cpuid));
    case ucode_rev: value = msr.ucode_rev; return MsrAccess::done;
    case smbase: value = msr.smbase; return allow_if(host);
    case platform_info: value = msr.platform_info; return MsrAccess::done;
    case arch_capabilities:
      value = msr.arch_capabilities;
      return allow_if(host || cpuid.has(Feature::arch_capabilities));
    case misc_features_enables: value = msr.misc_features_enables; return MsrAccess::done;
    case misc_enable: value = msr.misc_enable; return MsrAccess::done;
    case debugctl: value = msr.debugctl; return MsrAccess::done;
    case power_ctl: value = msr.power_ctl; return MsrAccess::done;
    case perf_capabilities: return allow_if(host);
    case k7_hwcr: value = msr.hwcr; return MsrAccess::done;
    case virt_spec_ctrl: value = msr.virt_spec_ctrl; return allow_if(host || cpuid.has(Feature::virt_ssbd));
    case osvw_id_length: value = msr.osvw_length; return allow_if(cpuid.has(Feature::osvw));
    case osvw_status: value = msr.osvw_status; return allow_if(cpuid.has(Feature::osvw));
    case de_cfg: value = msr.de_cfg; return MsrAccess::done;
  }
  return MsrAccess::unknown;
}

MsrAccess set_model_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator) {
  MsrState& msr = cpu.state.msr;
  const Cpuid& cpuid = cpu.cpuid;
  const bool host = initiator == Initiator::host;
  auto store = [&](u64& where, bool valid) {
    if (valid) where = value;
    return allow_if(valid);
  };
  switch (index) {
    case ucode_write:
    case bbl_cr_ctl3:
    case p6_perfctr0:
    case p6_perfctr1:
    case p6_evntsel0:
    case p6_evntsel1:
    case k7_evntsel0 ... k7_perfctr3:
    case k7_clk_ctl:
    case nb_cfg:
    case patch_loader:
    case vm_hsave_pa:
    case dc_cfg:
    case tw_cfg:
    case bu_cfg2:
    case ex_cfg: return MsrAccess::done;

    case mmio_conf_base:
    case perf_capabilities: return allow_if(value == 0 && (host || index == mmio_conf_base));
    case smi_count: return store(msr.smi_count, host);
    case feature_control:
      // Locked for good by the first guest that writes bit 0; nothing that it could enable is there.
      return store(msr.feature_control,
                   host || (cpuid.vendor() == Vendor::intel && !(msr.feature_control & 1) && !(value & ~1ull)));
    case spec_ctrl: return store(msr.spec_ctrl, host || (spec_ctrl_bits(cpuid) && !(value & ~spec_ctrl_bits(cpuid))));
    case pred_cmd: return allow_if((host || has_pred_cmd(cpuid)) && !(value & ~1ull));
    case flush_cmd: return allow_if((host || cpuid.has(Feature::flush_l1d)) && !(value & ~1ull));
    case ucode_rev:
      if (host) msr.ucode_rev = value;  // a guest writes 0 before it reads the revision
      return MsrAccess::done;
    case smbase: return store(msr.smbase, host);
    case platform_info:
      return store(msr.platform_info,
                   host && (value & platform_info_cpuid_fault || !(msr.misc_features_enables & cpuid_fault)));
    case arch_capabilities: return store(msr.arch_capabilities, host);
    case misc_features_enables:
      return store(msr.misc_features_enables,
                   !(value & ~cpuid_fault) && (!value || msr.platform_info & platform_info_cpuid_fault));
    case misc_enable:
      if (!host) {
        if ((value ^ msr.misc_enable) & misc_enable_no_bts_pebs) return MsrAccess::refused;
        value = (value & ~misc_enable_emon) | (msr.misc_enable & misc_enable_emon);
      }
      if (cpu.disabled_quirks.load(std::memory_order_relaxed) & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT &&
          (value ^ msr.misc_enable) & misc_enable_mwait && !cpuid.has(Feature::sse3))
        return MsrAccess::refused;
      return store(msr.misc_enable, true);
    case debugctl:
      if (value & ~debugctl_lbr_btf) return MsrAccess::refused;
      msr.debugctl = value & 2;  // there are no branch records
      return MsrAccess::done;
    case power_ctl: return store(msr.power_ctl, true);
    case k7_hwcr: value &= ~hwcr_ignored; return store(msr.hwcr, !(value & ~hwcr_kept));
    case virt_spec_ctrl: return store(msr.virt_spec_ctrl, (host || cpuid.has(Feature::virt_ssbd)) && !(value & ~4ull));
    case osvw_id_length: return store(msr.osvw_length, cpuid.has(Feature::osvw));
    case osvw_status: return store(msr.osvw_status, cpuid.has(Feature::osvw));
    case de_cfg: return store(msr.de_cfg, !(value & ~de_cfg_lfence_serialize));
  }
  return MsrAccess::unknown;
}

}  // namespace anykvm::x86
