// Control, debug and extended control registers: which values they take, and what a change entails.
// Reference: Intel SDM volume 3 chapters 2.5, 2.6, 4.10.4, 9.8.5, 17.2; AMD64 manual volume 2 chapters 3, 13, 14.
#include "x86/control_registers.h"

#include <x86intrin.h>

#include "x86/debug.h"
#include "x86/msr.h"
#include "x86/paging.h"

namespace anykvm::x86 {

namespace {

constexpr u64 cr3_no_flush = 1ull << 63;

bool pae_paging(u64 cr0, u64 cr4, u64 efer) {
  return cr0 & cr0::pg && cr4 & cr4::pae && !(efer & (efer::lme | efer::lma));
}

Result write_cr0(Cpu& cpu, u64 value) {
  CpuState& s = cpu.state;
  if (value >> 32) return cpu.gp();
  value = (value & cr0_known) | cr0::et;
  if (value & cr0::nw && !(value & cr0::cd)) return cpu.gp();
  if (value & cr0::pg && !(value & cr0::pe)) return cpu.gp();
  const u64 changed = value ^ s.cr0;

  bool long_mode = s.long_mode();
  if (changed & cr0::pg) {
    if (value & cr0::pg) {
      long_mode = s.msr.efer & efer::lme;
      if (long_mode && (!(s.cr4 & cr4::pae) || s.segment[cs].l)) return cpu.gp();
      // Intel's want no 16-bit task in long mode; AMD's begin with one in TR and do not look (volume 3, 9.8.5).
      if (long_mode && cpu.cpuid.vendor() == Vendor::intel && !(s.tr.type & 8)) return cpu.gp();
    } else {
      if (s.code_bits == 64 || s.cr4 & cr4::pcide) return cpu.gp();
      long_mode = false;
    }
  }
  if (changed & (cr0::pg | cr0::cd | cr0::nw) && pae_paging(value, s.cr4, s.msr.efer) && !load_pdptes(cpu, s.cr3)) {
    return cpu.gp();
  }
  s.cr0 = value;
  s.msr.efer = long_mode ? s.msr.efer | efer::lma : s.msr.efer & ~efer::lma;
  if (changed & value & cr0::pe) s.segment[ss].dpl = 0;  // protected mode begins at CPL 0
  if (changed & (cr0::pg | cr0::wp | cr0::pe)) cpu.mmu.flush_all();
  cpu.update_mode();
  return Result::ok;
}

Result write_cr3(Cpu& cpu, u64 value) {
  CpuState& s = cpu.state;
  const bool pcid = s.long_mode() && s.cr4 & cr4::pcide;
  const bool keeps = pcid && value & cr3_no_flush;
  if (pcid) value &= ~cr3_no_flush;
  if (value & cr3_reserved(cpu, s.long_mode())) return cpu.gp();
  if (pae_paging(s.cr0, s.cr4, s.msr.efer) && !load_pdptes(cpu, value)) return cpu.gp();
  s.cr3 = value;
  cpu.enter_address_space(!keeps);
  return Result::ok;
}

Result write_cr4(Cpu& cpu, u64 value) {
  CpuState& s = cpu.state;
  if (value & cr4_reserved(cpu)) return cpu.gp();
  const u64 changed = value ^ s.cr4;
  if (s.long_mode() && !(value & cr4::pae)) return cpu.gp();
  if (changed & cr4::la57 && s.long_mode()) return cpu.gp();
  if (changed & value & cr4::pcide && (!s.long_mode() || s.cr3 & 0xfff)) return cpu.gp();
  constexpr u64 paging_bits = cr4::pse | cr4::pae | cr4::pge | cr4::smep;
  if (changed & paging_bits && pae_paging(s.cr0, value, s.msr.efer) && !load_pdptes(cpu, s.cr3)) return cpu.gp();
  s.cr4 = value;
  if (changed & (paging_bits | cr4::pcide | cr4::smap | cr4::pke | cr4::la57)) cpu.mmu.flush_all();
  if (changed & cr4::de) cpu.update_debug();
  cpu.update_mode();
  return Result::ok;
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE reserves them; DR7.GD guards all.
Result resolve_dr(Cpu& cpu, unsigned& index) {
  if (index > 7) return cpu.ud();
  if (index == 4 || index == 5) {
    if (cpu.state.cr4 & cr4::de) return cpu.ud();
    index += 2;
  }
  if (cpu.effective_dr7() & dr7_gd) {
    if (cpu.client_takes_debug()) return cpu.debug_exit(exception::db, dr6_bd);
    Result result = cpu.raise(exception::db);
    cpu.fault.payload = dr6_bd;
    return result;
  }
  return Result::ok;
}

}  // namespace

u64 cr4_reserved(const Cpu& cpu) {
  u64 reserved = ~cr4_supported;
  constexpr struct {
    Feature feature;
    u64 bit;
  } rows[] = {{Feature::xsave, cr4::osxsave},     {Feature::smep, cr4::smep}, {Feature::smap, cr4::smap},
              {Feature::fsgsbase, cr4::fsgsbase}, {Feature::umip, cr4::umip}, {Feature::pcid, cr4::pcide},
              {Feature::pku, cr4::pke},           {Feature::la57, cr4::la57}};
  for (const auto& row : rows) {
    if (cpu.cpuid.is_set() ? !cpu.cpuid.has(row.feature) : !supports(row.feature)) reserved |= row.bit;
  }
  return reserved;
}

u64 cr3_reserved(const Cpu& cpu, bool long_mode) {
  return long_mode ? cpu.cpuid.reserved_physical_bits() : ~0xffffffffull;
}

bool valid_xcr0(const Cpu& cpu, u64 value) {
  using namespace xfeature;
  constexpr u64 avx512 = opmask | zmm_hi256 | hi16_zmm;
  const u64 allowed = cpu.cpuid.is_set() ? cpu.cpuid.allowed_xcr0() : supported_xcr0();
  if (!(value & x87) || value & ~allowed) return false;
  if (value & avx && !(value & sse)) return false;
  if (value & avx512 && ((value & avx512) != avx512 || !(value & avx))) return false;
  return true;
}

void Cpu::update_mode() {
  CpuState& s = state;
  s.cpl = s.real_mode() ? 0 : s.v86() ? 3 : s.segment[ss].dpl;
  s.code_bits = s.long_mode() && s.segment[cs].l ? 64 : s.segment[cs].db ? 32 : 16;
  const bool smap = s.cr4 & cr4::smap;
  system_privilege = smap ? Privilege::supervisor : Privilege::supervisor_ac;
  const bool checks_alignment = s.cpl == 3 && s.cr0 & cr0::am && s.other_flags & flag::ac;
  data_privilege = checks_alignment                      ? Privilege::user_aligned
                   : s.cpl == 3                          ? Privilege::user
                   : smap && !(s.other_flags & flag::ac) ? Privilege::supervisor
                                                         : Privilege::supervisor_ac;
}

void Cpu::enter_address_space(bool flush) {
  const u16 pcid = state.cr4 & cr4::pcide ? u16(state.cr3 & 0xfff) : 0;
  mmu.enter_context(pcid, state.cr4 & cr4::pke ? state.fpu.pkru : 0, flush);
}

Result Cpu::write_cr(unsigned index, u64 value) {
  switch (index) {
    case 0: return write_cr0(*this, value);
    case 2: state.cr2 = value; return Result::ok;
    case 3: return write_cr3(*this, value);
    case 4: return write_cr4(*this, value);
    case 8: return value > 15 ? gp() : machine.write_cr8(value);
    default: return ud();
  }
}

Result Cpu::read_cr(unsigned index, u64& value) {
  switch (index) {
    case 0: value = state.cr0; return Result::ok;
    case 2: value = state.cr2; return Result::ok;
    case 3: value = state.cr3; return Result::ok;
    case 4: value = state.cr4; return Result::ok;
    case 8: value = machine.read_cr8(); return Result::ok;
    default: return ud();
  }
}

Result Cpu::write_dr(unsigned index, u64 value) {
  if (Result r = resolve_dr(*this, index); r != Result::ok) return r;
  if (index >= 6 && value >> 32) return gp();
  if (index == 6) {
    state.dr6 = (value & dr6_writable) | dr6_fixed;
  } else if (index == 7) {
    state.dr7 = (value & dr7_writable) | dr7_fixed;
  } else {
    state.dr[index] = value;
  }
  if (index != 6) update_debug();
  return Result::ok;
}

Result Cpu::read_dr(unsigned index, u64& value) {
  if (Result r = resolve_dr(*this, index); r != Result::ok) return r;
  value = index == 6 ? state.dr6 : index == 7 ? state.dr7 : state.dr[index];
  return Result::ok;
}

Result Cpu::write_xcr(u32 index, u64 value) {
  if (!(state.cr4 & cr4::osxsave)) return ud();
  if (index != 0 || state.cpl != 0 || !valid_xcr0(*this, value)) return gp();
  state.xcr0 = value;
  return Result::ok;
}

u64 Cpu::tsc() const { return guest_tsc(state, __rdtsc()); }

void Cpu::write_rflags(u64 value, u64 mask) {
  const u64 before = state.rflags(), after = (before & ~mask) | (value & mask);
  state.set_rflags(after);
  if ((before ^ after) & (flag::ac | flag::vm)) update_mode();
  if (after & ~before & flag::if_) machine.interrupt_window_changed();
}

}  // namespace anykvm::x86
