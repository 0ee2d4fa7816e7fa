#include "oracle/legacy_guest.h"

#include <cstdio>
#include <cstring>

#include "oracle/generator.h"
#include "oracle/monitor.h"

extern "C" const anykvm::u8 monitor_boot[], monitor_boot_end[], monitor_code[], monitor_code_end[], monitor_stubs[];

namespace anykvm::oracle {
namespace {

enum Selector : u16 {
  code_r0 = 0x08,
  data_r0 = 0x10,
  code_r3 = 0x1b,
  data_r3 = 0x23,
  tss_main = 0x28,
  tss_df = 0x30,
  tss_a = 0x38,
  tss_b = 0x40,
  gate_a = 0x48,
  gate_b = 0x50,
  call32 = 0x58,
  call16 = 0x60,
  ldt = 0x68,
  code16_r0 = 0x70,
  data16_r0 = 0x78,
  code16_r3 = 0x83,
  data16_r3 = 0x8b,
  conforming = 0x90,
  code_r1 = 0xc9,
  data_r1 = 0xd1,
};
constexpr u32 landing = MONITOR_TEST_CODE + 0x80, landing_a = MONITOR_TEST_CODE + 0xa0,
              landing_b = MONITOR_TEST_CODE + 0xb0, pointer = MONITOR_TEST_CODE + 0xc0;
constexpr unsigned gdt_slots = MONITOR_GDT_SIZE / 8, first_free_slot = 7;

class LegacyGenerator : public Generator {
 public:
  explicit LegacyGenerator(u64 seed) : Generator(seed) {
    std::memset(&memory_[0], 0xcc, MONITOR_BOOT);
    std::memcpy(&memory_[MONITOR_BOOT], monitor_boot, monitor_boot_end - monitor_boot);
    std::memcpy(&memory_[MONITOR_CODE], monitor_code, monitor_code_end - monitor_code);
    tables();
    std::memcpy(&memory_[MONITOR_PRISTINE], &memory_[MONITOR_TABLES], MONITOR_TABLES_SIZE);
  }

  void begin(unsigned index) {
    at_ = MONITOR_TESTS + index * MONITOR_TEST_SIZE;
    put<u32>(MONITOR_COUNT, index + 1);
    std::memset(&memory_[at_ + TEST_CODE], 0xcc, TEST_CODE_SIZE);
    code_ = at_ + TEST_CODE;
    patches_ = 0;
    put<u32>(at_ + TEST_CR0, 0x31);
    for (unsigned i = 0; i < 7; ++i) put<u32>(at_ + TEST_GPR + 4 * i, u32(random_()));
  }

  void add_test(unsigned index) {
    begin(index);
    put<u32>(at_ + TEST_GPR + 4, 0xbe00);  // ecx, edx: of SYSEXIT
    put<u32>(at_ + TEST_GPR + 8, landing);
    start_mode();
    if (below(2)) put<u32>(at_ + TEST_CR4, below(2) ? 4 : 8);
    for (unsigned n = below(3); n-- > 0;) mutate_descriptor();
    if (below(3) == 0) mutate_task();
    for (u32 vector = 0x50; vector < 0x54; ++vector) {
      static constexpr u8 types[] = {5, 6, 7, 14, 15, 14, 15, 12, 0};
      const u8 access = u8(types[below(9)] | below(4) << 5 | (below(10) ? 0x80 : 0));
      const u16 target = (access & 15) == 5 ? u16(v86_ || below(2) ? tss_a : tss_b)
                         : below(3)         ? u16(code_r0)
                                            : selector();
      patch64(MONITOR_IDT + 8 * vector, gate(target, landing, access));
    }
    for (unsigned n = 1 + below(3); n-- > 0;) instruction();
    put<u32>(at_ + TEST_PATCHES, patches_);
  }

