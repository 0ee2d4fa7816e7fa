// The registers as ioctls: general, special, debug and extended control registers, and their checks.
// Reference: api.rst 4.11 - 4.13 KVM_GET/SET_REGS, KVM_GET/SET_SREGS, KVM_TRANSLATE; 4.45 DEBUGREGS; 4.53 XCRS;
// 4.131 SREGS2.
#include <bit>
#include <cerrno>
#include <cstring>

#include "vcpu/vcpu.h"
#include "vm/vm.h"
#include "x86/control_registers.h"
#include "x86/paging.h"

namespace anykvm::vcpu {

using x86::CpuState;
using x86::Segment;

namespace {

kvm_segment to_kvm(const Segment& segment) {
  return {.base = segment.base,
          .limit = segment.limit,
          .selector = segment.selector,
          .type = segment.type,
          .present = segment.present,
          .dpl = segment.dpl,
          .db = segment.db,
          .s = segment.s,
          .l = segment.l,
          .g = segment.g,
          .avl = segment.avl,
          .unusable = segment.unusable};
}

Segment from_kvm(const kvm_segment& segment) {
  return {.base = segment.base,
          .limit = segment.limit,
          .selector = segment.selector,
          .type = static_cast<u8>(segment.type & 15),
          .dpl = static_cast<u8>(segment.dpl & 3),
          .present = segment.present && !segment.unusable,
          .s = segment.s != 0,
          .l = segment.l != 0,
          .db = segment.db != 0,
          .g = segment.g != 0,
          .avl = segment.avl != 0,
          .unusable = segment.unusable || !segment.present};
}

kvm_dtable to_kvm(const x86::DescriptorTable& table) { return {.base = table.base, .limit = table.limit}; }

bool uses_pae_paging(u64 cr0, u64 cr4, u64 efer) {
  return cr0 & x86::cr0::pg && cr4 & x86::cr4::pae && !(efer & x86::efer::lma);
}

}  // namespace

// --- general registers --------------------------------------------------------------------------------------------

void Vcpu::store_regs(kvm_regs& regs) const {
  const CpuState& s = cpu_.state;
  const u64* g = s.gpr;
  regs = {g[x86::rax], g[x86::rbx], g[x86::rcx], g[x86::rdx], g[x86::rsi], g[x86::rdi],
          g[x86::rsp], g[x86::rbp], g[x86::r8],  g[x86::r9],  g[x86::r10], g[x86::r11],
          g[x86::r12], g[x86::r13], g[x86::r14], g[x86::r15], s.rip,       s.rflags()};
}

void Vcpu::load_regs(const kvm_regs& r) {
  CpuState& s = cpu_.state;
  const u64 gpr[16] = {r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi,
                       r.r8,  r.r9,  r.r10, r.r11, r.r12, r.r13, r.r14, r.r15};
  std::memcpy(s.gpr, gpr, sizeof gpr);
  s.rip = r.rip;
  s.set_rflags(r.rflags);
  s.event.exception_pending = false;
  cpu_.update_mode();
  check_state_ = true;
}

int Vcpu::get_regs(kvm_regs& regs) {
  std::lock_guard lock(mutex_);
  store_regs(regs);
  return 0;
}

int Vcpu::set_regs(const kvm_regs& regs) {
  std::lock_guard lock(mutex_);
  load_regs(regs);
  return 0;
}

// --- special registers --------------------------------------------------------------------------------------------

/// The checks that KVM makes before it takes any of it.
template <class Sregs>
bool Vcpu::sregs_are_valid(const Sregs& sregs) const {
  using namespace x86;
  if (sregs.efer & efer::lme && sregs.cr0 & cr0::pg) {
    if (!(sregs.cr4 & cr4::pae) || !(sregs.efer & efer::lma)) return false;
    if (sregs.cr3 & cr3_reserved(cpu_, true)) return false;
  } else if (sregs.efer & efer::lma || sregs.cs.l) {
    return false;
  }
  if (sregs.cr0 & ~0xffffffffull) return false;
  if (sregs.cr0 & cr0::nw && !(sregs.cr0 & cr0::cd)) return false;
  if (sregs.cr0 & cr0::pg && !(sregs.cr0 & cr0::pe)) return false;
  return !(sregs.cr4 & cr4_reserved(cpu_));
}

template <class Sregs>
void Vcpu::load_sregs(const Sregs& sregs) {
  CpuState& s = cpu_.state;
  const kvm_segment* const segments[6] = {&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs};
  for (unsigned i = 0; i < 6; ++i) s.segment[i] = from_kvm(*segments[i]);
  s.tr = from_kvm(sregs.tr);
  s.ldtr = from_kvm(sregs.ldt);
  s.gdtr = {sregs.gdt.base, sregs.gdt.limit};
  s.idtr = {sregs.idt.base, sregs.idt.limit};
  s.cr0 = (sregs.cr0 & x86::cr0_known) | x86::cr0::et;
  s.cr2 = sregs.cr2;
  s.cr3 = sregs.cr3;
  s.cr4 = sregs.cr4;
  s.msr.efer = sregs.efer;
  s.cpl = s.segment[x86::ss].dpl;
  if (apic_)
    apic_->set_tpr(sregs.cr8 & 15);
  else
    cr8_ = sregs.cr8 & 15;
  cpu_.update_mode();
  cpu_.mmu.flush_all();
  check_state_ = true;
  // Clients of old wake a halted boot CPU by giving it its reset state.
  if (apic_base() & irqchip::LocalApic::base_bsp && s.rip == 0xfff0 && sregs.cs.selector == 0xf000 &&
      sregs.cs.base == 0xffff0000 && s.real_mode())
    mp_state_ = KVM_MP_STATE_RUNNABLE;
}

template <class Sregs>
void Vcpu::store_sregs(Sregs& sregs) {
  const CpuState& s = cpu_.state;
  sregs = {};
  kvm_segment* const segments[6] = {&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs};
  for (unsigned i = 0; i < 6; ++i) *segments[i] = to_kvm(s.segment[i]);
  sregs.tr = to_kvm(s.tr);
  sregs.ldt = to_kvm(s.ldtr);
  sregs.gdt = to_kvm(s.gdtr);
  sregs.idt = to_kvm(s.idtr);
  sregs.cr0 = s.cr0;
  sregs.cr2 = s.cr2;
  sregs.cr3 = s.cr3;
  sregs.cr4 = s.cr4;
  sregs.cr8 = read_cr8();
  sregs.efer = s.msr.efer;
  sregs.apic_base = apic_base();
}

int Vcpu::set_apic_base(u64 value) {
  if (apic_) return apic_->set_base(value);
  apic_base_ = value;
  return 0;
}

void Vcpu::load_pdptes_from_memory() {
  const CpuState& s = cpu_.state;
  if (!uses_pae_paging(s.cr0, s.cr4, s.msr.efer)) return;
  enter_guest_mode();
  // A table that cannot be read or loaded shows as soon as the guest uses it.
  (void)guarded([this] { (void)x86::load_pdptes(cpu_, cpu_.state.cr3); });
  leave_guest_mode();
}

void Vcpu::get_sregs_locked(kvm_sregs& sregs) {
  store_sregs(sregs);
  const x86::EventState& event = cpu_.state.event;
  if (event.interrupt_injected && !event.interrupt_soft)
    sregs.interrupt_bitmap[event.interrupt_vector / 64] = 1ull << event.interrupt_vector % 64;
}

int Vcpu::set_sregs_locked(const kvm_sregs& sregs) {
  if (!sregs_are_valid(sregs)) return -EINVAL;
  if (set_apic_base(sregs.apic_base) != 0) return -EINVAL;
  load_sregs(sregs);
  load_pdptes_from_memory();
  for (unsigned word = 0; word < 4; ++word) {
    if (sregs.interrupt_bitmap[word] == 0) continue;
    x86::EventState& event = cpu_.state.event;
    event.interrupt_injected = true;
    event.interrupt_soft = false;
    event.interrupt_vector = static_cast<u8>(word * 64 + std::countr_zero(sregs.interrupt_bitmap[word]));
    break;
  }
  return 0;
}

int Vcpu::get_sregs(kvm_sregs& sregs) {
  std::lock_guard lock(mutex_);
  get_sregs_locked(sregs);
  return 0;
}

int Vcpu::set_sregs(const kvm_sregs& sregs) {
  std::lock_guard lock(mutex_);
  return set_sregs_locked(sregs);
}

int Vcpu::get_sregs2(kvm_sregs2& sregs) {
  std::lock_guard lock(mutex_);
  const CpuState& s = cpu_.state;
  store_sregs(sregs);
  if (uses_pae_paging(s.cr0, s.cr4, s.msr.efer)) {
    std::memcpy(sregs.pdptrs, s.pdpte, sizeof sregs.pdptrs);
    sregs.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
  }
  return 0;
}

int Vcpu::set_sregs2(const kvm_sregs2& sregs) {
  std::lock_guard lock(mutex_);
  const bool has_pdptes = sregs.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID;
  if (sregs.flags & ~KVM_SREGS2_FLAGS_PDPTRS_VALID) return -EINVAL;
  if (has_pdptes && !uses_pae_paging(sregs.cr0, sregs.cr4, sregs.efer)) return -EINVAL;
  if (!sregs_are_valid(sregs)) return -EINVAL;
  if (set_apic_base(sregs.apic_base) != 0) return -EINVAL;
  load_sregs(sregs);
  if (has_pdptes)
    std::memcpy(cpu_.state.pdpte, sregs.pdptrs, sizeof sregs.pdptrs);
  else
    load_pdptes_from_memory();
  return 0;
}

// --- debug and extended control registers -------------------------------------------------------------------------

int Vcpu::get_debugregs(kvm_debugregs& regs) {
  std::lock_guard lock(mutex_);
  const CpuState& s = cpu_.state;
  regs = {};
  std::memcpy(regs.db, s.dr, sizeof regs.db);
  regs.dr6 = s.dr6;
  regs.dr7 = s.dr7;
  return 0;
}

int Vcpu::set_debugregs(const kvm_debugregs& regs) {
  std::lock_guard lock(mutex_);
  if (regs.flags != 0 || regs.dr6 >> 32 || regs.dr7 >> 32) return -EINVAL;
  CpuState& s = cpu_.state;
  std::memcpy(s.dr, regs.db, sizeof regs.db);
  s.dr6 = regs.dr6;
  s.dr7 = regs.dr7;
  cpu_.update_debug();
  return 0;
}

/// Until the client takes it back, #DB (or #BP) is its own, and so may be the debug registers. api.rst 4.87.
int Vcpu::set_guest_debug(const kvm_guest_debug& debug) {
  std::lock_guard lock(mutex_);
  if (debug.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP)) {
    x86::EventState& event = cpu_.state.event;
    if (event.exception_pending || event.exception_injected) return -EBUSY;
    event.exception_pending = true;
    event.exception_vector = debug.control & KVM_GUESTDBG_INJECT_DB ? x86::exception::db : x86::exception::bp;
    event.exception_has_error = event.exception_has_payload = false;
  }
  cpu_.guest_debug.control = debug.control & KVM_GUESTDBG_ENABLE ? debug.control : 0;
  for (unsigned n = 0; n < 4; ++n) cpu_.guest_debug.dr[n] = debug.arch.debugreg[n];
  cpu_.guest_debug.dr7 = debug.arch.debugreg[7];
  cpu_.update_debug();
  return 0;
}

