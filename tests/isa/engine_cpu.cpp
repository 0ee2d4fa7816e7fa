#include "isa/engine_cpu.h"

#include <cstdlib>
#include <cstring>

namespace anykvm::isa {

using namespace x86;

namespace {
Segment segment(u16 selector, u8 type, u8 dpl, bool code) {
  Segment s;
  s.selector = selector;
  s.limit = 0xffffffff;
  s.type = type;
  s.dpl = dpl;
  s.present = s.s = s.g = true;
  s.l = code;
  s.db = !code;
  return s;
}
}  // namespace

EngineCpu::EngineCpu(std::unique_ptr<engine::Engine> engine)
    : machine_(ram), cpu_(machine_), engine_(std::move(engine)) {
  static const u8 never = 0;
  cpu_.immediate_exit = &never;
  cpu_.cpuid.set(supported_cpuid());
  cpu_.reset();
  for (u64 n = 0; n < 16; ++n) map(system_address + n * page_size, system_gpa + n * page_size, false);
  for (u64 n = 0; n < 16; ++n) map(system_address + 0x10000 + n * page_size, handlers_gpa + n * page_size, false);
  map(system_address + 0x20000, stack_gpa, false);
  map(code_address, code_gpa, true);
  for (u64 n = 0; n < data_bytes / page_size; ++n) map(data_address + n * page_size, data_gpa + n * page_size, true);

  // GDT: 0x08 kernel code, 0x10 kernel data, 0x1b user data, 0x23 user code, 0x28 TSS.
  const u64 gdt[] = {0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff};
  std::memcpy(machine_.base + system_gpa, gdt, sizeof gdt);
  for (u64 vector = 0; vector < 32; ++vector) {  // each handler is one HLT, 16 bytes apart
    const u64 handler = system_address + 0x10000 + vector * 16;
    const u64 low = (handler & 0xffff) | 0x08ull << 16 | 0x8eull << 40 | (handler >> 16 & 0xffff) << 48;
    machine_.put(system_gpa + 0x1000 + vector * 16, low);
    machine_.put(system_gpa + 0x1000 + vector * 16 + 8, handler >> 32);
    machine_.put<u8>(handlers_gpa + vector * 16, 0xf4);
  }
  machine_.put(system_gpa + 0x2000 + 4, system_address + 0x21000);  // RSP0

  CpuState& s = cpu_.state;
  s.cr0 = cr0::pe | cr0::mp | cr0::et | cr0::ne | cr0::wp | cr0::pg;
  s.cr3 = tables_gpa;
  s.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt | cr4::osxsave | cr4::fsgsbase;
  s.msr.efer = efer::sce | efer::lme | efer::lma | efer::nx;
  s.xcr0 = supported_xcr0() & 7;
  s.gdtr = {system_address, sizeof gdt - 1};
  s.idtr = {system_address + 0x1000, 32 * 16 - 1};
  s.tr = segment(0x28, 11, 0, false);
  s.tr.s = false;
  s.tr.base = system_address + 0x2000;
  s.tr.limit = 0x67;
}

void EngineCpu::map(u64 gva, u64 gpa, bool user) {
  u64 table = tables_gpa;
  for (unsigned shift = 39; shift > 12; shift -= 9) {
    const u64 at = table + (gva >> shift & 511) * 8;
    if (!machine_.get<u64>(at)) {
      machine_.put(at, next_table_ | 7);
      next_table_ += page_size;
      if (next_table_ > system_gpa) abort();
    }
    table = machine_.get<u64>(at) & page_mask;
  }
  machine_.put(table + (gva >> 12 & 511) * 8, gpa | (user ? 7 : 3));
}

void EngineCpu::load(const HostState& in) {
  CpuState& s = cpu_.state;
  std::memcpy(s.gpr, in.gpr, sizeof s.gpr);
  s.rip = code_address;
  s.set_rflags(in.rflags);
  for (SegmentName name : {es, ss, ds, fs, gs}) s.segment[name] = segment(0x1b, 3, 3, false);
  s.segment[cs] = segment(0x23, 11, 3, true);
  s.cpl = 3;
  s.event = {};
  s.fpu = {};
  for (unsigned n = 0; n < 16; ++n) std::memcpy(s.fpu.vector[n], in.vector[n], 32);
  std::memcpy(s.fpu.x87, in.fx, 160);
  std::memcpy(&s.fpu.mxcsr, in.fx + 24, 4);
  cpu_.update_mode();
}

u64 EngineCpu::step(HostState& out) {
  CpuState& s = cpu_.state;
  const u64 start = s.rip;
  do engine_->step(cpu_);
  while (cpu_.exit.kind == ExitKind::none && s.rip == start && s.cpl == 3);
  u64 trap = no_trap;
  if (cpu_.exit.kind != ExitKind::none) {
    trap = 1000 + u64(cpu_.exit.kind);
  } else if (s.cpl == 0) {
    trap = (s.rip - system_address - 0x10000) / 16;
    u64 frame = stack_gpa + page_size - 40;  // RIP CS RFLAGS RSP SS
    out.rflags = machine_.get<u64>(frame + 16);
    s.gpr[rsp] = machine_.get<u64>(frame + 24);
    out.fault_address = s.cr2;
  }
  std::memcpy(out.gpr, s.gpr, sizeof s.gpr);
  if (trap == no_trap) out.rflags = s.rflags();
  for (unsigned n = 0; n < 16; ++n) std::memcpy(out.vector[n], s.fpu.vector[n], 32);
  std::memcpy(out.fx, s.fpu.x87, 160);
  std::memcpy(out.fx + 24, &s.fpu.mxcsr, 4);
  out.trap = trap;
  return trap;
}

}  // namespace anykvm::isa
