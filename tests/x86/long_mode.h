// A CPU in 64-bit mode on a FakeMachine, with page tables, GDT, IDT and TSS written by hand.
#pragma once

#include "x86/fake_machine.h"

namespace anykvm::x86 {

/// Page table entry bits.
namespace pte {
inline constexpr u64 p = 1, w = 2, u = 4, a = 32, d = 64, ps = 128, g = 256, nx = 1ull << 63;
}

struct LongMode {
  // Physical addresses, identity-mapped for the supervisor.
  static constexpr Gpa gdt = 0x1000, idt = 0x2000, tss = 0x3000, stack_top = 0x9000, ist_top = 0xb000, pml4 = 0x10000;
  static constexpr u16 kernel_cs = 0x08, kernel_ss = 0x10, user_cs32 = 0x18 | 3, user_ss = 0x20 | 3, user_cs = 0x28 | 3,
                       tss_selector = 0x30;
  static constexpr Gva handlers = 0x6000;
  static constexpr u64 code64 = 0x00af9b000000ffff, code32 = 0x00cf9b000000ffff, data = 0x00cf93000000ffff,
                       dpl3 = 3ull << 45;

  FakeMachine machine;
  Cpu cpu{machine};
  Gpa next_table = 0x11000;

  LongMode() {
    static const u8 never = 0;
    cpu.immediate_exit = &never;
    const u64 descriptors[] = {0,
                               code64,
                               data,
                               code32 | dpl3,
                               data | dpl3,
                               code64 | dpl3,
                               0x67 | (tss & 0xffff) << 16 | (tss >> 16 & 0xff) << 32 | 0x8bull << 40,
                               tss >> 32};
    for (unsigned i = 0; i < 8; ++i) machine.put<u64>(gdt + 8 * i, descriptors[i]);
    machine.put<u64>(tss + 4, stack_top);   // RSP0
    machine.put<u64>(tss + 0x24, ist_top);  // IST1
    CpuState& s = cpu.state;
    s.cr0 = cr0::pe | cr0::pg | cr0::wp | cr0::et | cr0::ne;
    s.cr3 = pml4;
    s.cr4 = cr4::pae | cr4::pge | cr4::osfxsr;
    s.msr.efer = efer::lme | efer::lma | efer::nx | efer::sce;
    s.gdtr = {gdt, 8 * 8 - 1};
    s.idtr = {idt, 0xfff};
    s.tr = {.base = tss, .limit = 0x67, .selector = tss_selector, .type = 0xb, .present = true};
    enter(0);
    for (Gpa page = 0; page < 0x10000; page += page_size) map(page, page, pte::p | pte::w);
    s.rip = 0x5000;
    s.gpr[rsp] = 0x7000;
  }

  /// Code of privilege level 0 or 3 runs.
  void enter(u8 cpl) {
    CpuState& s = cpu.state;
    s.segment[cs] = {.limit = 0xffffffff,
                     .selector = cpl ? user_cs : kernel_cs,
                     .type = 0xb,
                     .dpl = cpl,
                     .present = true,
                     .s = true,
                     .l = true,
                     .g = true};
    s.segment[ss] = {.limit = 0xffffffff,
                     .selector = cpl ? user_ss : kernel_ss,
                     .type = 3,
                     .dpl = cpl,
                     .present = true,
                     .s = true,
                     .db = true,
                     .g = true};
    s.segment[ds] = s.segment[es] = s.segment[fs] = s.segment[gs] = s.segment[ss];
    s.segment[fs].base = s.segment[gs].base = 0;
    cpu.update_mode();
  }

  /// Where the entry of a page lies at a level (4: PML4 ... 1: page table); tables above it are made on demand.
  Gpa entry(Gva gva, unsigned level) {
    Gpa table = pml4;
    for (unsigned at = 4; at > level; --at) {
      const Gpa gpa = table + (gva >> (12 + 9 * (at - 1)) & 511) * 8;
      u64 value = machine.get<u64>(gpa);
      if (!(value & pte::p)) {
        machine.put<u64>(gpa, value = next_table | pte::p | pte::w | pte::u);
        next_table += page_size;
      }
      table = value & 0x000ffffffffff000;
    }
    return table + (gva >> (12 + 9 * (level - 1)) & 511) * 8;
  }
  void map(Gva gva, Gpa gpa, u64 bits, unsigned level = 1) {
    machine.put<u64>(entry(gva, level), gpa | bits | (level > 1 ? pte::ps : 0));
  }
  u64 entry_value(Gva gva, unsigned level = 1) { return machine.get<u64>(entry(gva, level)); }

  void gate(u8 vector, u64 rip, u8 type = 14, u8 dpl = 0, u8 ist = 0, u16 selector = kernel_cs) {
    machine.put<u64>(idt + 16 * vector, (rip & 0xffff) | u64(selector) << 16 | u64(ist) << 32 | u64(type) << 40 |
                                            u64(dpl) << 45 | 1ull << 47 | (rip >> 16 & 0xffff) << 48);
    machine.put<u64>(idt + 16 * vector + 8, rip >> 32);
  }
  /// Each exception's handler is a HLT at handlers + 16 * vector.
  void stop_at_exceptions(u8 ist = 0) {
    for (u8 vector = 0; vector < 32; ++vector) {
      gate(vector, handlers + vector * 16, 14, 0, ist);
      machine.base[handlers + vector * 16] = 0xf4;
    }
  }
  u64 word(Gva identity, unsigned index = 0) { return machine.get<u64>(identity + 8 * index); }
};

}  // namespace anykvm::x86