  /// 32-bit and PAE paging.
  void add_paging_test(unsigned index) {
    begin(index);
    const bool pae = below(2), user = below(2);
    v86_ = code16_ = false;
    const u32 frame[] = {MONITOR_TEST_CODE, user ? code_r3 : code_r0, 2 | (below(3) ? 0 : 0x40000u),
                         user ? 0xbf00u : 0xae00u, user ? data_r3 : data_r0};
    for (unsigned i = 0; i < 5; ++i) put<u32>(at_ + TEST_FRAME + 4 * i, frame[i]);
    for (unsigned i = 0; i < 4; ++i) put<u32>(at_ + TEST_SEGMENTS + 4 * i, data_r3);
    // PSE, PGE; rarely SMEP, which keeps supervisors out of the test's page, and SMAP
    put<u32>(at_ + TEST_CR4, (pae ? 0x20 : 0) | (below(4) ? 0x10 : 0) | (below(2) ? 0x80 : 0) |
                                 (below(8) ? 0 : 0x100000) | (below(3) ? 0 : 0x200000));
    put<u32>(at_ + TEST_CR0, 0x80000031 | (below(2) ? 0x10000 : 0));
    const u32 cr3 = (pae ? PAGING_PAE_PDPT : PAGING_PD) | (below(4) ? 0 : 0x18);
    put<u32>(at_ + TEST_CR3, cr3);
    patch32(MONITOR_TSS_DF + 0x1c, cr3);
    put<u32>(at_ + TEST_EFER, below(3) ? 0x800 : 0);
    const auto entry = [&](u32 address, u64 base) {
      u64 value = base | 7;
      switch (below(7)) {
        case 0: value &= ~1ull; break;
        case 1: value &= ~2ull; break;
        case 2: value &= ~4ull; break;
        case 3: value = base | (random_() & 0xf7f); break;
        case 4: value |= pae ? 1ull << (40 + below(24)) : 0x18; break;
        case 5: value |= random_() & 0x60; break;
        default: break;
      }
      patch32(address, u32(value));
      if (pae) patch32(address + 4, u32(value >> 32));
    };
    const u32 table = pae ? PAGING_PAE_WINDOW_PT : PAGING_WINDOW_PT, size = pae ? 8 : 4;
    const u32 directory = pae ? PAGING_PAE_PD + 32 : PAGING_PD + 8;
    entry(directory, table);
    // A large page. Between its PAT bit and its address some bits are reserved.
    entry(directory + size, 0x80 | (below(8) ? 0 : 0x1000) | (below(6) ? 0 : 1u << (pae ? 13 + below(8) : 21)));
    for (u32 page = 0; page < 4; ++page) entry(table + size * page, PAGING_FRAMES + page * 0x1000);
    for (unsigned n = 1 + below(3); n-- > 0;) paging_access(pae);
    put<u32>(at_ + TEST_PATCHES, patches_);
  }

