// Power-on, INIT and SIPI.
// Reference: Intel SDM volume 3 chapter 9.1 (table 9-1), AMD64 manual volume 2 chapter 14.
#include "x86/cpu.h"
#include "x86/msr.h"

namespace anykvm::x86 {

namespace {

const volatile u8 never_exit = 0;

Segment real_mode_segment(u16 selector, u64 base, u8 type) {
  return {.base = base, .limit = 0xffff, .selector = selector, .type = type, .present = true, .s = true};
}

/// What RESET and INIT have in common.
void restart(CpuState& s, const Cpuid& cpuid) {
  for (u64& gpr : s.gpr) gpr = 0;
  const kvm_cpuid_entry2* leaf = cpuid.find(1);
  s.gpr[rdx] = leaf ? leaf->eax : 0x600;
  s.rip = 0xfff0;
  s.set_rflags(flag::fixed1);
  for (Segment& segment : s.segment) segment = real_mode_segment(0, 0, 3);
  s.segment[cs] = real_mode_segment(0xf000, 0xffff0000, 0xb);
  s.gdtr = s.idtr = {0, 0xffff};
  s.ldtr = {.limit = 0xffff, .type = 2, .present = true};
  s.tr = {.limit = 0xffff, .type = 0xb, .present = true};
  s.cr2 = s.cr3 = s.cr4 = 0;
  for (u64& address : s.dr) address = 0;
  s.dr6 = 0xffff0ff0;
  s.dr7 = 0x400;
  s.msr.efer = 0;
  s.event = {};
}

}  // namespace

Cpu::Cpu(Machine& machine_) : immediate_exit(&never_exit), machine(machine_) { reset(); }

void Cpu::reset() {
  const u64 tsc_offset = state.tsc_offset, tsc_ratio = state.tsc_ratio;
  state = {};
  reset_msrs(state.msr);
  restart(state, cpuid);
  state.cr0 = cr0::cd | cr0::nw | cr0::et;
  state.tsc_offset = tsc_offset;
  state.tsc_ratio = tsc_ratio;
  state.fpu.x87[0] = 0x7f;  // FCW 0x37f
  state.fpu.x87[1] = 0x03;
  mmio.reset();
  pio_reply = nullptr;
  pio_reply_bytes = 0;
  mmu.flush_all();
  debug_hits = 0;
  debug_exit_pending = false;
  update_debug();
  update_mode();
}

void Cpu::init() {
  restart(state, cpuid);
  state.cr0 = (state.cr0 & (cr0::cd | cr0::nw)) | cr0::et;
  mmio.reset();
  pio_reply = nullptr;
  pio_reply_bytes = 0;
  mmu.flush_all();
  debug_hits = 0;
  debug_exit_pending = false;
  update_debug();
  update_mode();
}

void Cpu::start_up(u8 sipi_vector) {
  state.segment[cs].selector = u16(sipi_vector << 8);
  state.segment[cs].base = u64(sipi_vector) << 12;
  state.rip = 0;
  update_mode();
}

}  // namespace anykvm::x86
