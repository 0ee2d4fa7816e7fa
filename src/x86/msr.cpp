// RDMSR and WRMSR, KVM_GET_MSRS and KVM_SET_MSRS: system calls, segment bases, time, EFER; other subjects have their
// own files.
// Reference: Intel SDM volume 4; AMD64 manual volume 2 appendix A.
#include "x86/msr.h"

#include "x86/msr_parts.h"

namespace anykvm::x86 {
namespace {

enum : u32 {
  time_stamp_counter = 0x10,
  tsc_adjust = 0x3b,
  sysenter_cs = 0x174,
  sysenter_esp = 0x175,
  sysenter_eip = 0x176,
  tsc_deadline = 0x6e0,
  xss = 0xda0,
  msr_efer = 0xc0000080,
  star = 0xc0000081,
  lstar = 0xc0000082,
  cstar = 0xc0000083,
  sfmask = 0xc0000084,
  fs_base = 0xc0000100,
  gs_base = 0xc0000101,
  kernel_gs_base = 0xc0000102,
  tsc_aux = 0xc0000103,
};

u64 sign_extended(u64 address) { return u64(s64(address << 16) >> 16); }

MsrAccess set_efer(Cpu& cpu, u64 value, bool host) {
  CpuState& s = cpu.state;
  const Cpuid& cpuid = cpu.cpuid;
  if (value & ~(efer::sce | efer::lme | efer::lma | efer::nx)) return MsrAccess::refused;
  if (!host) {
    if (value & efer::nx && !cpuid.has(Feature::nx)) return MsrAccess::refused;
    if (value & (efer::lme | efer::lma) && !cpuid.has(Feature::long_mode)) return MsrAccess::refused;
    if (s.paging() && (value ^ s.msr.efer) & efer::lme) return MsrAccess::refused;
  }
  // LMA follows from LME and paging; what is written to it is ignored.
  value = (value & ~efer::lma) | (s.msr.efer & efer::lma);
  const u64 changed = s.msr.efer ^ value;
  s.msr.efer = value;
  if (changed & efer::nx) cpu.mmu.flush_all();
  if (changed) cpu.update_mode();
  return MsrAccess::done;
}

MsrAccess get_core_msr(const Cpu& cpu, u32 index, u64& value, bool host) {
  const CpuState& s = cpu.state;
  switch (index) {
    case time_stamp_counter: value = cpu.tsc(); break;
    case tsc_adjust: value = s.msr.tsc_adjust; break;
    case sysenter_cs: value = s.msr.sysenter_cs; break;
    case sysenter_esp: value = s.msr.sysenter_esp; break;
    case sysenter_eip: value = s.msr.sysenter_eip; break;
    case tsc_deadline: value = 0; break;  // without a local APIC, which answers first
    case xss: value = s.msr.xss; return allow_if(host || cpu.cpuid.has(Feature::xsaves));
    case msr_efer: value = s.msr.efer; break;
    case star: value = s.msr.star; break;
    case lstar: value = s.msr.lstar; break;
    case cstar: value = s.msr.cstar; break;
    case sfmask: value = s.msr.sfmask; break;
    case fs_base: value = s.segment[fs].base; break;
    case gs_base: value = s.segment[gs].base; break;
    case kernel_gs_base: value = s.msr.kernel_gs_base; break;
    case tsc_aux:
      value = s.msr.tsc_aux;
      return allow_if(host || cpu.cpuid.has(Feature::rdtscp) || cpu.cpuid.has(Feature::rdpid));
    default: return MsrAccess::unknown;
  }
  return MsrAccess::done;
}

MsrAccess set_core_msr(Cpu& cpu, u32 index, u64 value, bool host) {
  CpuState& s = cpu.state;
  auto store = [&](u64& where, bool valid) {
    if (valid) where = value;
    return allow_if(valid);
  };
  switch (index) {
    case time_stamp_counter: {
      const u64 change = value - cpu.tsc();
      s.tsc_offset += change;
      if (!host) s.msr.tsc_adjust += change;
      return MsrAccess::done;
    }
    case tsc_adjust:
      // A client restores the value only: the offset comes back with the TSC itself.
      if (!cpu.cpuid.has(Feature::tsc_adjust)) return MsrAccess::done;
      if (!host) s.tsc_offset += value - s.msr.tsc_adjust;
      return store(s.msr.tsc_adjust, true);
    case sysenter_cs: return store(s.msr.sysenter_cs, true);
    case sysenter_esp:
    case sysenter_eip:
      // AMD's have 32 bits. Nobody faults on the others, so that no value can make a later SYSENTER fail.
      value = cpu.cpuid.vendor() == Vendor::amd ? u32(value) : cpu.canonical_base(value) ? value : sign_extended(value);
      return store(index == sysenter_esp ? s.msr.sysenter_esp : s.msr.sysenter_eip, true);
    case tsc_deadline: return MsrAccess::done;
    case xss: return store(s.msr.xss, (host || cpu.cpuid.has(Feature::xsaves)) && !(value & ~supported_xss));
    case msr_efer: return set_efer(cpu, value, host);
    case star: return store(s.msr.star, true);
    case lstar: return store(s.msr.lstar, cpu.canonical_base(value));
    case cstar: return store(s.msr.cstar, cpu.canonical_base(value));
    case sfmask: value = u32(value); return store(s.msr.sfmask, true);
    case fs_base: return store(s.segment[fs].base, cpu.canonical_base(value));
    case gs_base: return store(s.segment[gs].base, cpu.canonical_base(value));
    case kernel_gs_base: return store(s.msr.kernel_gs_base, cpu.canonical_base(value));
    case tsc_aux: {
      const bool there = host || cpu.cpuid.has(Feature::rdtscp) || cpu.cpuid.has(Feature::rdpid);
      if (cpu.cpuid.vendor() == Vendor::intel && value >> 32) return MsrAccess::refused;
      value = u32(value);
      return store(s.msr.tsc_aux, there);
    }
    default: return MsrAccess::unknown;
  }
}

bool is_listed(u32 index) {
  for (u32 listed : msr_index_list())
    if (listed == index) return true;
  return false;
}

MsrAccess get_any_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator) {
  MsrAccess result = get_core_msr(cpu, index, value, initiator == Initiator::host);
  if (result == MsrAccess::unknown) result = get_memory_type_msr(cpu, index, value);
  if (result == MsrAccess::unknown) result = get_machine_check_msr(cpu, index, value, initiator);
  if (result == MsrAccess::unknown) result = get_model_msr(cpu, index, value, initiator);
  return result;
}

}  // namespace