 private:
  void tables() {
    const u64 gdt[gdt_slots] = {
        0,
        segment(0, 0xfffff, 0x9b, 0xc),  // 08
        segment(0, 0xfffff, 0x93, 0xc),
        segment(0, 0xfffff, 0xfb, 0xc),
        segment(0, 0xfffff, 0xf3, 0xc),
        segment(MONITOR_TSS, 0x8f, 0x89, 0),  // 28
        segment(MONITOR_TSS_DF, 0x67, 0x89, 0),
        segment(MONITOR_TSS_A, 0x67, 0xe9, 0),
        segment(MONITOR_TSS_B, 0x2b, 0xe1, 0),  // 40
        gate(tss_a, 0, 0xe5),
        gate(tss_b, 0, 0xe5),
        gate(code_r0, landing, 0xec, 2),
        gate(code_r0, landing, 0xe4, 1),  // 60
        segment(MONITOR_LDT, 0x3f, 0x82, 0),
        segment(0, 0xffff, 0x9b, 0),
        segment(0, 0xffff, 0x93, 0),
        segment(0, 0xffff, 0xfb, 0),  // 80
        segment(0, 0xffff, 0xf3, 0),
        segment(0, 0xfffff, 0x9e, 0xc),
        segment(0, 0x7ff, 0xf6, 0x4),
        segment(0, 0xfffff, 0xf8, 0xc),  // a0: execute only
        segment(0, 0xfffff, 0xf0, 0xc),
        segment(0, 0xfffff, 0x73, 0xc),  // b0: absent
        segment(0, 0xfffff, 0x7b, 0xc),
        gate(code_r1, landing, 0xec),  // not conforming: TCG then gives CS the RPL of its DPL
                                       // c0
        segment(0, 0xfffff, 0xbb, 0xc),
        segment(0, 0xfffff, 0xb3, 0xc),
        gate(code_r1, landing, 0xec, 1),
        gate(code16_r0, landing, 0xec, 3),  // e0
        segment(0, 0xfffff, 0xf2, 0x5),
        segment(0, 0xfffff, 0xfe, 0x4),
        gate(code_r0, landing, 0x6c),
    };
    for (unsigned i = 0; i < gdt_slots; ++i) put<u64>(MONITOR_GDT + 8 * i, gdt[i]);
    const u64 local[8] = {0, gdt[1], gdt[2], gdt[3], gdt[4], gdt[12], gdt[19], gdt[27]};
    for (unsigned i = 0; i < 8; ++i) put<u64>(MONITOR_LDT + 8 * i, local[i]);
    for (u32 vector = 0; vector < MONITOR_VECTORS; ++vector) {
      const u32 stub = MONITOR_CODE + u32(monitor_stubs - monitor_code) + 16 * vector;
      const bool for_all = vector == 3 || vector == 4 || vector >= 0x40;
      put<u64>(MONITOR_IDT + 8 * vector, gate(code_r0, stub, for_all ? 0xee : 0x8e));
      if (vector == 8) {
        put<u64>(MONITOR_IDT + 8 * vector, gate(tss_df, 0, 0x85));
        task32(MONITOR_TSS_DF, stub, 0x9f00);
      }
    }
    task32(MONITOR_TSS, 0, 0);
    task32(MONITOR_TSS_A, landing_a, 0xac00);
    put<u16>(MONITOR_TSS_B + 2, 0xa600);
    put<u16>(MONITOR_TSS_B + 4, data_r0);
    put<u16>(MONITOR_TSS_B + 0x0e, u16(landing_b));
    put<u16>(MONITOR_TSS_B + 0x10, 2);
    for (unsigned i = 0; i < 8; ++i) put<u16>(MONITOR_TSS_B + 0x12 + 2 * i, i == 4 ? 0xad00 : u16(0x1111 * i));
    for (unsigned i = 0; i < 4; ++i) put<u16>(MONITOR_TSS_B + 0x22 + 2 * i, i == 1 ? code_r0 : data_r0);
    std::memset(&memory_[0x9000], 0xcc, MONITOR_TEST_CODE + 0x1000 - 0x9000);
    paging_tables();
  }

  void paging_tables() {
    const auto user = [](u32 page) { return page == 0xb || page == MONITOR_TEST_CODE / 0x1000 ? 4u : 0u; };
    put<u32>(PAGING_PD, PAGING_PT | 7);
    for (u32 page = 0; page < 1024; ++page) put<u32>(PAGING_PT + 4 * page, page << 12 | 0x63 | user(page));
    for (u32 i = 0; i < 4; ++i) put<u64>(PAGING_PAE_PDPT + 8 * i, i ? 0 : PAGING_PAE_PD | 1);
    for (u32 i = 0; i < 2; ++i) put<u64>(PAGING_PAE_PD + 8 * i, (PAGING_PAE_PT + 0x1000 * i) | 7);
    for (u32 page = 0; page < 1024; ++page) put<u64>(PAGING_PAE_PT + 8 * page, page << 12 | 0x63 | user(page));
    std::memset(&memory_[PAGING_FRAMES], 0xcc, 0x4000);
  }

  void task32(u32 tss, u32 eip, u32 esp) {
    const u32 stacks[6] = {0xa800, data_r0, 0xa400, data_r1, 0xa200, data_r0};
    for (unsigned i = 0; i < 6; ++i) put<u32>(tss + 4 + 4 * i, stacks[i]);
    put<u32>(tss + 0x20, eip);
    put<u32>(tss + 0x24, 2);
    for (unsigned i = 0; i < 8; ++i) put<u32>(tss + 0x28 + 4 * i, i == 4 ? esp : 0x11111111 * i);
    for (unsigned i = 0; i < 6; ++i) put<u32>(tss + 0x48 + 4 * i, i == 1 ? code_r0 : data_r0);
    put<u16>(tss + 0x66, 0x68);
  }

