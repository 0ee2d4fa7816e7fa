// System instructions: control and debug registers, descriptor tables, MSRs, CPUID, time, interrupts flags, TLB
// control.
#include <cstring>

#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {
namespace {

using x86::rax, x86::rbx, x86::rcx, x86::rdx;
namespace flag = x86::flag;
namespace cr4 = x86::cr4;

/// #GP(0) unless at CPL 0.
Result privileged(Context& c) { return c.cpu.state.cpl ? c.cpu.gp() : Result::ok; }

unsigned iopl(const Context& c) { return unsigned(c.cpu.state.other_flags >> 12 & 3); }
u64 edx_eax(const Context& c) { return c.cpu.state.gpr[rdx] << 32 | u32(c.cpu.state.gpr[rax]); }
void set_edx_eax(Context& c, u64 value) {
  c.cpu.state.gpr[rax] = u32(value);
  c.cpu.state.gpr[rdx] = value >> 32;
}

// --- control and debug registers -----------------------------------------------------------------------------------
Result move_to_control(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  const unsigned bytes = c.cpu.state.code_bits == 64 ? 8 : 4;
  ANYKVM_TRY(c.cpu.write_cr(unsigned(i.selector), read_register(c, {u8(i.immediate), 0}, bytes)));
  return Result::ok;
}
Result move_from_control(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  u64 value;
  ANYKVM_TRY(c.cpu.read_cr(unsigned(i.selector), value));
  write_register(c, {u8(i.immediate), 0}, c.cpu.state.code_bits == 64 ? 8 : 4, value);
  return Result::ok;
}
/// LOCK MOV CR0, which is CR8 in any mode.
template <Handler move>
Result move_by_lock(Context& c, const Instruction& i) {
  return c.cpu.cpuid.has(x86::Feature::alt_mov_cr8) ? move(c, i) : c.cpu.ud();
}
Result move_to_debug(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  return c.cpu.write_dr(unsigned(i.selector),
                        read_register(c, {u8(i.immediate), 0}, c.cpu.state.code_bits == 64 ? 8 : 4));
}
Result move_from_debug(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  u64 value;
  ANYKVM_TRY(c.cpu.read_dr(unsigned(i.selector), value));
  write_register(c, {u8(i.immediate), 0}, c.cpu.state.code_bits == 64 ? 8 : 4, value);
  return Result::ok;
}
Result clear_task_switched(Context& c, const Instruction&) {
  ANYKVM_TRY(privileged(c));
  return c.cpu.write_cr(0, c.cpu.state.cr0 & ~x86::cr0::ts);
}
Result load_machine_status(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  u64 value;
  ANYKVM_TRY(read_operand(c, i, 0, 2, value));
  // PE can be set but not cleared; MP, EM, TS follow.
  const u64 changed = (c.cpu.state.cr0 & ~0xeull) | (value & 0xf);
  return c.cpu.write_cr(0, changed);
}
/// SGDT, SIDT, SLDT, STR, SMSW from user code under CR4.UMIP.
Result umip(Context& c) { return c.cpu.state.cpl && c.cpu.state.cr4 & cr4::umip ? c.cpu.gp() : Result::ok; }

Result store_machine_status(Context& c, const Instruction& i) {
  ANYKVM_TRY(umip(c));
  return write_operand(c, i, 0, i.has_memory ? 2 : i.operand_bytes, c.cpu.state.cr0);
}

// --- descriptor tables -------------------------------------------------------------------------------------------
Result load_table(Context& c, const Instruction& i, x86::DescriptorTable& table) {
  ANYKVM_TRY(privileged(c));
  const unsigned bytes = c.cpu.state.code_bits == 64 ? 8 : 4;
  Gva gva;
  u16 limit;
  u64 base = 0;
  ANYKVM_TRY(memory_address(c, i, bytes + 2, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, limit));
  ANYKVM_TRY(c.cpu.read(gva + 2, &base, bytes));
  if (bytes == 8 && !c.cpu.canonical_base(base)) return c.cpu.gp();
  if (c.cpu.state.code_bits != 64 && i.operand_bytes == 2) base &= 0xffffff;
  table = {base, limit};
  return Result::ok;
}
Result store_table(Context& c, const Instruction& i, const x86::DescriptorTable& table) {
  ANYKVM_TRY(umip(c));
  const unsigned bytes = c.cpu.state.code_bits == 64 ? 8 : 4;
  u8 image[10];
  std::memcpy(image, &table.limit, 2);
  std::memcpy(image + 2, &table.base, bytes);
  Gva gva;
  ANYKVM_TRY(memory_address(c, i, bytes + 2, Access::write, gva));
  return c.cpu.write(gva, image, bytes + 2);
}
Result load_gdt(Context& c, const Instruction& i) { return load_table(c, i, c.cpu.state.gdtr); }
Result load_idt(Context& c, const Instruction& i) { return load_table(c, i, c.cpu.state.idtr); }
Result store_gdt(Context& c, const Instruction& i) { return store_table(c, i, c.cpu.state.gdtr); }
Result store_idt(Context& c, const Instruction& i) { return store_table(c, i, c.cpu.state.idtr); }

bool has_selectors(const Context& c) { return c.cpu.state.protected_mode() && !c.cpu.state.v86(); }

Result load_local_table(Context& c, const Instruction& i) {
  if (!has_selectors(c)) return c.cpu.ud();
  ANYKVM_TRY(privileged(c));
  u64 selector;
  ANYKVM_TRY(read_operand(c, i, 0, 2, selector));
  return c.cpu.load_ldtr(u16(selector));
}
Result load_task_register(Context& c, const Instruction& i) {
  if (!has_selectors(c)) return c.cpu.ud();
  ANYKVM_TRY(privileged(c));
  u64 selector;
  ANYKVM_TRY(read_operand(c, i, 0, 2, selector));
  return c.cpu.load_tr(u16(selector));
}
Result store_local_table(Context& c, const Instruction& i) {
  if (!has_selectors(c)) return c.cpu.ud();
  ANYKVM_TRY(umip(c));
  return write_operand(c, i, 0, i.has_memory ? 2 : i.operand_bytes, c.cpu.state.ldtr.selector);
}
Result store_task_register(Context& c, const Instruction& i) {
  if (!has_selectors(c)) return c.cpu.ud();
  ANYKVM_TRY(umip(c));
  return write_operand(c, i, 0, i.has_memory ? 2 : i.operand_bytes, c.cpu.state.tr.selector);
}

/// LAR, LSL, VERR, VERW: the answer is ZF; LAR and LSL also load a register.
template <x86::SelectorProbe probe, bool loads>
Result probe_selector(Context& c, const Instruction& i) {
  if (!has_selectors(c)) return c.cpu.ud();
  u64 selector;
  ANYKVM_TRY(read_operand(c, i, loads ? 1 : 0, 2, selector));
  bool passed = false;
  u32 value = 0;
  ANYKVM_TRY(c.cpu.probe_selector(u16(selector), probe, passed, value));
  const u64 flags = c.cpu.state.rflags() & ~flag::zf;
  c.cpu.state.set_rflags(passed ? flags | flag::zf : flags);
  if (loads && passed) write_register(c, i.reg[0], i.operand_bytes, value);
  return Result::ok;
}

// --- MSRs, CPUID, time -------------------------------------------------------------------------------------------
Result read_msr(Context& c, const Instruction&) {
  ANYKVM_TRY(privileged(c));
  u64 value;
  ANYKVM_TRY(c.cpu.read_msr(u32(c.cpu.state.gpr[rcx]), value));
  set_edx_eax(c, value);
  return Result::ok;
}
Result write_msr(Context& c, const Instruction&) {
  ANYKVM_TRY(privileged(c));
  return c.cpu.write_msr(u32(c.cpu.state.gpr[rcx]), edx_eax(c));
}
Result identify(Context& c, const Instruction&) {
  // CPUID faulting (MISC_FEATURES_ENABLES), which Linux offers its programs as arch_prctl(ARCH_SET_CPUID).
  if (c.cpu.state.cpl && c.cpu.state.msr.misc_features_enables & 1) return c.cpu.gp();
  u64* gpr = c.cpu.state.gpr;
  u32 out[4];
  c.cpu.machine.cpuid(u32(gpr[rax]), u32(gpr[rcx]), out);
  gpr[rax] = out[0];
  gpr[rbx] = out[1];
  gpr[rcx] = out[2];
  gpr[rdx] = out[3];
  return Result::ok;
}
Result time_stamp_allowed(Context& c) {
  return c.cpu.state.cpl && c.cpu.state.cr4 & cr4::tsd && c.cpu.state.protected_mode() ? c.cpu.gp() : Result::ok;
}
Result read_time_stamp(Context& c, const Instruction&) {
  ANYKVM_TRY(time_stamp_allowed(c));
  set_edx_eax(c, c.cpu.tsc());
  return Result::ok;
}
Result read_time_stamp_and_id(Context& c, const Instruction&) {
  if (!c.cpu.cpuid.has(x86::Feature::rdtscp)) return c.cpu.ud();
  ANYKVM_TRY(time_stamp_allowed(c));
  set_edx_eax(c, c.cpu.tsc());
  c.cpu.state.gpr[rcx] = u32(c.cpu.state.msr.tsc_aux);
  return Result::ok;
}
Result read_processor_id(Context& c, const Instruction& i) {
  if (!c.cpu.cpuid.has(x86::Feature::rdpid)) return c.cpu.ud();
  write_register(c, i.reg[0], c.cpu.state.code_bits == 64 ? 8 : 4, u32(c.cpu.state.msr.tsc_aux));
  return Result::ok;
}
/// RDPKRU and WRPKRU: the rights of protection keys.
Result read_protection_keys(Context& c, const Instruction&) {
  if (!(c.cpu.state.cr4 & cr4::pke)) return c.cpu.ud();
  if (u32(c.cpu.state.gpr[rcx])) return c.cpu.gp();
  set_edx_eax(c, c.cpu.state.fpu.pkru);
  return Result::ok;
}
Result write_protection_keys(Context& c, const Instruction&) {
  if (!(c.cpu.state.cr4 & cr4::pke)) return c.cpu.ud();
  if (u32(c.cpu.state.gpr[rcx]) || u32(c.cpu.state.gpr[rdx])) return c.cpu.gp();
  c.cpu.state.fpu.pkru = u32(c.cpu.state.gpr[rax]);
  c.cpu.enter_address_space(false);
  return Result::ok;
}
/// There is no performance monitoring unit: no counter index is valid.
Result read_performance_counter(Context& c, const Instruction&) { return c.cpu.gp(); }

// --- flags and interrupts ----------------------------------------------------------------------------------------
/// Where IOPL forbids CLI and STI, they change VIF under CR4.VME (virtual-8086 mode) and CR4.PVI (CPL 3).
enum class InterruptFlag : u8 { real, virtual_, forbidden };
InterruptFlag interrupt_flag(const Context& c) {
  const x86::CpuState& s = c.cpu.state;
  if (!s.protected_mode() || s.cpl <= iopl(c)) return InterruptFlag::real;
  return s.cpl == 3 && s.cr4 & (s.v86() ? cr4::vme : cr4::pvi) ? InterruptFlag::virtual_ : InterruptFlag::forbidden;
}
Result clear_interrupt_flag(Context& c, const Instruction&) {
  const InterruptFlag which = interrupt_flag(c);
  if (which == InterruptFlag::forbidden) return c.cpu.gp();
  c.cpu.state.other_flags &= ~(which == InterruptFlag::real ? flag::if_ : flag::vif);
  return Result::ok;
}
Result set_interrupt_flag(Context& c, const Instruction&) {
  const InterruptFlag which = interrupt_flag(c);
  if (which == InterruptFlag::forbidden) return c.cpu.gp();
  if (which == InterruptFlag::virtual_) {
    if (c.cpu.state.other_flags & flag::vip) return c.cpu.gp();  // the monitor has an interrupt for it
    c.cpu.state.other_flags |= flag::vif;
    return Result::ok;
  }
  if (c.cpu.state.other_flags & flag::if_) return Result::ok;
  c.cpu.state.other_flags |= flag::if_;
  c.cpu.state.event.shadow |= KVM_X86_SHADOW_INT_STI;  // the run loop opens the window behind the next instruction
  return Result::ok;
}
Result clear_access_check(Context& c, const Instruction&) {
  if (!c.cpu.cpuid.has(x86::Feature::smap)) return c.cpu.ud();
  if (c.cpu.state.cpl) return c.cpu.ud();
  c.cpu.state.other_flags &= ~flag::ac;
  c.cpu.update_mode();
  return Result::ok;
}
Result set_access_check(Context& c, const Instruction&) {
  if (!c.cpu.cpuid.has(x86::Feature::smap)) return c.cpu.ud();
  if (c.cpu.state.cpl) return c.cpu.ud();
  c.cpu.state.other_flags |= flag::ac;
  c.cpu.update_mode();
  return Result::ok;
}
Result clear_direction(Context& c, const Instruction&) {
  c.cpu.state.other_flags &= ~flag::df;
  return Result::ok;
}
Result set_direction(Context& c, const Instruction&) {
  c.cpu.state.other_flags |= flag::df;
  return Result::ok;
}
Result halt(Context& c, const Instruction&) {
  ANYKVM_TRY(privileged(c));
  c.cpu.exit.kind = x86::ExitKind::halt;
  return Result::ok;
}

// --- FS and GS bases ---------------------------------------------------------------------------------------------
Result swap_gs(Context& c, const Instruction&) {
  if (c.cpu.state.code_bits != 64) return c.cpu.ud();
  ANYKVM_TRY(privileged(c));
  std::swap(c.cpu.state.segment[x86::gs].base, c.cpu.state.msr.kernel_gs_base);
  return Result::ok;
}
Result base_access_allowed(Context& c) {
  return c.cpu.state.code_bits == 64 && c.cpu.state.cr4 & cr4::fsgsbase ? Result::ok : c.cpu.ud();
}
template <x86::SegmentName segment>
Result read_base(Context& c, const Instruction& i) {
  ANYKVM_TRY(base_access_allowed(c));
  write_register(c, i.reg[0], i.operand_bytes, c.cpu.state.segment[segment].base);
  return Result::ok;
}
template <x86::SegmentName segment>
Result write_base(Context& c, const Instruction& i) {
  ANYKVM_TRY(base_access_allowed(c));
  const u64 base = read_register(c, i.reg[0], i.operand_bytes);
  if (!c.cpu.canonical_base(base)) return c.cpu.gp();
  c.cpu.state.segment[segment].base = base;
  return Result::ok;
}

// --- TLB and caches ----------------------------------------------------------------------------------------------
Result invalidate_page(Context& c, const Instruction& i) {
  ANYKVM_TRY(privileged(c));
  u64 offset = effective_offset(c, i);
  if (c.cpu.state.code_bits != 64 || i.segment >= x86::fs) offset += c.cpu.state.segment[i.segment].base;
  if (c.cpu.state.code_bits != 64) offset = u32(offset);
  c.cpu.mmu.flush_page(c.cpu, offset);
  return Result::ok;
}
Result invalidate_process_context(Context& c, const Instruction& i) {
  if (!c.cpu.cpuid.has(x86::Feature::invpcid)) return c.cpu.ud();
  ANYKVM_TRY(privileged(c));
  Gva gva;
  u64 descriptor[2];
  ANYKVM_TRY(memory_address(c, i, 16, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, descriptor, 16));
  const u64 type = read_register(c, i.reg[0], c.cpu.state.code_bits == 64 ? 8 : 4);
  const u64 pcid = descriptor[0];
  if (type > 3 || pcid >> 12) return c.cpu.gp();
  if (type < 2 && pcid && !(c.cpu.state.cr4 & cr4::pcide)) return c.cpu.gp();
  switch (type) {
    case 0:
      if (!c.cpu.canonical(descriptor[1])) return c.cpu.gp();
      c.cpu.mmu.flush_page(c.cpu, descriptor[1]);
      break;
    case 1: c.cpu.mmu.flush_context(u16(pcid)); break;
    case 2: c.cpu.mmu.flush_all(); break;
    default: c.cpu.mmu.flush_non_global(); break;
  }
  return Result::ok;
}
/// Caches are coherent: writing them back and dropping them changes nothing that a guest can see.
Result write_back_caches(Context& c, const Instruction&) { return privileged(c); }
Result flush_line(Context& c, const Instruction& i) {
  Gva gva;
  x86::Mmu::Translation page;
  ANYKVM_TRY(memory_address(c, i, 1, Access::read, gva));
  return c.cpu.mmu.translate(c.cpu, gva, Access::read, c.cpu.data_privilege, page, i.segment == x86::ss);
}
/// CLZERO: the line of 64 bytes at rAX.
Result clear_line(Context& c, const Instruction& i) {
  if (!c.cpu.cpuid.has(x86::Feature::clzero)) return c.cpu.ud();
  static constexpr u8 zeros[64] = {};
  Gva gva;
  const u64 offset = c.cpu.state.gpr[rax] & size_mask(i.address_bytes);
  if (c.cpu.state.code_bits == 64)
    ANYKVM_TRY(linear_address(c, i.segment, offset, 1, Access::write, gva));
  else
    ANYKVM_TRY(linear_address(c, i.segment, offset & ~63ull, sizeof zeros, Access::write, gva));
  return c.cpu.write(gva & ~63ull, zeros, sizeof zeros);
}

/// The other vendor's hypercall becomes the CPU's own, in the guest's code, as KVM has it (KVM_X86_QUIRK_FIX_
/// HYPERCALL_INSN); where that cannot be written to, it works all the same.
Result hypercall(Context& c, x86::Vendor foreign_to, const u8 (&own)[3]) {
  x86::Cpu& cpu = c.cpu;
  if (cpu.cpuid.vendor() == foreign_to) {
    if (cpu.disabled_quirks.load(std::memory_order_relaxed) & KVM_X86_QUIRK_FIX_HYPERCALL_INSN) return cpu.ud();
    const u64 base = cpu.state.code_bits == 64 ? 0 : cpu.state.segment[x86::cs].base;
    x86::Operand code;
    if (cpu.open_operand(base + cpu.state.rip, sizeof own, x86::Cpu::Use::write, code) == Result::ok && !code.bounced)
      std::memcpy(code.host, own, sizeof own);
  }
  return cpu.machine.hypercall();
}
Result vmcall(Context& c, const Instruction&) { return hypercall(c, x86::Vendor::amd, {0x0f, 0x01, 0xd9}); }
Result vmmcall(Context& c, const Instruction&) { return hypercall(c, x86::Vendor::intel, {0x0f, 0x01, 0xc1}); }

/// MONITOR and MWAIT: no wait, as KVM without the host's MWAIT. A guest without the feature is spared #UD, unless its
/// client wants it (KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS).
Result monitor_or_wait(Context& c, const Instruction&) {
  const bool offered = c.cpu.cpuid.has_mwait(c.cpu.state);
  const u64 quirks = c.cpu.disabled_quirks.load(std::memory_order_relaxed);
  if (c.cpu.state.cpl != 0 || (!offered && quirks & KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)) return c.cpu.ud();
  return Result::ok;
}

/// The segment of an operand that the decoder does not list: the last override's, of which 64-bit code has FS and GS.
x86::SegmentName overriding_segment(const Decoded& d, unsigned code_bits) {
  x86::SegmentName segment = x86::ds;
  for (unsigned n = 0; n < d.instruction.raw.prefix_count; ++n) switch (d.instruction.raw.prefixes[n].value) {
      case 0x26: segment = code_bits == 64 ? segment : x86::es; break;
      case 0x2e: segment = code_bits == 64 ? segment : x86::cs; break;
      case 0x36: segment = code_bits == 64 ? segment : x86::ss; break;
      case 0x3e: segment = code_bits == 64 ? segment : x86::ds; break;
      case 0x64: segment = x86::fs; break;
      case 0x65: segment = x86::gs; break;
      default: break;
    }
  return segment;
}

/// MOV to and from CRn, DRn: selector is the system register, immediate the general one.
Handler select_control_move(const Decoded& d, Instruction& out) {
  if (d.mnemonic() != ZYDIS_MNEMONIC_MOV || !d.is_register(0) || !d.is_register(1)) return nullptr;
  const auto matches = [&](unsigned n, ZydisRegisterClass kind) {
    if (d.register_class(n) != kind) return false;
    out.selector = u16(d.register_id(n));
    out.immediate = s64(d.register_id(1 - n));
    return true;
  };
  const bool locked = d.instruction.attributes & ZYDIS_ATTRIB_HAS_LOCK;
  if (matches(0, ZYDIS_REGCLASS_CONTROL)) return locked ? move_by_lock<move_to_control> : move_to_control;
  if (matches(1, ZYDIS_REGCLASS_CONTROL)) return locked ? move_by_lock<move_from_control> : move_from_control;
  if (matches(0, ZYDIS_REGCLASS_DEBUG)) return move_to_debug;
  if (matches(1, ZYDIS_REGCLASS_DEBUG)) return move_from_debug;
  return nullptr;
}

}  // namespace