int Vcpu::get_xcrs(kvm_xcrs& xcrs) {
  std::lock_guard lock(mutex_);
  xcrs = {};
  xcrs.nr_xcrs = 1;
  xcrs.xcrs[0].value = cpu_.state.xcr0;
  return 0;
}

int Vcpu::set_xcrs(const kvm_xcrs& xcrs) {
  std::lock_guard lock(mutex_);
  if (xcrs.nr_xcrs > KVM_MAX_XCRS || xcrs.flags) return -EINVAL;
  for (u32 i = 0; i < xcrs.nr_xcrs; ++i) {
    if (xcrs.xcrs[i].xcr != 0) continue;  // there is only XCR0
    if (!x86::valid_xcr0(cpu_, xcrs.xcrs[i].value)) return -EINVAL;
    cpu_.state.xcr0 = xcrs.xcrs[i].value;
    break;
  }
  return 0;
}

int Vcpu::translate(kvm_translation& translation) {
  std::lock_guard lock(mutex_);
  Gpa gpa = ~0ull;
  bool found = false;
  enter_guest_mode();
  serve_tlb_flush();
  if (!guarded([&] { found = cpu_.mmu.probe(cpu_, translation.linear_address, gpa); })) found = false;
  leave_guest_mode();
  translation.physical_address = found ? gpa : ~0ull;
  translation.valid = found;
  translation.writeable = 1;
  translation.usermode = 0;
  return 0;
}

}  // namespace anykvm::vcpu
