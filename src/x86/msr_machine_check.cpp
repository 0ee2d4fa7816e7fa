// The machine check registers: as many banks as KVM_X86_SETUP_MCE gave, in which nothing is ever found unless the
// client puts it there. Reference: Intel SDM volume 3, 16.3 "Machine-Check MSRs"; AMD64 manual volume 2, 9.3.
#include <cerrno>

#include "x86/msr_parts.h"

namespace anykvm::x86 {
namespace {

enum : u32 { p5_addr = 0, p5_type = 1, mcg_cap = 0x179, mcg_status = 0x17a, mcg_ctl = 0x17b };
constexpr u32 bank_first = 0x400, bank_last = bank_first + 4 * mc_banks - 1;
constexpr u32 ctl2_first = 0x280, ctl2_last = ctl2_first + mc_banks - 1;
constexpr u64 cap_ctl = 1 << 8;
constexpr u64 ctl2_bits = 1ull << 30 | 0x7fff;     // CMCI enable and threshold
constexpr u64 hwcr_status_write_enable = 1 << 18;  // AMD

unsigned banks(const Cpu& cpu) { return cpu.state.msr.mcg_cap & 0xff; }

}  // namespace

MsrAccess get_machine_check_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator) {
  const MsrState& msr = cpu.state.msr;
  const bool host = initiator == Initiator::host;
  switch (index) {
    case p5_addr:
    case p5_type: value = 0; return MsrAccess::done;
    case mcg_cap: value = msr.mcg_cap; return MsrAccess::done;
    case mcg_status: value = msr.mcg_status; return MsrAccess::done;
    case mcg_ctl: value = msr.mcg_ctl; return allow_if(host || msr.mcg_cap & cap_ctl);
  }
  if (index >= bank_first && index <= bank_last) {
    value = msr.mc_bank[index - bank_first];
    return allow_if(index - bank_first < 4 * banks(cpu));
  }
  if (index >= ctl2_first && index <= ctl2_last) {
    value = msr.mci_ctl2[index - ctl2_first];
    return allow_if(index - ctl2_first < banks(cpu) && (host || msr.mcg_cap & mce_cap_cmci));
  }
  return MsrAccess::unknown;
}

MsrAccess set_machine_check_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator) {
  MsrState& msr = cpu.state.msr;
  const bool host = initiator == Initiator::host;
  auto store = [&](u64& where, bool valid) {
    if (valid) where = value;
    return allow_if(valid);
  };
  if (index == mcg_status) return store(msr.mcg_status, true);
  if (index == mcg_ctl)
    return store(msr.mcg_ctl, (msr.mcg_cap & cap_ctl || (host && !value)) && (value == 0 || value == ~0ull));
  if (index == mcg_cap) return MsrAccess::refused;
  if (index >= bank_first && index <= bank_last) {
    const unsigned offset = index - bank_first;
    bool valid = offset < 4 * banks(cpu);
    // CTL: all or nothing, except bits 0 and 10, which old systems clear against errata. STATUS: a guest may clear it,
    // and set it where AMD's HWCR allows that.
    if (offset % 4 == 0) valid &= value == 0 || (value | 1 << 10 | 1) == ~0ull;
    if (offset % 4 == 1 && !host)
      valid &= value == 0 || (cpu.cpuid.vendor() == Vendor::amd && msr.hwcr & hwcr_status_write_enable);
    return store(msr.mc_bank[offset], valid);
  }
  if (index >= ctl2_first && index <= ctl2_last) {
    const unsigned bank = index - ctl2_first;
    return store(msr.mci_ctl2[bank],
                 bank < banks(cpu) && (msr.mcg_cap & mce_cap_cmci || (host && !value)) && !(value & ~ctl2_bits));
  }
  return MsrAccess::unknown;
}

int setup_mce(Cpu& cpu, u64 cap) {
  const unsigned count = cap & 0xff;
  if (count == 0 || count > mc_banks || cap & ~(mce_cap_supported | 0xff | 0xff0000)) return -EINVAL;
  MsrState& msr = cpu.state.msr;
  msr.mcg_cap = cap;
  if (cap & cap_ctl) msr.mcg_ctl = ~0ull;
  for (unsigned bank = 0; bank < count; ++bank) {
    msr.mc_bank[bank * 4] = ~0ull;
    if (cap & mce_cap_cmci) msr.mci_ctl2[bank] = 0;
  }
  return 0;
}

}  // namespace anykvm::x86
