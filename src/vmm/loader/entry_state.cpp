// The processor's state at the kernel's first instruction.
#include <cstring>

#include "anykvm/kvm.h"
#include "vmm/loader/kernel.h"

namespace anykvm::vmm {

namespace {

constexpr u64 cr0_pe = 1, cr0_et = 1 << 4, cr0_pg = u64{1} << 31;
constexpr u64 cr4_pae = 1 << 5;
constexpr u64 efer_lme = 1 << 8, efer_lma = 1 << 10;
constexpr u64 rflags_fixed = 2;

/// The selectors that the boot protocol names: __BOOT_CS and __BOOT_DS, and a task state segment.
constexpr u16 code_selector = 0x10, data_selector = 0x18, task_selector = 0x20;

u64 descriptor(const kvm_segment& segment) {
  const u64 limit = segment.g ? segment.limit >> 12 : segment.limit;
  return (limit & 0xffff) | (segment.base & 0xff'ffff) << 16 | u64{segment.type} << 40 | u64{segment.s} << 44 |
         u64{segment.dpl} << 45 | u64{segment.present} << 47 | (limit >> 16 & 0xf) << 48 | u64{segment.l} << 53 |
         u64{segment.db} << 54 | u64{segment.g} << 55 | (segment.base >> 24 & 0xff) << 56;
}

/// Identity-maps the first 4 GiB by 2 MiB pages: PML4, PDPT, four page directories.
void write_page_tables(const GuestMemory& memory) {
  constexpr u64 present_writable = 3, large = 1 << 7;
  const auto tables = memory.at(boot_layout::page_tables, 6 * page_size);
  std::memset(tables.data(), 0, tables.size());
  const auto set = [&](u64 table, u64 index, u64 entry) {
    std::memcpy(tables.data() + table * page_size + index * 8, &entry, sizeof entry);
  };
  set(0, 0, (boot_layout::page_tables + page_size) | present_writable);
  for (u64 gib = 0; gib < 4; ++gib) {
    set(1, gib, (boot_layout::page_tables + (2 + gib) * page_size) | present_writable);
    for (u64 i = 0; i < 512; ++i) set(2 + gib, i, (gib << 30 | i << 21) | present_writable | large);
  }
}

}  // namespace

void set_entry_state(const GuestMemory& memory, const LoadedKernel& kernel, kvm_regs& regs, kvm_sregs& sregs) {
  const bool is_64bit = kernel.mode == EntryMode::linux64;
  kvm_segment flat{.base = 0, .limit = 0xffff'ffff, .present = 1, .s = 1, .g = 1};
  kvm_segment code = flat, data = flat;
  code.selector = code_selector;
  code.type = 0xb;  // execute, read, accessed
  code.l = is_64bit;
  code.db = !is_64bit;
  data.selector = data_selector;
  data.type = 0x3;  // read, write, accessed
  data.db = 1;
  const kvm_segment task{.base = 0, .limit = 0x67, .selector = task_selector, .type = 0xb, .present = 1};

  const u64 gdt[] = {0, 0, descriptor(code), descriptor(data), descriptor(task), 0};
  memory.write(boot_layout::gdt, {reinterpret_cast<const u8*>(gdt), sizeof gdt});
  sregs.gdt = {.base = boot_layout::gdt, .limit = sizeof gdt - 1};
  sregs.idt = {.base = 0, .limit = 0};
  sregs.cs = code;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.tr = task;
  sregs.ldt = {.type = 2, .unusable = 1};

  regs = {};
  regs.rip = kernel.entry;
  regs.rflags = rflags_fixed;
  regs.rsp = boot_layout::stack_top;
  sregs.cr0 = cr0_pe | cr0_et;
  sregs.cr4 = 0;
  sregs.efer = 0;
  if (is_64bit) {
    write_page_tables(memory);
    sregs.cr0 |= cr0_pg;
    sregs.cr3 = boot_layout::page_tables;
    sregs.cr4 = cr4_pae;
    sregs.efer = efer_lme | efer_lma;
    regs.rsi = kernel.parameters;
  } else {
    regs.rbx = kernel.parameters;
  }
}

}  // namespace anykvm::vmm