  u16 selector() {
    if (below(8) == 0) return u16(below(9) << 3 | 4 | below(4));
    return u16(below(gdt_slots + 1) << 3 | below(4));
  }

  void patch32(u32 address, u32 value) {
    if (patches_ == 16) return;
    put<u32>(at_ + TEST_PATCH + 8 * patches_, address);
    put<u32>(at_ + TEST_PATCH + 8 * patches_ + 4, value);
    ++patches_;
  }
  void patch64(u32 address, u64 value) {
    patch32(address, u32(value));
    patch32(address + 4, u32(value >> 32));
  }

  /// Type, DPL, presence and the size bits of a descriptor that the monitor does not need.
  void mutate_descriptor() {
    const u32 slot = first_free_slot + below(gdt_slots - first_free_slot);
    for (u16 needed :
         {u16(ldt), u16(code16_r0), u16(data16_r0), u16(code16_r3), u16(data16_r3), u16(code_r1), u16(data_r1)})
      if (slot == needed / 8u) return;  // tests start in them; TCG checks no limits and types of accesses
    const u32 address = MONITOR_GDT + 8 * slot + 4;
    u32 high;
    std::memcpy(&high, &memory_[address], 4);
    const u32 before = high;
    high ^= 1u << (8 + below(8));
    // (Of a gate they are the target's offset, which would lead into the log.)
    if (below(4) == 0 && address >= MONITOR_GDT + 0xd8 && high & 0x1000) high ^= 1u << (22 + below(2));
    if (below(4) == 0) high = (high & ~0xf00u) | below(16) << 8;
    high = (high & ~0x1000u) | (before & 0x1000);                          // a gate's bytes make no sensible segment
    if ((high & 0x1c00) == 0x1400 && (before & 0x1c00) != 0x1400) return;  // expand-down: TCG checks no limits
    const bool makes_task = (high & 0x1500) == 0x100, was_task = slot == tss_a / 8 || slot == tss_b / 8;
    if (makes_task && (!was_task || (high ^ before) & 0x800)) return;  // its TSS would lie anywhere
    patch32(address, high);
  }

  void mutate_task() {
    // The segments stay good: TCG reports a bad one with the old task's EIP, and a bad LDT, CS or SS leaves a new task
    // without a stack to report it on, which TCG does not mind.
    switch (1 + below(4)) {
      case 1: patch32(MONITOR_TSS_A + 0x60, below(2) ? u16(ldt) : 0); break;
      case 2:
        patch32(MONITOR_TSS_A + 0x24, 2 | (below(2) ? 0x20000 : 0) | below(4) << 12 | (u32(random_()) & 0x4cd5));
        break;
      case 3: patch32(MONITOR_TSS_B + 0x28, data_r0 | u32(ldt) << 16); break;
      default: patch32(MONITOR_TSS + 8 + 8 * below(2), selector()); break;
    }
  }

  void start_mode() {
    struct Mode {
      u16 cs, ss;
      u32 esp;
      bool code16;
    };
    static constexpr Mode modes[] = {{code_r0, data_r0, 0xae00, false},    {code_r3, data_r3, 0xbf00, false},
                                     {code16_r0, data16_r0, 0xae00, true}, {code16_r3, data16_r3, 0xbf00, true},
                                     {code_r1, data_r1, 0xbf00, false},    {0x0c00, 0x0b00, 0x0f00, true}};
    const unsigned which = below(6);
    const Mode& mode = modes[which];
    v86_ = which == 5;
    code16_ = mode.code16;
    const u32 flags =
        2 | below(4) << 12 | (u32(random_()) & 0xcd5) | (below(16) == 0 ? 0x4000 : 0) | (v86_ ? 0x20000 : 0);
    const u32 frame[] = {v86_ ? 0u : u32(MONITOR_TEST_CODE), mode.cs, flags, mode.esp, mode.ss};
    for (unsigned i = 0; i < 5; ++i) put<u32>(at_ + TEST_FRAME + 4 * i, frame[i]);
    for (unsigned i = 0; i < 4; ++i) {
      put<u32>(at_ + TEST_FRAME + 20 + 4 * i, 0x100 * i);
      const u16 data[] = {data_r0, data_r3, 0, data16_r3};
      put<u32>(at_ + TEST_SEGMENTS + 4 * i, data[below(4)]);
    }
  }

