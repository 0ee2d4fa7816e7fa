#include "isa/engine_cpu.h"

#include <cstdlib>
#include <cstring>

#include "isa/segments.h"
#include "x86/descriptors.h"
#include "x86/xsave.h"

namespace anykvm::isa {

using namespace x86;

namespace {
constexpr u64 present_writable_user = 7, present_user = 5, present_writable = 3, no_execute = 1ull << 63;
constexpr u64 handler_bytes = 16;
}  // namespace

EngineCpu::EngineCpu(std::unique_ptr<engine::Engine> engine, u64 features, std::span<const u8, data_total> pattern,
                     unsigned cpu_limit)
    : machine_(ram),
      cpu_(machine_),
      engine_(std::move(engine)),
      features_(features),
      drops_dead_flags_(!std::strcmp(engine_->name(), engine::name_of(engine::Kind::translate))) {
  std::memcpy(pattern_, pattern.data(), data_total);
  static const u8 never = 0;
  cpu_.immediate_exit = &never;
  cpu_.cpuid.set(supported_cpuid());
  cpu_.reset();
  for (u64 n = 0; n < 16; ++n) map(system_address + n * page_size, system_gpa + n * page_size, present_writable);
  for (u64 n = 0; n < 16; ++n)
    map(system_address + 0x10000 + n * page_size, handlers_gpa + n * page_size, present_writable);
  map(system_address + 0x20000, stack_gpa, present_writable);
  for (u64 n = 0; n < code_bytes / page_size; ++n)
    map(code_address + n * page_size, code_gpa + n * page_size, present_user);
  map(exit_address, exit_gpa, present_user);
  for (u64 n = 0; n < data_total / page_size; ++n)
    map(data_address + n * page_size, data_gpa + n * page_size,
        (n < data_bytes / page_size ? present_writable_user : present_user) | no_execute);

  const auto gdt = global_descriptors();
  std::memcpy(machine_.base + system_gpa, gdt.data(), gdt.size_bytes());
  const u64 cpu_number = system_gpa + (cpu_number_selector & ~7u);
  machine_.put<u64>(cpu_number, machine_.get<u64>(cpu_number) | (cpu_limit & 0xffff) | u64(cpu_limit & 0xf0000) << 32);
  for (u64 vector = 0; vector < 32; ++vector) {
    const u64 handler = system_address + 0x10000 + vector * handler_bytes;
    const u64 dpl = vector == 3 || vector == 4 ? 3 : 0;
    const u64 low = (handler & 0xffff) | 0x10ull << 16 | (0x8eull | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48;
    machine_.put(system_gpa + 0x1000 + vector * 16, low);
    machine_.put(system_gpa + 0x1000 + vector * 16 + 8, handler >> 32);
    machine_.put<u8>(handlers_gpa + vector * handler_bytes, 0xf4);  // HLT
  }
  machine_.put(system_gpa + 0x2000 + 4, system_address + 0x21000);  // RSP0
  machine_.put<u16>(system_gpa + 0x2000 + 0x66, 0x68);              // no port is allowed
  u64 ldt_at = system_gpa + 0x3000;
  for (const LocalSegment& s : local_segments()) machine_.put(ldt_at, s.descriptor()), ldt_at += 8;
  std::memset(machine_.base + exit_gpa, 0xf4, page_size);
  std::memset(machine_.base + code_gpa, 0xf4, code_bytes);
  std::memcpy(machine_.base + data_gpa, pattern_, data_total);

  CpuState& s = cpu_.state;
  s.cr0 = cr0::pe | cr0::mp | cr0::et | cr0::ne | cr0::wp | cr0::am | cr0::pg;
  s.cr3 = tables_gpa;
  s.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt | cr4::osxsave | cr4::fsgsbase;
  s.msr.efer = efer::sce | efer::lme | efer::lma | efer::nx;
  s.xcr0 = features_;
  s.gdtr = {system_address, u16(gdt.size_bytes() - 1)};
  s.idtr = {system_address + 0x1000, 32 * 16 - 1};
  s.tr = {.base = system_address + 0x2000, .limit = 0x67, .selector = 0x40, .type = 11, .present = true};
  s.ldtr = {.base = system_address + 0x3000,
            .limit = u32(local_segments().size() * 8 - 1),
            .selector = 0x50,
            .type = 2,
            .present = true};
}

void EngineCpu::map(u64 gva, u64 gpa, u64 rights) {
  u64 table = tables_gpa;
  for (unsigned shift = 39; shift > 12; shift -= 9) {
    const u64 at = table + (gva >> shift & 511) * 8;
    if (!machine_.get<u64>(at)) {
      machine_.put(at, next_table_ | present_writable_user);
      next_table_ += page_size;
      if (next_table_ > system_gpa) abort();
    }
    table = machine_.get<u64>(at) & page_mask;
  }
  machine_.put(table + (gva >> 12 & 511) * 8, gpa | rights);
}

Segment EngineCpu::segment(u16 selector) const {
  if (null_selector(selector)) return null_segment(selector, 3);
  const u64 at = selector & 4 ? system_gpa + 0x3000 : system_gpa;
  return parse_segment(machine_.get<u64>(at + (selector & ~7u)), selector);
}

void EngineCpu::load(const Case& c) {
  const Registers& in = c.in;
  CpuState& s = cpu_.state;
  std::memcpy(s.gpr, in.gpr, sizeof s.gpr);
  s.rip = in.rip;
  s.set_rflags(in.rflags);
  for (unsigned n = 0; n < 6; ++n) s.segment[n] = segment(in.selector[n]);
  if (c.mode == Mode::code64) s.segment[fs].base = in.base[0], s.segment[gs].base = in.base[1];
  s.cpl = 3;
  s.event = {};
  for (unsigned n = 0; n < 16; ++n) {
    std::memcpy(s.fpu.vector[n], in.fx + 160 + 16 * n, 16);
    std::memcpy(s.fpu.vector[n] + 16, in.ymm_high[n], 16);
    std::memcpy(s.fpu.vector[n] + 32, in.zmm_high[n], 32);
  }
  std::memcpy(s.fpu.vector[16], in.zmm_upper, sizeof in.zmm_upper);
  std::memcpy(s.fpu.opmask, in.opmask, sizeof in.opmask);
  std::memcpy(s.fpu.x87, in.fx, 160);
  s.fpu.x87_code_selector = s.fpu.x87_data_selector = 0;
  s.fpu.mxcsr = in.mxcsr();
  cpu_.update_mode();
}

void EngineCpu::run(const Case& c, Outcome& o) {
  u8* data = machine_.base + data_gpa;
  std::memcpy(data, pattern_, data_bytes);
  for (unsigned n = 0; n < c.poke_count; ++n) std::memcpy(data + c.pokes[n].at, &c.pokes[n].value, 8);
  u8 code[Case::max_code + 32];
  const unsigned length = lay_out(c, code);
  u8* code_at = machine_.base + code_gpa + c.code_offset;
  std::memcpy(code_at, code, length);
  cpu_.attention.store(0, std::memory_order_relaxed);
  ++cases_;
  load(c);

  CpuState& s = cpu_.state;
  engine_->run(cpu_);

  Registers& r = o.out;
  std::memcpy(r.gpr, s.gpr, sizeof r.gpr);
  o.error = 0;
  o.address = 0;
  o.drops_dead_flags = drops_dead_flags_;
  if (cpu_.exit.kind == ExitKind::halt) {  // in an exception's handler
    o.trap = u32((s.rip - system_address - 0x10000) / handler_bytes);
    const bool has_error = (o.trap >= 10 && o.trap <= 14) || o.trap == 17 || o.trap == 8 || o.trap == 21;
    u64 frame[6];  // error, RIP, CS, RFLAGS, RSP, SS
    std::memcpy(frame, machine_.base + stack_gpa + page_size - sizeof frame, sizeof frame);
    if (has_error) o.error = u32(frame[0]);
    if (o.trap == 14) o.address = s.cr2;
    r.rip = frame[1];
    r.selector[1] = u16(frame[2]);
    r.rflags = frame[3];
    r.gpr[4] = frame[4];
    r.selector[2] = u16(frame[5]);
    if (o.trap == 13 && r.rip == exit_address) o.trap = no_trap, o.error = 0;  // the HLT there
  } else {
    o.trap = cpu_.exit.kind == ExitKind::attention ? endless : 1000 + u32(cpu_.exit.kind);
    r.rip = s.rip;
    r.selector[1] = s.segment[cs].selector;
    r.rflags = s.rflags();
    r.selector[2] = s.segment[ss].selector;
  }
  r.selector[0] = s.segment[es].selector;
  for (unsigned n = 3; n < 6; ++n) r.selector[n] = s.segment[n].selector;
  r.base[0] = s.segment[fs].base;
  r.base[1] = s.segment[gs].base;
  std::memcpy(r.fx, s.fpu.x87, 160);
  r.set_mxcsr(s.fpu.mxcsr);
  for (unsigned n = 0; n < 16; ++n) {
    std::memcpy(r.fx + 160 + 16 * n, s.fpu.vector[n], 16);
    std::memcpy(r.ymm_high[n], s.fpu.vector[n] + 16, 16);
    std::memcpy(r.zmm_high[n], s.fpu.vector[n] + 32, 32);
  }
  std::memcpy(r.zmm_upper, s.fpu.vector[16], sizeof r.zmm_upper);
  std::memcpy(r.opmask, s.fpu.opmask, sizeof r.opmask);
  r.in_use = xsave_in_use(s.fpu);
  std::memset(code_at, 0xf4, length);
  std::memcpy(o.data, data, data_bytes);
}

}  // namespace anykvm::isa