bool is_known_msr(const Cpu& cpu, u32 index) {
  u64 value;
  return get_any_msr(cpu, index, value, Initiator::guest) != MsrAccess::unknown;
}

bool get_msr(const Cpu& cpu, u32 index, u64& value, Initiator initiator) {
  const MsrAccess result = get_any_msr(cpu, index, value, initiator);
  if (result == MsrAccess::done) return true;
  value = 0;
  // A client may read whatever the list names, and write 0 to it.
  return result == MsrAccess::unknown && initiator == Initiator::host && is_listed(index);
}

bool set_msr(Cpu& cpu, u32 index, u64 value, Initiator initiator) {
  MsrAccess result = set_core_msr(cpu, index, value, initiator == Initiator::host);
  if (result == MsrAccess::unknown) result = set_memory_type_msr(cpu, index, value);
  if (result == MsrAccess::unknown) result = set_machine_check_msr(cpu, index, value, initiator);
  if (result == MsrAccess::unknown) result = set_model_msr(cpu, index, value, initiator);
  if (result == MsrAccess::done) return true;
  return result == MsrAccess::unknown && initiator == Initiator::host && value == 0 && is_listed(index);
}

u64 guest_tsc(const CpuState& state, u64 host_tsc) {
  if (state.tsc_ratio) host_tsc = u64(u128(host_tsc) * state.tsc_ratio >> tsc_ratio_bits);
  return host_tsc + state.tsc_offset;
}

Result Cpu::read_msr(u32 index, u64& value) {
  switch (machine.read_msr(index, value)) {
    case Machine::MsrResult::ok: return Result::ok;
    case Machine::MsrResult::gp: return gp();
    case Machine::MsrResult::exit: return Result::exit;
    case Machine::MsrResult::not_mine: break;
  }
  return get_msr(*this, index, value, Initiator::guest) ? Result::ok : gp();
}

Result Cpu::write_msr(u32 index, u64 value) {
  switch (machine.write_msr(index, value)) {
    case Machine::MsrResult::ok: return Result::ok;
    case Machine::MsrResult::gp: return gp();
    case Machine::MsrResult::exit: return Result::exit;
    case Machine::MsrResult::not_mine: break;
  }
  return set_msr(*this, index, value, Initiator::guest) ? Result::ok : gp();
}

}  // namespace anykvm::x86