  // --- instructions -------------------------------------------------------------------------------------------------
  void byte(u32 value) { put<u8>(code_++, u8(value)); }
  void word(u32 value) { put<u16>(code_, u16(value)), code_ += 2; }
  void dword(u32 value) { put<u32>(code_, value), code_ += 4; }
  /// Starts an instruction of 16 or 32 bits and says which.
  bool wide() { return wide(below(4) != 0 ? !code16_ : code16_); }
  bool wide(bool is_wide) {
    if (is_wide == code16_) byte(0x66);
    return is_wide;
  }
  void immediate(bool is_wide, u32 value) { is_wide ? dword(value) : word(value); }
  void push(bool is_wide, u32 value) {
    wide(is_wide);
    byte(0x68);
    immediate(is_wide, value);
  }
  void load_eax(u32 value) {
    const bool is_wide = wide(true);
    byte(0xb8);
    immediate(is_wide, value);
  }
  u32 target() { return v86_ ? 0x80 : landing; }
  u16 code_selector() {
    static constexpr u16 likely[] = {code_r0, code_r3, code16_r0, code16_r3, conforming, conforming | 3,
                                     code_r1, tss_a,   tss_b,     gate_a,    gate_b,     call32,
                                     call16,  0xc0,    0xd8,      0xe0,      0xc3,       0x5b};
    if (v86_) return 0x0c00;
    return below(4) ? likely[below(18)] : selector();
  }
  u32 flags_image() { return 2 | (u32(random_()) & 0x044dd5 & ~(below(4) ? 0x4100u : 0)) | below(4) << 12; }

  void paging_access(bool pae) {
    // A jump leads to 256 bytes of a page that nothing is stored to: code made of what tests leave behind would have
    // flags that the manuals do not define.
    constexpr u32 only_code = 0xd00;
    const u32 kind = below(10), wide = below(2);
    const bool jumps = kind == 5;
    u32 offset = below(3) ? below(0x1000) & ~3u : below(2) ? 0xffd + below(3) : below(16);
    if (jumps)
      offset = only_code + (offset & 0xff);
    else if (offset > only_code - 0x40 && offset < only_code + 0x140)  // pushes go down
      offset -= 0x400;
    u32 address = PAGING_WINDOW + below(5) * 0x1000 + offset;
    if (below(4) == 0) address = (pae ? 0xa00000 : 0xc00000) + PAGING_FRAMES + (offset & 0xffc);
    if (below(8) == 0) address = (below(2) ? 0xb000 : 0x9000) + (jumps ? only_code : 0x10);
    load_eax(address);
    switch (kind) {
      case 0:
      case 1: byte(0x8a + wide), byte(0x08); break;
      case 2:
      case 3: byte(0x88 + wide), byte(0x08); break;
      case 4: byte(wide), byte(0x08); break;
      case 5: byte(0xff), byte(wide ? 0xe0 : 0xd0); break;
      case 6: wide ? word(0x30ff) : word(0x008f); break;
      case 7: {                                                                   // a stack there
        static constexpr u8 uses[] = {0x50, 0x58, 0xc3, 0x9c, 0xc9, 0x61, 0x51};  // not PUSHA, which TCG does upwards
        word(0xc489), byte(uses[below(7)]);
        break;
      }
      case 8: byte(0x0f), byte(0x01), byte(0x38); break;  // INVLPG
      default: byte(0x0f), byte(0xc0 + wide), byte(0x08); break;
    }
  }