Handler select_system(const Decoded& d, Instruction& out) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_MOV: return select_control_move(d, out);
    case ZYDIS_MNEMONIC_CLTS: return clear_task_switched;
    case ZYDIS_MNEMONIC_LMSW: return load_machine_status;
    case ZYDIS_MNEMONIC_SMSW: return store_machine_status;
    case ZYDIS_MNEMONIC_LGDT: return load_gdt;
    case ZYDIS_MNEMONIC_LIDT: return load_idt;
    case ZYDIS_MNEMONIC_SGDT: return store_gdt;
    case ZYDIS_MNEMONIC_SIDT: return store_idt;
    case ZYDIS_MNEMONIC_LLDT: return load_local_table;
    case ZYDIS_MNEMONIC_LTR: return load_task_register;
    case ZYDIS_MNEMONIC_SLDT: return store_local_table;
    case ZYDIS_MNEMONIC_STR: return store_task_register;
    case ZYDIS_MNEMONIC_LAR: return probe_selector<x86::SelectorProbe::lar, true>;
    case ZYDIS_MNEMONIC_LSL: return probe_selector<x86::SelectorProbe::lsl, true>;
    case ZYDIS_MNEMONIC_VERR: return probe_selector<x86::SelectorProbe::verr, false>;
    case ZYDIS_MNEMONIC_VERW: return probe_selector<x86::SelectorProbe::verw, false>;
    case ZYDIS_MNEMONIC_RDMSR: return read_msr;
    case ZYDIS_MNEMONIC_WRMSR: return write_msr;
    case ZYDIS_MNEMONIC_CPUID: return identify;
    case ZYDIS_MNEMONIC_RDTSC: return read_time_stamp;
    case ZYDIS_MNEMONIC_RDTSCP: return read_time_stamp_and_id;
    case ZYDIS_MNEMONIC_RDPID: return read_processor_id;
    case ZYDIS_MNEMONIC_RDPMC: return read_performance_counter;
    case ZYDIS_MNEMONIC_RDPKRU: return read_protection_keys;
    case ZYDIS_MNEMONIC_WRPKRU: return write_protection_keys;
    case ZYDIS_MNEMONIC_CLI: return clear_interrupt_flag;
    case ZYDIS_MNEMONIC_STI: return set_interrupt_flag;
    case ZYDIS_MNEMONIC_CLAC: return clear_access_check;
    case ZYDIS_MNEMONIC_STAC: return set_access_check;
    case ZYDIS_MNEMONIC_CLD: return clear_direction;
    case ZYDIS_MNEMONIC_STD: return set_direction;
    case ZYDIS_MNEMONIC_HLT: return halt;
    case ZYDIS_MNEMONIC_SWAPGS: return swap_gs;
    case ZYDIS_MNEMONIC_RDFSBASE: out.operand_bytes = u8(d.bytes(0)); return read_base<x86::fs>;
    case ZYDIS_MNEMONIC_RDGSBASE: out.operand_bytes = u8(d.bytes(0)); return read_base<x86::gs>;
    case ZYDIS_MNEMONIC_WRFSBASE: out.operand_bytes = u8(d.bytes(0)); return write_base<x86::fs>;
    case ZYDIS_MNEMONIC_WRGSBASE: out.operand_bytes = u8(d.bytes(0)); return write_base<x86::gs>;
    case ZYDIS_MNEMONIC_INVLPG: return invalidate_page;
    case ZYDIS_MNEMONIC_INVPCID: return invalidate_process_context;
    case ZYDIS_MNEMONIC_INVD:
    case ZYDIS_MNEMONIC_WBINVD: return write_back_caches;
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
    case ZYDIS_MNEMONIC_CLWB: return flush_line;
    case ZYDIS_MNEMONIC_CLDEMOTE: return no_operation;
    case ZYDIS_MNEMONIC_CLZERO: out.segment = overriding_segment(d, out.code_bits); return clear_line;
    case ZYDIS_MNEMONIC_VMCALL: return vmcall;
    case ZYDIS_MNEMONIC_VMMCALL: return vmmcall;
    case ZYDIS_MNEMONIC_MONITOR:
    case ZYDIS_MNEMONIC_MWAIT: return monitor_or_wait;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
