// The tables that every test of long mode starts with.
#include <cstring>

#include "oracle/long_generator.h"

extern "C" const anykvm::u8 long_code[], long_stubs[];

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::tables() {
  const u64 gdt[gdt_slots] = {
      0,
      segment(0, 0xfffff, 0x9b, 0xa),  // 08
      segment(0, 0xfffff, 0x93, 0xc),
      segment(0, 0xfffff, 0xfb, 0xc),
      segment(0, 0xfffff, 0xf3, 0xc),  // 20
      segment(0, 0xfffff, 0xfb, 0xa),
      segment(0, 0xfffff, 0xf3, 0xc),
      segment(LONG_TSS, 0x67, 0x89, 0),
      0,  // 40
      segment(LONG_LDT, 0x1f, 0x82, 0),
      0,
      segment(0, 0xfffff, 0x9b, 0xc),
      segment(0x10000, 0xffff, 0xfb, 0),  // 60
      segment(0x10000, 0xffff, 0xf3, 0),
      segment(0, 0xfffff, 0xbb, 0xa),
      segment(0, 0xfffff, 0xb3, 0xc),
      gate(code64_r0, LONG_SUPER_CODE + 0x80, 0xec),  // 80
      0,
      gate(code64_r3, LONG_USER_CODE + 0x80, 0xec),
      0,
      gate(conforming64, LONG_SUPER_CODE + 0x80, 0xec),  // a0
      0,
      segment(0, 0xfffff, 0x9f, 0xa),
      segment(0, 0xfffff, 0x9f, 0xc),
      segment(LONG_TSS2, 0x67, 0x89, 0),  // c0
      0,
      segment(0, 0xfffff, 0x9b, 0xe),  // both L and D
      segment(0, 0xfffff, 0x1b, 0xa),  // absent
      segment(0, 0xfffff, 0x73, 0xc),  // e0: absent
      segment(0, 0xfffff, 0xf9, 0xc),  // execute only
      segment(LONG_LDT, 0x1f, 0xe2, 0),
      0,
      gate(code64_r1, LONG_SUPER_CODE + 0x80, 0xec),  // 100
      0,
      segment(LONG_TSS2, 0x2b, 0x81, 0),  // a 16-bit TSS, gates that long mode has not
      0,
      gate(code64_r0, LONG_SUPER_CODE + 0x80, 0xe4),  // 120
      0,
      gate(tss2, 0, 0xe5),
      0,
      segment(0, 0x3ff, 0xf6, 0x4),  // 140: expand-down
      segment(0, 0xfffff, 0xfa, 0x8),
      segment(0, 0xfffff, 0xf2, 0xc),
      segment(0, 0xfffff, 0xfe, 0xc),
      gate(code32_r3, LONG_USER_CODE + 0x80, 0xec),  // 160: of compatibility mode
      0,
      0,
      0x1f00ull << 32,
  };
  for (unsigned i = 0; i < gdt_slots; ++i) set(LONG_GDT + 8 * i, gdt[i]);
  for (unsigned i = 1; i < 4; ++i) set(LONG_LDT + 8 * i, gdt[i == 1 ? 5 : i == 2 ? 4 : 3]);

  const auto stack = [&](u32 table, u32 offset, u64 top) { put<u64>(table + offset, top); };
  for (u32 table : {LONG_TSS, LONG_TSS2}) {
    stack(table, 4, LONG_RSP0), stack(table, 12, LONG_RSP1), stack(table, 20, LONG_RSP1 - 0x100);
    stack(table, 0x24, LONG_IST1), stack(table, 0x2c, LONG_IST2), stack(table, 0x34, LONG_IST3);
    stack(table, 0x3c, LONG_IST3 - 5), stack(table, 0x44, 0x8000000000000000), stack(table, 0x4c, window + 0x800);
    stack(table, 0x54, LONG_USER_STACK);
    put<u16>(table + 0x66, 0x68);
  }
  for (u32 vector = 0; vector < LONG_VECTORS; ++vector) {
    const u32 stub = LONG_CODE + u32(long_stubs - long_code) + 16 * vector;
    const bool for_all = vector == 3 || vector == 4 || vector >= 0x40;
    set(LONG_IDT + 16 * vector, gate(code64_r0, stub, for_all ? 0xee : 0x8e, vector == 8 ? 2 : 1));
  }

  set(LONG_PML5, LONG_PML4 | entry_p | entry_w | entry_u | entry_a);
  set(LONG_PML4, LONG_PDPT | entry_p | entry_w | entry_u | entry_a);
  set(LONG_PDPT, LONG_PD | entry_p | entry_w | entry_u | entry_a);
  set(LONG_PD, LONG_PT | entry_p | entry_w | entry_u | entry_a);
  for (u64 i = 1; i < guest_ram >> 21; ++i)
    set(LONG_PD + 8 * i, i << 21 | entry_p | entry_w | entry_a | entry_d | entry_ps);
  for (u64 i = 0; i < 512; ++i)  // but video memory and ROMs
    set(LONG_PT + 8 * i, i >= 0xa0 && i < 0x100 ? 0 : i << 12 | entry_p | entry_w | entry_a | entry_d);
  for (u64 page : {LONG_USER_CODE, LONG_USER_STACK & ~0xfff})
    set(LONG_PT + page / 512, page | entry_p | entry_w | entry_u | entry_a | entry_d);

  constexpr u64 all = entry_p | entry_w | entry_u;
  set(LONG_PML4 + 8, LONG_WINDOW_PDPT | all);
  set(LONG_WINDOW_PDPT, LONG_WINDOW_PD | all);
  set(LONG_WINDOW_PDPT + 24, 3ull << 30 | entry_p | entry_w | entry_a | entry_d | entry_ps);  // the local APIC's
  set(LONG_WINDOW_PD, LONG_WINDOW_PT | all);
  set(LONG_WINDOW_PD + 8, LONG_WINDOW_PT2 | all);
  for (u64 i = 0; i < 8; ++i) set(LONG_WINDOW_PT + 8 * i, (LONG_FRAMES + (i & 3) * 0x1000) | all);
  for (u64 i = 0; i < 4; ++i) set(LONG_WINDOW_PT2 + 8 * i, (LONG_FRAMES + i * 0x1000) | all);
  std::memset(&memory_[LONG_FRAMES], 0xcc, 0x4000);
  for (unsigned i = 0; i < 4; ++i) {
    set(LONG_FRAMES + 0x1000 * i + 0x200, segment(0, 0xfffff, 0xf2, 0xc));
    set(LONG_FRAMES + 0x1000 * i + 0x208, segment(0, 0xfffff, 0xfa, 0xc));
  }
  std::memset(&memory_[LONG_USER_CODE], 0xcc, LONG_SUPER_DATA + 0x1000 - LONG_USER_CODE);

  const u64 msrs[][2] = {{0xc0000080, 0xd01},
                         {0xc0000081, 0x0018'0008'00000000},
                         {0xc0000082, LONG_SUPER_CODE + 0x80},
                         {0xc0000083, LONG_SUPER_CODE + 0x90},
                         {0xc0000084, 0x47700},
                         {0xc0000100, 0x1000},
                         {0xc0000101, 0x2000},
                         {0xc0000102, 0x3000},
                         {0x174, 0x08},
                         {0x175, LONG_RSP0},
                         {0x176, LONG_SUPER_CODE + 0xa0}};
  set(LONG_MSRS, std::size(msrs));
  for (unsigned i = 0; i < std::size(msrs); ++i)
    set(LONG_MSRS + 8 + 16 * i, msrs[i][0]), set(LONG_MSRS + 16 + 16 * i, msrs[i][1]);
}

}  // namespace anykvm::oracle