  void instruction() {
    switch (below(20)) {
      case 0: {  // JMP, CALL far
        const bool w = wide();
        byte(below(2) ? 0xea : 0x9a);
        immediate(w, target());
        word(code_selector());
        break;
      }
      case 1: {
        static constexpr u16 stacks[] = {data_r0, data_r3, data16_r3, data_r1, 0, 0x99};
        const bool w = below(2), is_iret = below(2);
        push(w, below(3) ? stacks[below(6)] : selector());
        push(w, 0xbe00);
        if (is_iret) push(w, flags_image());
        push(w, code_selector());
        push(w, target());
        wide(w);
        if (is_iret) {
          byte(0xcf);
        } else if (below(2)) {
          byte(0xcb);
        } else {
          byte(0xca);
          word(below(3) * 4);
        }
        break;
      }
      case 2:
      case 3:
        load_eax(selector());
        byte(0x8e);
        byte(0xc0 | below(6) << 3);
        break;
      case 4: {
        const bool w = below(2);
        push(w, selector());
        wide(w);
        static constexpr u16 pops[] = {0x07, 0x1f, 0x17, 0xa10f, 0xa90f};
        const u16 opcode = pops[below(5)];
        opcode > 0xff ? word(opcode) : byte(opcode);
        break;
      }
      case 5:
      case 6: {  // LLDT, LTR, VERR, VERW, SLDT, STR
        const unsigned which = below(6);
        const u16 operand = below(3) ? u16(below(2) ? ldt : tss_a) : selector();
        load_eax(which == 3 && operand < 4 ? u16(tss_a) : operand);  // TCG takes a null selector for LTR
        word(0x000f);
        byte(0xc0 | which << 3);
        break;
      }
      case 7:
      case 8:  // LAR, LSL
        load_eax(selector());
        wide();
        byte(0x0f);
        byte(0x02 + below(2));
        byte(0xc8);
        break;
      case 9:  // SMSW, LMSW
        load_eax(u32(random_()) & 0xffff000f);
        wide();
        word(0x010f);
        byte(below(2) ? 0xe0 : 0xf0);
        break;
      case 10: load_eax(selector()), byte(0x63), byte(0xc8); break;  // ARPL
      case 11:
      case 12: byte(0xcd), byte(0x50 + below(4)); break;
      case 13: {
        static constexpr u8 plain[] = {0xce, 0xfa, 0xfb, 0xf4};
        const u8 opcode = plain[below(4)];
        // A HLT at CPL 0 would not come back.
        byte(opcode == 0xf4 && (at_frame(4) & 3) == 0 && !v86_ ? 0xfa : opcode);
        break;
      }
      case 14: wide(), byte(0x9c); break;
      case 15: {
        const bool w = below(2);
        push(w, flags_image());
        wide(w);
        byte(0x9d);
        break;
      }
      case 16: {
        static constexpr u16 two[] = {0x060f, 0x340f, 0x350f, 0x0b0f, 0x080f};
        word(two[below(5)]);
        break;
      }
      case 17:  // MOV to and from control and debug registers: only reads where they are allowed
        byte(0x0f);
        byte(0x20 + below(2));
        byte(0xc0 | (below(2) ? 0 : 2 + below(2)) << 3);
        break;
      case 18: byte(0xe6), byte(0x80); break;
      default:  // LES, LDS, LSS, LFS, LGS
      {
        static constexpr u16 loads[] = {0xc4, 0xc5, 0xb20f, 0xb40f, 0xb50f};
        byte(0x2e);  // by CS: TCG does not mind a null DS
        const bool w = wide();
        const u16 opcode = loads[below(5)];
        opcode > 0xff ? word(opcode) : byte(opcode);
        // Into EBP: EDX is where SYSEXIT goes.
        code16_ ? (byte(0x2e), word(v86_ ? 0xc0 : pointer)) : (byte(0x2d), dword(pointer));
        put<u32>(at_ + TEST_CODE + 0xc0, w ? 0x12345678 : u32(selector()) << 16 | 0x5678);
        put<u16>(at_ + TEST_CODE + 0xc4, selector());
      } break;
    }
  }
  u32 at_frame(unsigned offset) {
    u32 value;
    std::memcpy(&value, &memory_[at_ + TEST_FRAME + offset], 4);
    return value;
  }

