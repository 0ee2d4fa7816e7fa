// SYSCALL, SYSRET, SYSENTER, SYSEXIT.
// Reference: AMD64 manual volume 3 (SYSCALL, SYSRET: also their compatibility and legacy mode forms, which Intel does
// not have; SYSRET to a non-canonical RCX faults at the target, at CPL 3, where Intel's faults before); Intel SDM
// volume 2 (SYSENTER, SYSEXIT, which AMD does not have in long mode). The guest's CPUID says which vendor's it sees.
#include "x86/descriptors.h"

namespace anykvm::x86 {

Result Cpu::syscall(u64 next_rip) {
  CpuState& s = state;
  if (!(s.msr.efer & efer::sce) || !s.protected_mode()) return ud();
  if (s.code_bits != 64 && cpuid.vendor() == Vendor::intel) return ud();
  const u16 selector = u16(s.msr.star >> 32) & 0xfffc;
  if (s.long_mode()) {
    const u64 flags = s.rflags() & ~flag::rf;
    s.gpr[rcx] = next_rip;
    s.gpr[r11] = flags;
    s.rip = s.code_bits == 64 ? s.msr.lstar : s.msr.cstar;
    s.set_rflags(flags & ~s.msr.sfmask);
  } else {
    s.gpr[rcx] = u32(next_rip);
    s.rip = u32(s.msr.star);
    s.other_flags &= ~(flag::if_ | flag::rf | flag::vm);
  }
  s.segment[cs] = flat_code(selector, 0, s.long_mode());
  s.segment[ss] = flat_data(u16(selector + 8), 0);
  update_mode();
  return Result::ok;
}

Result Cpu::sysret(unsigned operand_bytes) {
  CpuState& s = state;
  if (!(s.msr.efer & efer::sce)) return ud();
  if (s.code_bits != 64 && cpuid.vendor() == Vendor::intel) return ud();
  if (!s.protected_mode() || s.cpl != 0) return gp();
  if (operand_bytes == 8 && cpuid.vendor() == Vendor::intel && !canonical(s.gpr[rcx])) return gp();
  const u16 base = u16(s.msr.star >> 48);
  const bool to_long = operand_bytes == 8;
  s.rip = to_long ? s.gpr[rcx] : u32(s.gpr[rcx]);
  s.segment[cs] = flat_code(u16((base + (to_long ? 16 : 0)) | 3), 3, to_long);
  s.segment[ss] = flat_data(u16((base + 8) | 3), 3);
  update_mode();
  if (s.long_mode()) {
    write_rflags(s.gpr[r11], 0x3c7fd7 & ~flag::rf);
  } else {
    write_rflags(flag::if_, flag::if_);
  }
  return Result::ok;
}

Result Cpu::sysenter(u64) {
  CpuState& s = state;
  const u16 selector = u16(s.msr.sysenter_cs) & 0xfffc;
  if (s.long_mode() && cpuid.vendor() == Vendor::amd) return ud();
  if (!s.protected_mode() || !selector) return gp();
  const bool long_mode = s.long_mode();
  s.other_flags &= ~(flag::if_ | flag::rf | flag::vm);
  s.gpr[rsp] = long_mode ? s.msr.sysenter_esp : u32(s.msr.sysenter_esp);
  s.rip = long_mode ? s.msr.sysenter_eip : u32(s.msr.sysenter_eip);
  s.segment[cs] = flat_code(selector, 0, long_mode);
  s.segment[ss] = flat_data(u16(selector + 8), 0);
  update_mode();
  return Result::ok;
}

Result Cpu::sysexit(unsigned operand_bytes) {
  CpuState& s = state;
  const u16 selector = u16(s.msr.sysenter_cs) & 0xfffc;
  if (!s.protected_mode() || s.cpl != 0) return gp();
  if (s.long_mode() && cpuid.vendor() == Vendor::amd) return ud();
  if (!selector) return gp();
  const bool to_long = operand_bytes == 8;
  const u64 rip = to_long ? s.gpr[rdx] : u32(s.gpr[rdx]), stack = to_long ? s.gpr[rcx] : u32(s.gpr[rcx]);
  if (!canonical(rip) || !canonical(stack)) return gp();
  s.rip = rip;
  s.gpr[rsp] = stack;
  s.segment[cs] = flat_code(u16((selector + (to_long ? 32 : 16)) | 3), 3, to_long);
  s.segment[ss] = flat_data(u16((selector + (to_long ? 40 : 24)) | 3), 3);
  update_mode();
  return Result::ok;
}

}  // namespace anykvm::x86