  u32 code_ = 0;
  bool v86_ = false, code16_ = false;
};

constexpr Field log_fields[] = {
    {"esp", 0, 4},
    {"ss", 4, 4},
    {"cr0", 8, 4},
    {"cr4", 12, 4},
    {"cr2", 16, 4},
    {"dr6", 20, 4},
    {"tr", 24, 4},
    {"ldtr", 28, 4},
    {"gs", 32, 4},
    {"fs", 36, 4},
    {"es", 40, 4},
    {"ds", 44, 4},
    {"edi", 48, 4},
    {"esi", 52, 4},
    {"ebp", 56, 4},
    {"esp'", 60, 4},
    {"ebx", 64, 4},
    {"edx", 68, 4},
    {"ecx", 72, 4},
    {"eax", 76, 4},
    {"vector", 80, 4},
    {"frame", 84, 4, 11},
    {"gdt", 128, 4, MONITOR_GDT_SIZE / 4},
    {"ldt", 128 + MONITOR_GDT_SIZE, 4, 16},
    {"tss", 192 + MONITOR_GDT_SIZE, 4, 0x100},
    {"pde", LOG_PAGING, 4, 2},
    {"pte", LOG_PAGING + 8, 4, 8},
    {"pae pde", LOG_PAGING + 40, 8, 2},
    {"pae pte", LOG_PAGING + 56, 8, 8},
    {"page", LOG_PAGING + 120, 4, 8},
};

}  // namespace

LegacyGuest::LegacyGuest(u64 seed, unsigned count, LegacySubject subject)
    : Guest({.tests = MONITOR_TESTS,
             .test_size = MONITOR_TEST_SIZE,
             .code = TEST_CODE,
             .code_size = TEST_CODE_SIZE,
             .counts = {TEST_PATCHES, TEST_PATCHES},
             .vector = 80,
             .frame = 84,
             .word = 4}) {
  LegacyGenerator generator(seed);
  for (unsigned i = 0; i < count; ++i)
    subject == LegacySubject::paging ? generator.add_paging_test(i) : generator.add_test(i);
  image = generator.take();
  cpuid.assign(x86::supported_cpuid().begin(), x86::supported_cpuid().end());
  for (kvm_cpuid_entry2& e : cpuid)
    if (e.function == 0x80000008) e.eax = (e.eax & ~0xffu) | 40;  // as QEMU's
  tests = count;
  log = MONITOR_LOG;
  log_size = MONITOR_LOG_SIZE;
  fields = log_fields;
}

u64 LegacyGuest::offset_in_code(u64, u64 rip) const {
  return rip >= MONITOR_TEST_CODE ? rip - MONITOR_TEST_CODE : rip;  // flat, where virtual-8086 code starts at 0
}

std::string LegacyGuest::describe(unsigned test) const {
  const u32 at = MONITOR_TESTS + test * MONITOR_TEST_SIZE;
  const auto word = [&](u32 offset) { return get<u32>(image, at + offset); };
  char line[160];
  std::snprintf(line, sizeof line, "  cs %x eip %x eflags %x ss %x esp %x cr4 %x cr0 %x cr3 %x efer %x\n",
                word(TEST_FRAME + 4), word(TEST_FRAME), word(TEST_FRAME + 8), word(TEST_FRAME + 16),
                word(TEST_FRAME + 12), word(TEST_CR4), word(TEST_CR0), word(TEST_CR3), word(TEST_EFER));
  std::string text = line;
  const u32 code = word(TEST_FRAME + 4);
  const bool is_16_bit = word(TEST_FRAME + 8) & 0x20000 || code == code16_r0 || code == code16_r3;
  text += disassemble(std::span(image).subspan(at + TEST_CODE, 0x60), MONITOR_TEST_CODE, is_16_bit ? 16 : 32);
  for (unsigned i = 0; i < word(TEST_PATCHES); ++i) {
    std::snprintf(line, sizeof line, "  patch %x: %08x\n", word(TEST_PATCH + 8 * i), word(TEST_PATCH + 8 * i + 4));
    text += line;
  }
  return text;
}

}  // namespace anykvm::oracle
