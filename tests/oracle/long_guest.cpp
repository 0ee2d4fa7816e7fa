#include "oracle/long_guest.h"

#include <cstdio>
#include <cstring>
#include <random>

#include "oracle/emitter.h"
#include "oracle/long_monitor.h"

extern "C" const anykvm::u8 long_boot[], long_boot_end[], long_code[], long_code_end[], long_stubs[];

namespace anykvm::oracle {
namespace {

enum Selector : u16 {
  code64_r0 = 0x08,
  data_r0 = 0x10,
  code32_r3 = 0x1b,
  data_r3 = 0x23,
  code64_r3 = 0x2b,
  tss = 0x38,
  ldt = 0x48,
  code32_r0 = 0x58,
  code16_r3 = 0x63,
  data16_r3 = 0x6b,
  code64_r1 = 0x71,
  data_r1 = 0x79,
  gate_r0 = 0x80,
  gate_r3 = 0x90,
  gate_conforming = 0xa0,
  conforming64 = 0xb0,
  conforming32 = 0xb8,
  tss2 = 0xc0,
  ldt2 = 0xf0,
  gate_r1 = 0x100,
};
constexpr unsigned gdt_slots = (LONG_GDT_LIMIT + 1) / 8;
constexpr u64 window = 1ull << 39;
constexpr u64 entry_p = 1, entry_w = 2, entry_u = 4, entry_a = 32, entry_d = 64, entry_ps = 128, entry_g = 256,
              entry_nx = 1ull << 63;

u64 segment(u32 base, u32 limit, u8 access, u8 flags) {
  return (limit & 0xffff) | u64(base & 0xffffff) << 16 | u64(access) << 40 | u64(limit >> 16 & 15) << 48 |
         u64(flags) << 52 | u64(base >> 24) << 56;
}
u64 gate(u16 selector, u32 offset, u8 access, u8 ist = 0) {
  return (offset & 0xffff) | u64(selector) << 16 | u64(ist) << 32 | u64(access) << 40 | u64(offset >> 16) << 48;
}

class Generator {
 public:
  Generator(u64 seed, Subject subject, bool five_levels, bool intel)
      : random_(seed * 64 + unsigned(subject) * 4 + five_levels * 2 + intel), subject_(subject), intel_(intel) {
    // What is not anything else ends whoever runs there.
    memory_.resize(guest_ram, 0xcc);
    std::memset(&memory_[LONG_TABLES], 0, LONG_TABLES_SIZE);
    std::memset(&memory_[LONG_TESTS], 0, guest_ram - LONG_TESTS);
    std::memcpy(&memory_[LONG_BOOT], long_boot, std::size_t(long_boot_end - long_boot));
    std::memcpy(&memory_[LONG_CODE], long_code, std::size_t(long_code_end - long_code));
    boot_cr4_ = 0x20 | (five_levels ? 0x1000 : 0);
    set(LONG_CR4, boot_cr4_);
    set(LONG_CR3, five_levels ? LONG_PML5 : LONG_PML4);
    tables();
    std::memcpy(&memory_[LONG_PRISTINE], &memory_[LONG_TABLES], LONG_TABLES_SIZE);
  }

  void add_test(unsigned index) {
    at_ = LONG_TESTS + index * LONG_TEST_SIZE;
    set(LONG_COUNT, index + 1);
    patches_ = msrs_ = 0;
    far_pointer_used_ = frame_used_ = false;
    std::memset(&memory_[at_ + LONG_TEST_CODE], 0xcc, LONG_TEST_CODE_SIZE);
    for (unsigned i = 0; i < 16; ++i) set(at_ + LONG_TEST_GPR + 8 * i, random_());
    set(at_ + LONG_TEST_CR0, 0x80010031);
    set(at_ + LONG_TEST_CR4, boot_cr4_);
    set(at_ + LONG_TEST_DR7, 0x400);
    start_mode();
    Emitter code({&memory_[at_ + LONG_TEST_CODE], 0x80}, bits_);
    switch (subject_) {
      case Subject::transfers:
        mutate_descriptors();
        test_gates();
        for (unsigned n = 1 + below(3); n-- > 0;) transfer(code);
        break;
      case Subject::registers:
        control_bits();
        if (below(3) == 0) mutate_descriptors();
        for (unsigned n = 1 + below(4); n-- > 0;) register_instruction(code);
        break;
      case Subject::paging:
        control_bits();
        window_tables();
        for (unsigned n = 1 + below(3); n-- > 0;) access(code);
        break;
      case Subject::debugging:
        breakpoints();
        if (below(2)) window_tables();
        for (unsigned n = 2 + below(4); n-- > 0;) debugged(code);
        break;
      case Subject::nmis:
        nmi_handlers();
        for (unsigned n = 2 + below(4); n-- > 0;) around_nmis(code);
        break;
      default:
        broken_delivery();
        for (unsigned n = 1 + below(2); n-- > 0;) faulting(code);
        break;
    }
    set(at_ + LONG_TEST_PATCHES, patches_);
    set(at_ + LONG_TEST_MSRS, msrs_);
  }

  Memory take() { return std::move(memory_); }

 private:
  // --- the guest
  // ------------------------------------------------------------------------------------------------------
  void set(u64 address, u64 value) { put<u64>(memory_, address, value); }
  u32 below(u32 n) { return u32(random_() % n); }
  template <class T, std::size_t n>
  T any_of(const T (&list)[n]) {
    return list[below(n)];
  }

  void tables() {
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

    const auto stack = [&](u32 table, u32 offset, u64 top) { put<u64>(memory_, table + offset, top); };
    for (u32 table : {LONG_TSS, LONG_TSS2}) {
      stack(table, 4, LONG_RSP0), stack(table, 12, LONG_RSP1), stack(table, 20, LONG_RSP1 - 0x100);
      stack(table, 0x24, LONG_IST1), stack(table, 0x2c, LONG_IST2), stack(table, 0x34, LONG_IST3);
      stack(table, 0x3c, LONG_IST3 - 5), stack(table, 0x44, 0x8000000000000000), stack(table, 0x4c, window + 0x800);
      stack(table, 0x54, LONG_USER_STACK);
      put<u16>(memory_, table + 0x66, 0x68);
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

  // --- a test's input
  // -------------------------------------------------------------------------------------------------
  void patch(u64 address, u64 value) {
    if (patches_ == 24) return;
    set(at_ + LONG_TEST_PATCHES + 8 + 16 * patches_, address);
    set(at_ + LONG_TEST_PATCHES + 16 + 16 * patches_, value);
    ++patches_;
  }
  void msr(u32 index, u64 value) {
    if (msrs_ == 6) return;
    set(at_ + LONG_TEST_MSRS + 8 + 16 * msrs_, index);
    set(at_ + LONG_TEST_MSRS + 16 + 16 * msrs_, value);
    ++msrs_;
  }
  u64 pristine(u64 address) const { return get<u64>(memory_, address); }

  void start_mode() {
    struct Mode {
      u16 cs, ss;
      u8 bits;
      u64 rip, rsp;
    };
    static constexpr Mode modes[] = {{code64_r0, data_r0, 64, LONG_SUPER_CODE, LONG_SUPER_DATA + 0x800},
                                     {code64_r0, 0, 64, LONG_SUPER_CODE, LONG_SUPER_DATA + 0x800},
                                     {code64_r3, data_r3, 64, LONG_USER_CODE, LONG_USER_STACK},
                                     {code32_r3, data_r3, 32, LONG_USER_CODE, LONG_USER_STACK},
                                     {code16_r3, data16_r3, 16, LONG_USER_CODE - 0x10000, LONG_USER_STACK - 0x10000},
                                     {code64_r1, data_r1, 64, LONG_SUPER_CODE, LONG_SUPER_DATA + 0x800},
                                     {code32_r0, data_r0, 32, LONG_SUPER_CODE, LONG_SUPER_DATA + 0x800}};
    const unsigned which = subject_ == Subject::nmis ? below(2) * 2 : below(10);
    const bool crashes = which == 4 && subject_ == Subject::debugging;  // QEMU, by breakpoints in such code
    const Mode& mode = modes[crashes || which > 7 ? 2 : which == 7 ? 0 : which];
    bits_ = mode.bits;
    cpl_ = mode.cs & 3;
    base_ = mode.bits == 16 ? 0x10000 : 0;
    code_ = u32(mode.rip);
    rsp_ = mode.rsp;
    flags_ = 2 | below(4) << 12 | (u32(random_()) & 0xcd5 & ~0x100u) | (below(16) == 0 ? 0x4000 : 0) |
             (below(4) == 0 ? 0x40000 : 0);
    const u64 frame[] = {mode.rip, mode.cs, flags_, mode.rsp, mode.ss};
    for (unsigned i = 0; i < 5; ++i) set(at_ + LONG_TEST_FRAME + 8 * i, frame[i]);
    static constexpr u16 data[] = {data_r3, 0, data_r0, data16_r3, 3, data_r3};
    for (unsigned i = 0; i < 4; ++i) {
      u16 with = mode.bits == 64 ? any_of(data) : u16(data_r3);
      if (i >= 2 && with == data_r0 && cpl_) with = data_r3;  // TCG keeps the base of what the start takes away
      set(at_ + LONG_TEST_SEGMENTS + 8 * i, with);
    }
    if (mode.bits == 16)
      for (unsigned i = 0; i < 2; ++i) set(at_ + LONG_TEST_SEGMENTS + 8 * i, data16_r3);
    if (below(4) == 0) msr(0xc0000080, 0xd01 & ~(below(3) ? 1 : 0x800));
  }

  void control_bits() {
    // WP, TS, EM, MP (not AM: TCG has no #AC); TSD, DE, PGE, UMIP, FSGSBASE, SMEP, SMAP, PKE
    set(at_ + LONG_TEST_CR0, 0x80010031 ^ (random_() & (below(2) ? 0x10000 : 0x1000e)));
    u64 cr4 = boot_cr4_ | (random_() & 0x71088c);
    if (bits_ == 64 || cpl_ == 3) cr4 |= random_() & 0;
    set(at_ + LONG_TEST_CR4, cr4);
    set(at_ + LONG_TEST_PKRU, below(2) ? u32(random_()) & ~3u : 0);
  }

  u16 selector() {
    if (below(8) == 0) return u16(below(5) << 3 | 4 | below(4));
    return u16(below(gdt_slots + 1) << 3 | below(4));
  }
  u64 strange_address() {
    static constexpr u64 list[] = {0x0000800000000000, 0xffff7fffffffffff, 0x8000000000000000, 0x00007ffffffffff8,
                                   0xffff800000000000, 0x0100000000000000, 0x00fffffffffffff8, 0xff00000000000000,
                                   0x0001000000000000, 0x123456789abcdef0, 0x0000900000000000, 0xfffffffffffffff8};
    return any_of(list);
  }

  void mutate_descriptors() {
    for (unsigned n = below(3); n-- > 0;) {
      // The start's own and the monitor's stay.
      static constexpr u16 slots[] = {0x80, 0x90,  0xa0,  0xb0,  0xb8,  0xc0,  0xd0,  0xd8,  0xe0, 0xe8,
                                      0xf0, 0x100, 0x110, 0x120, 0x140, 0x148, 0x150, 0x158, 0x160};
      const u64 address = LONG_GDT + any_of(slots);
      u64 value = pristine(address);
      const bool is_segment = value >> 44 & 1;
      switch (below(4)) {
        case 0: value ^= 1ull << (40 + below(4)); break;
        case 1: value ^= 1ull << (45 + below(3)); break;
        case 2:
          if (is_segment) value ^= 1ull << (53 + below(2));
          break;
        default:
          if (is_segment)
            value ^= 1ull << any_of({40u, 41u, 42u, 43u, 45u, 46u, 47u});
          else
            patch(address + 8, below(2) ? 1ull << (40 + below(5)) : 0xffff8000);
          break;
      }
      if (!is_segment && value >> 44 & 1) continue;
      patch(address, value);
    }
  }

  u64 random_gate() {
    static constexpr u8 types[] = {14, 15, 14, 15, 14, 15, 12, 5, 6, 7, 0, 13};
    const u8 access = u8(any_of(types) | below(4) << 5 | (below(10) ? 0x80 : 0));
    static constexpr u16 targets[] = {code64_r0, code64_r0, conforming64, code64_r1, code64_r3, code32_r0};
    const u16 target = below(4) ? any_of(targets) : selector();
    const bool user = (target & ~7) == (code64_r3 & ~7);
    return gate(target, (user ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80, access, u8(below(2) ? 0 : below(8)));
  }
  void test_gates() {
    for (u32 vector = 0x50; vector < 0x54; ++vector) {
      patch(LONG_IDT + 16 * vector, random_gate());
      if (below(8) == 0) patch(LONG_IDT + 16 * vector + 8, random_() << 32);  // reserved bits
    }
    if (below(8) == 0) patch(LONG_TSS + 4 + 8 * below(2), below(2) ? strange_address() : LONG_RSP0 + below(16));
  }

  void window_tables() {
    constexpr u64 flags = entry_p | entry_w | entry_u | entry_a | entry_d | entry_g | 0xe00;
    const auto entry = [&](u64 address, u64 base, bool leaf) {
      u64 value = base | entry_p | entry_w | entry_u;
      switch (below(8)) {
        case 0: value &= ~entry_p; break;
        case 1: value &= ~entry_w; break;
        case 2: value &= ~entry_u; break;
        case 3: value |= entry_nx; break;
        case 4: value |= 1ull << (40 + below(23)); break;  // reserved, ignored, keys
        case 5: value = base | (random_() & flags); break;
        case 6: value |= random_() & (entry_a | entry_d | 0x18); break;
        default: break;
      }
      if (!intel_ && address < LONG_PDPT) value &= ~entry_g;  // which AMD's reserve there, and TCG does not know
      if (leaf && below(3) == 0) value |= (random_() & 15) << 59;
      patch(address, value);
    };
    if (below(3) == 0) entry(LONG_PML4 + 8, LONG_WINDOW_PDPT, false);
    if (below(16) == 0) patch(LONG_PML4 + 8, LONG_WINDOW_PDPT | 7 | (below(2) || !intel_ ? entry_ps : entry_g));
    if (below(3) == 0) entry(LONG_WINDOW_PDPT, LONG_WINDOW_PD, false);
    if (below(3) == 0)
      entry(LONG_WINDOW_PDPT + 8, entry_ps | (below(8) ? 0 : 1ull << (12 + below(18))), true);  // 1 GiB
    if (below(2) == 0) entry(LONG_WINDOW_PD, LONG_WINDOW_PT, false);
    if (below(3) == 0) entry(LONG_WINDOW_PD + 8, LONG_WINDOW_PT2, false);
    if (below(2) == 0) entry(LONG_WINDOW_PD + 16, entry_ps | (below(8) ? 0 : 1ull << (12 + below(9))), true);  // 2 MiB
    for (unsigned n = 2 + below(3); n-- > 0;) {
      const u64 page = below(8);
      entry(LONG_WINDOW_PT + 8 * page, LONG_FRAMES + (page & 3) * 0x1000, true);
    }
  }
  /// Where a jump may lead: 256 bytes of every page that nothing is stored to. Code made of what tests leave behind
  /// would have flags that the manuals do not define.
  static constexpr u64 only_code = 0xd00;
  u64 page_offset() {
    const u64 offset = below(3) ? below(0x1000) & ~7u : below(2) ? 0xff8 + below(8) : below(16);
    const bool close = offset > only_code - 0x40 && offset < only_code + 0x140;  // pushes go down
    return close ? offset - 0x400 : offset;
  }
  u64 window_address() {
    const u64 offset = page_offset();
    switch (below(8)) {
      case 0: return window + (1ull << 30) + LONG_FRAMES + below(4) * 0x1000 + (offset & 0xff8);
      case 1: return window + (2ull << 21) + LONG_FRAMES + below(4) * 0x1000 + (offset & 0xff8);
      case 2: return window + (1ull << 21) + below(4) * 0x1000 + offset;
      case 3: return below(4) ? window + below(8) * 0x1000 + offset : strange_address();
      default: return window + below(8) * 0x1000 + offset;
    }
  }
  /// An address that code of this mode can name.
  u64 data_address() {
    if (bits_ == 64 && below(4)) return window_address();
    static constexpr u32 places[] = {LONG_USER_STACK + 8, LONG_SUPER_DATA + 16, LONG_USER_CODE + 0xf8, LONG_FRAMES};
    return (bits_ == 16 ? places[below(3)] : any_of(places)) - base_ + below(8);
  }

  u64 jump_address() { return (data_address() & ~0xfffull) + only_code + below(0x100); }

  // --- instructions
  // -----------------------------------------------------------------------------------------------------
  u32 landing() const { return (cpl_ == 3 ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80; }
  u16 code_selector() {
    static constexpr u16 likely[] = {
        code64_r0,    code64_r3, code32_r3, code32_r0, code16_r3, conforming64, conforming64 | 3,
        conforming32, code64_r1, 0xd0,      0xd8,      0x0c,      0x0f,         0};
    return below(4) ? any_of(likely) : selector();
  }
  u64 target_of(u16 selector) {
    // No strange ones: TCG checks neither limits nor canonical form, and goes there.
    if ((selector & ~7) == (code16_r3 & ~7)) return LONG_USER_CODE + 0x80 - 0x10000;
    return ((selector & 3) == 3 ? LONG_USER_CODE : LONG_SUPER_CODE) + 0x80;
  }
  u64 flags_image() {
    u64 flags = 2 | (random_() & 0x244dd5 & ~(below(4) ? 0x4100ull : 0)) | below(4) << 12;
    if (below(8) == 0) flags |= 0x10000;
    return flags;  // never VM, which TCG obeys in long mode, too
  }
  /// Data of the test behind its landing, where its code can read it: the address.
  u32 data_room(unsigned offset) const { return code_ + 0xb0 + offset; }
  void put_data(unsigned offset, u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) put<u8>(memory_, at_ + LONG_TEST_CODE + 0xb0 + offset + i, u8(value >> 8 * i));
  }

  void far_pointer(Emitter& code) {
    if (far_pointer_used_) return;  // there is room for one
    far_pointer_used_ = true;
    const unsigned width = any_of({2u, 4u, 4u});  // m16:64 is Intel's only; our CPU does as the host
    static constexpr u16 gates[] = {gate_r0, gate_r3, gate_conforming, gate_r1, gate_r0 | 3,
                                    0x110,   0x120,   0x130,           0x160};
    const u16 to = below(3) ? code_selector() : any_of(gates);
    const u64 offset = target_of(to);
    if (bits_ != 64 && below(2)) {
      code.width(width).bytes({any_of({0xeau, 0x9au})}).value_of(offset, width).value_of(to, 2);
      return;
    }
    put_data(0x30, offset, width), put_data(0x30 + width, to, 2);
    code.width(width).bytes({0xff}).at(any_of({3u, 5u}), data_room(0x30));
  }
  void returns(Emitter& code) {
    if (frame_used_) return;
    frame_used_ = true;
    const unsigned width = bits_ == 64 ? any_of({8u, 8u, 4u, 2u}) : any_of({4u, 4u, 2u});
    const bool is_iret = below(2);
    static constexpr u16 stacks[] = {data_r0, data_r3, data16_r3, data_r1, 0, 1, 3, 0xe0, 0xe8};
    const u16 to = code_selector(), stack_selector = below(3) ? any_of(stacks) : selector();
    u64 stack_pointer = (to & 3) == 3 ? LONG_USER_STACK : LONG_SUPER_DATA + 0x800;
    if ((stack_selector & ~7) == (data16_r3 & ~7)) stack_pointer = LONG_USER_STACK - 0x10000;
    if (below(16) == 0) stack_pointer = strange_address();
    unsigned at = 0;
    const auto word = [&](u64 value) { put_data(at, value, width), at += width; };
    word(target_of(to)), word(to);
    if (is_iret) word(flags_image());
    const unsigned extra = is_iret || below(2) ? 0 : 8;
    at += extra;
    word(stack_pointer), word(stack_selector);
    if (bits_ == 16) {
      code.width(4).bytes({0xbc}).value_of(data_room(0) & 0xffff, 4);
    } else {
      code.load(4, data_room(0));
    }
    code.width(width);
    if (is_iret)
      code.bytes({0xcf});
    else if (extra)
      code.bytes({0xca, extra, 0});
    else
      code.bytes({0xcb});
  }

  void transfer(Emitter& code) {
    switch (below(14)) {
      case 0:
      case 1:
      case 2: far_pointer(code); break;
      case 3:
      case 4:
      case 5: returns(code); break;
      case 6: {  // SYSCALL and SYSENTER
        if (below(4) == 0) msr(0xc0000081, u64(selector()) << 48 | u64(selector()) << 32 | (random_() & 0xffff));
        if (below(4) == 0) msr(0x174, below(2) ? below(4) : 0x08 | below(4));
        code.bytes({0x0f, any_of({0x05u, 0x34u})});
        break;
      }
      case 7: {  // SYSRET, SYSEXIT
        const bool exits = below(2);
        const bool wide = bits_ == 64 && below(2);
        code.load(1, exits ? LONG_USER_STACK : below(8) ? LONG_USER_CODE + 0x80 : strange_address());
        code.load(2, below(8) ? LONG_USER_CODE + 0x80 : strange_address());
        if (!exits && bits_ == 64) code.bytes({0x49, 0xbb}).value_of(flags_image() & ~0x100ull, 8);
        if (wide) code.bytes({0x48});
        code.bytes({0x0f, exits ? 0x35u : 0x07u});
        break;
      }
      case 8:
      case 9:
      case 10: code.bytes({0xcd, 0x50 + below(4)}); break;
      case 11: code.bytes({any_of({0xccu, 0xceu, 0xfbu, 0xfau, 0x9cu})}); break;
      case 12: segment_load(code); break;
      default:
        code.width(bits_ == 64 ? 4 : 4).bytes({0x68}).value_of(u32(flags_image()) & ~0x100u, 4).bytes({0x9d});
        break;
    }
  }

  void segment_load(Emitter& code) {
    code.load(0, selector());
    switch (below(3)) {
      case 0: code.bytes({0x8e, 0xc0 | below(6) << 3}); break;
      case 1: code.bytes({0x50, 0x0f, any_of({0xa1u, 0xa9u})}); break;
      default:
        put_data(0x40, (below(2) ? 0x1234 : LONG_USER_CODE), 4), put_data(0x44, selector(), 2);
        code.width(4).bytes({0x0f, any_of({0xb2u, 0xb4u, 0xb5u})}).at(5, data_room(0x40));
        break;
    }
  }

  void register_instruction(Emitter& code) {
    switch (below(20)) {
      case 0: segment_load(code); break;
      case 1:
      case 2: {  // SLDT, STR, LLDT, LTR, VERR, VERW
        const unsigned which = below(6);
        static constexpr u16 tables[] = {ldt, ldt2, tss2, ldt2 | 3, tss, 0x110, 0x178};
        u16 operand = below(3) ? any_of(tables) : selector();
        if (which == 3 && operand < 4) operand = tss2;  // TCG takes a null selector for LTR
        code.load(0, operand);
        if (below(2)) code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u}));
        code.bytes({0x0f, 0x00, 0xc0 | which << 3});
        break;
      }
      case 3:
      case 4:  // LAR, LSL
        code.load(0, selector());
        code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u})).bytes({0x0f, any_of({2u, 3u}), 0xc8});
        break;
      case 5:  // SMSW, LMSW, CLTS
        code.load(0, random_() & 0xffff000f);
        if (below(3) == 0)
          code.bytes({0x0f, 0x06});
        else
          code.width(bits_ == 64 ? any_of({2u, 4u, 8u}) : any_of({2u, 4u})).bytes({0x0f, 0x01, any_of({0xe0u, 0xf0u})});
        break;
      case 6: code.bytes({0x0f, 0x20, 0xc0 | any_of({0u, 2u, 3u, 4u}) << 3}); break;
      case 7:  // MOV to CR0
        code.load(0, 0x80010031 ^ (random_() & 0x5000e)).bytes({0x0f, 0x22, 0xc0});
        break;
      case 8:  // MOV to CR2, CR4
        if (below(2))
          code.load(0, random_()).bytes({0x0f, 0x22, 0xd0});
        else
          code.load(0, boot_cr4_ | (random_() & 0x71088c)).bytes({0x0f, 0x22, 0xe0});
        break;
      case 9:  // CR8, CR3
        if (bits_ == 64 && below(2)) {
          code.load(0, below(16)).bytes({0x44, 0x0f, 0x22, 0xc0});
          code.bytes({0x44, 0x0f, 0x20, 0xc1});
        } else {
          code.load(0, pristine(LONG_CR3) | (below(2) ? 0x18 : 0)).bytes({0x0f, 0x22, 0xd8});
        }
        break;
      case 10: code.bytes({0x0f, 0x21, 0xc0 | below(8) << 3}); break;
      case 11: {
        const unsigned dr = any_of({0u, 1u, 2u, 3u, 4u, 6u, 6u});
        code.load(0, dr >= 4 ? u32(random_()) & ~0x1000u : random_()).bytes({0x0f, 0x23, 0xc0 | dr << 3});
        break;
      }
      case 12: {  // LGDT, LIDT, SGDT, SIDT
        if (below(2)) {
          code.bytes({0x0f, 0x01}).at(any_of({0u, 1u}), LONG_SUPER_DATA + 0x40 - base_);
          break;
        }
        if (frame_used_) break;
        frame_used_ = true;
        const bool idt = below(2);
        put_data(0, idt ? LONG_VECTORS * 16 - 1 + below(100) : LONG_GDT_LIMIT - below(0x80), 2);
        put_data(2, idt ? LONG_IDT : LONG_GDT, 8);
        code.bytes({0x0f, 0x01}).at(idt ? 3 : 2, data_room(0));
        break;
      }
      case 13:
      case 14: {  // RDMSR, WRMSR
        static constexpr u32 list[] = {0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100, 0xc0000101,
                                       0xc0000102, 0x174,      0x175,      0x176,      0xc0000103, 0xc0000080};
        const u32 index = any_of(list);
        u64 value = below(2) ? random_() & 0x7fffffff : u64(s64(random_()) >> 17);
        if (index == 0x174) value &= 0xffff;
        if (index == 0xc0000103 || index == 0xc0000084) value &= 0x7fffffff;
        if (index == 0x176 || index == 0x175) value &= 0x7fffffff;
        if (index == 0xc0000080) value = 0x500 | (random_() & 0x801);
        code.load(1, index);
        if (below(3)) {
          code.load(0, u32(value)).load(2, value >> 32).bytes({0x0f, 0x30});
        } else {
          code.bytes({0x0f, 0x32});
        }
        break;
      }
      case 15:  // SWAPGS, RDPKRU, WRPKRU, XGETBV, STAC, CLAC
      {
        static constexpr u8 list[] = {0xf8, 0xf8, 0xee, 0xef, 0xcb, 0xca};
        const u8 which = any_of(list);
        if (which == 0xee || which == 0xef) code.load(1, below(4) ? 0 : 1).load(2, below(8) ? 0 : 1);
        code.bytes({0x0f, 0x01, which});
        break;
      }
      case 16:  // RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE
        code.load(0, below(2) ? random_() & 0x7fffffffffff : u64(s64(random_()) >> 17)).bytes({0xf3});
        if (bits_ == 64 && below(2)) code.bytes({0x48});
        code.bytes({0x0f, 0xae, 0xc0 | below(4) << 3});
        break;
      case 17: {  // by FS or GS
        code.bytes({any_of({0x64u, 0x65u}), 0xa1})
            .value_of(below(2) ? 0x100 : LONG_USER_STACK, bits_ == 64 ? 8 : bits_ / 8);
        break;
      }
      case 18: {  // port, HLT at CPL 3, INVLPG, WBINVD, RDTSC (its result is dropped), RDPMC
        switch (below(4)) {
          case 0: code.bytes({0xe6, 0x80}); break;
          case 1:
            if (cpl_) code.bytes({0xf4});
            break;
          case 2: code.bytes({0x0f, 0x01}).at(7, LONG_SUPER_DATA - base_); break;
          default: code.bytes({0x0f, 0x31}).load(0, 0).load(2, 0); break;
        }
        break;
      }
      default: code.bytes({any_of({0xfau, 0xfbu, 0x9cu, 0x9bu})}); break;
    }
  }

  void access(Emitter& code) {
    const unsigned kind = below(13), size = below(3);
    code.load(0, kind == 5 ? jump_address() : data_address());
    switch (kind) {
      case 0:
      case 1: code.prefix_for_rax().bytes({size ? 0x8bu : 0x8au, 0x08}); break;  // loads
      case 2:
      case 3: code.prefix_for_rax().bytes({size ? 0x89u : 0x88u, 0x08}); break;  // stores
      case 4: code.prefix_for_rax().bytes({size ? 0x01u : 0x00u, 0x08}); break;
      case 5: code.bytes({0xff, any_of({0xe0u, 0xd0u})}); break;  // JMP, CALL
      case 6: code.prefix_for_rax().bytes({0xff, 0x30}); break;   // PUSH
      case 7: code.prefix_for_rax().bytes({0x8f, 0x00}); break;   // POP
      case 8:                                                     // a stack there
        if (bits_ == 64)
          code.bytes({0x48, 0x89, 0xc4, any_of({0x50u, 0x58u, 0xc3u, 0x9cu, 0xc9u})});
        else
          code.prefix_for_rax().bytes({0xf0, 0xff, 0x00});
        break;
      case 9:  // INVLPG; STAC and CLAC
        if (below(2))
          code.prefix_for_rax().bytes({0x0f, 0x01, 0x38});
        else
          code.bytes({0x0f, 0x01, any_of({0xcbu, 0xcau})});
        break;
      case 10:  // implicit supervisor accesses: an LDT in the window, with data and code segments not yet accessed
        if (cpl_ == 0) {
          patch(LONG_GDT + ldt2, segment(below(8) * 0x1000, 0x7fff, 0x82, 0));
          patch(LONG_GDT + ldt2 + 8, window >> 32);
          code.load(1, ldt2).bytes({0x0f, 0x00, 0xd1});
          code.load(1, below(8) * 0x1000 | 0x200 | below(2) * 8 | 4 | (below(2) ? 3 : 0));
          code.bytes({0x8e, 0xc1 | (bits_ == 64 ? any_of({0u, 3u, 4u}) : any_of({0u, 4u})) << 3});
          code.bytes({0x0f, 0x02, 0xd1});
        } else {
          code.bytes({0x0f, 0x18, 0x00});  // PREFETCHNTA (not CLFLUSH, for which TCG checks nothing)
        }
        break;
      case 11:  // an interrupt whose stack is there
        patch(LONG_IDT + 16 * 0x50, gate(code64_r0, LONG_SUPER_CODE + 0x80, 0xee, 3));
        patch(LONG_TSS + 0x34, window + 0x1000 * below(8) + (below(2) ? 0x800 : 0x10));
        code.bytes({0xcd, 0x50});
        break;
      default: code.prefix_for_rax().bytes({0x0f, 0xc1, 0x08}); break;
    }
  }

  void breakpoints() {
    u64 dr7 = 0x400 | (random_() & 0x300);
    for (unsigned n = 0; n < 4; ++n) {
      static constexpr u64 data[] = {LONG_USER_STACK,
                                     LONG_USER_STACK + 8,
                                     LONG_SUPER_DATA + 0x800,
                                     LONG_SUPER_DATA + 0x7f8,
                                     LONG_SUPER_DATA + 0x10,
                                     LONG_USER_STACK - 8,
                                     window + 0x10};
      if (below(2)) {
        set(at_ + LONG_TEST_DR + 8 * n, code_ + base_ + below(24));
        if (below(2)) dr7 |= u64(1 + below(3)) << 2 * n;
      } else {
        const unsigned kind = any_of({1u, 3u}), length = below(4);
        const u64 size = length == 2 ? 8 : length + 1;
        set(at_ + LONG_TEST_DR + 8 * n, (any_of(data) + below(8)) & ~(size - 1));
        if (below(4)) dr7 |= u64(1 + below(3)) << 2 * n;
        dr7 |= u64(kind | length << 2) << (16 + 4 * n);
      }
    }
    set(at_ + LONG_TEST_DR7, below(4) ? dr7 : 0x400);
    if (below(3) == 0) flags_ |= 0x100;
    if (below(6) == 0) flags_ |= 0x10000;
    set(at_ + LONG_TEST_FRAME + 16, flags_);
    if (below(4) == 0) set(at_ + LONG_TEST_CR4, boot_cr4_ | 8);
  }
  void debugged(Emitter& code) {
    // Aligned: unaligned stores meet TCG's watchpoints all over the page.
    static constexpr u64 data[] = {LONG_USER_STACK, LONG_USER_STACK + 4, LONG_SUPER_DATA + 0x800,
                                   LONG_SUPER_DATA + 0xc};
    const u64 address = bits_ == 64 && below(4) == 0 ? window + 8 + below(3) * 4 : any_of(data) - base_;
    switch (below(14)) {
      case 0: code.bytes({0x90}); break;
      case 1: code.load(0, address).prefix_for_rax().bytes({0x8b, 0x08}); break;
      case 2: code.load(0, address).prefix_for_rax().bytes({0x89, 0x08}); break;
      case 3: code.load(0, address).prefix_for_rax().bytes({0x01, 0x08}); break;
      case 4: code.bytes({0x50}); break;
      case 5: code.bytes({0x58}); break;
      case 6:  // (not ICEBP, which TCG takes for its own debugger's)
      case 7: code.load(0, random_() & 0xefff).bytes({0x0f, any_of({0x21u, 0x23u}), 0xf0}); break;
      case 8: code.width(4).bytes({0x68}).value_of(u32(flags_image()), 4).bytes({0x9d}); break;
      case 9: code.bytes({0x9c}); break;
      case 10: code.bytes({0xeb, 0x01, 0x90}); break;
      case 11:  // MOV SS
        if (cpl_ == 0 || cpl_ == 3)
          code.load(0, cpl_ == 3 ? (bits_ == 16 ? data16_r3 : data_r3) : data_r0).bytes({0x8e, 0xd0});
        break;
      case 12: code.bytes({0xcd, 0x50}); break;
      default:  // a string operation
        code.load(1, 2).load(7, address).bytes({0xf3, any_of({0xaau, 0xabu})});
        break;
    }
  }

  void broken_delivery() {
    // Faults of these instructions meet gates that do not work: double faults. The double fault's own gate stays.
    for (unsigned n = 1 + below(2); n-- > 0;) {
      static constexpr u8 vectors[] = {0, 1, 5, 6, 10, 11, 12, 13, 14, 17, 0x50};
      const u64 at = LONG_IDT + 16 * any_of(vectors);
      const u64 value = pristine(at);
      switch (below(5)) {
        case 0: patch(at, value & ~(1ull << 47)); break;
        case 1: patch(at, value ^ 1ull << (40 + below(4))); break;
        case 2: patch(at, (value & ~0xffff0000ull) | u64(selector()) << 16); break;
        case 3: patch(at, (value & ~(7ull << 32)) | u64(5 + below(3)) << 32); break;
        default: patch(at, random_gate()); break;
      }
    }
    if (below(3) == 0) window_tables();
    if (below(6) == 0) patch(LONG_TSS + 4, strange_address());
  }
  void faulting(Emitter& code) {
    switch (below(10)) {
      case 0: code.bytes({0x31, 0xc9, 0xf7, 0xf1}); break;  // DIV by 0
      case 1: code.bytes({0x0f, 0x0b}); break;
      case 2:
      case 3: code.load(0, selector()).bytes({0x8e, 0xc0}); break;
      case 4: code.load(0, 0xd8).bytes({0x8e, any_of({0xd0u, 0xe0u})}); break;
      case 5:
        if (bits_ == 64) code.load(0, strange_address()).bytes({0x48, any_of({0x8bu, 0x89u}), 0x08});
        break;
      case 6:
        if (bits_ == 64) code.load(0, window_address()).bytes({0x48, any_of({0x8bu, 0x89u}), 0x08});
        break;
      case 7: code.bytes({0xcd, any_of({0x50u, 0x0du, 0x03u, 0x20u, 0x60u, 0xffu})}); break;
      case 8: code.bytes({0xcc}); break;
      default: code.load(0, LONG_USER_STACK + 64 - base_).prefix_for_rax().bytes({0x89, 0x00}); break;
    }
  }

  // What happens is traced in R8. R9 is the APIC's command register, R10 the command, R11 how many NMIs handlers send.
  static constexpr u32 nmi_handler = 0x80, interrupt_handler = 0xc0, gp_handler = 0xe0;
  void trace(Emitter& code, unsigned digit) { code.bytes({0x49, 0xc1, 0xe0, 4, 0x49, 0x83, 0xc8, digit}); }
  /// TCG looks for an NMI behind a jump.
  void send_nmi(Emitter& code) { code.bytes({0x45, 0x89, 0x11, 0xeb, 0x00}); }
  void send_nmi_from_handler(Emitter& code) {
    code.bytes({0x49, 0x83, 0xeb, 1, 0x78, 5});  // sub r11, 1; js
    send_nmi(code);
  }
  /// To the next instruction.
  void return_to_here(Emitter& code, u8 stack_selector, u8 code_selector) {
    code.bytes({0x48, 0x89, 0xe0, 0x6a, stack_selector, 0x50, 0x9c, 0x6a, code_selector});
    code.bytes({0x48, 0x8d, 0x0d, 3, 0, 0, 0, 0x51, 0x48, 0xcf});
  }
  /// PUSHFQ, POPFQ with NT, IRETQ: #GP(0), behind which its handler goes on.
  void faulting_return(Emitter& code) { code.bytes({0x9c, 0x81, 0x0c, 0x24, 0x00, 0x40, 0, 0, 0x9d, 0x48, 0xcf}); }

  void nmi_handlers() {
    const auto handler = [&](u8 vector, u32 offset, unsigned bytes, u8 access, u8 ist = 0) {
      patch(LONG_IDT + 16 * vector, gate(code64_r0, LONG_SUPER_CODE + offset, access, ist));
      return Emitter({&memory_[at_ + LONG_TEST_CODE + offset], bytes}, 64);
    };
    // An IRET inside lets the next NMI in, which would have the same IST's stack.
    const bool nests = below(3) == 0, faults = below(3) == 0;
    const u8 ist = nests || faults || below(2) ? 0 : 3;
    Emitter nmi = handler(2, nmi_handler, interrupt_handler - nmi_handler, below(4) ? 0x8e : 0x8f, ist);
    trace(nmi, 0xa);
    if (below(2)) send_nmi_from_handler(nmi);
    if (nests) nmi.bytes({0xcd, 0x50});
    if (faults) faulting_return(nmi);
    trace(nmi, 0xb);
    if (below(8)) nmi.bytes({0x48, 0xcf});  // else it is where the test ends
    Emitter interrupt = handler(0x50, interrupt_handler, gp_handler - interrupt_handler, 0xee);
    trace(interrupt, 0xc);
    if (below(2)) send_nmi_from_handler(interrupt);
    interrupt.bytes({0x48, 0xcf});
    Emitter gp = handler(13, gp_handler, 0x20, 0x8e);
    trace(gp, 0xd);
    gp.bytes({0x48, 0x83, 0xc4, 8});                             // add rsp, 8
    gp.bytes({0x48, 0x83, 0x04, 0x24, 2});                       // add qword [rsp], 2
    gp.bytes({0x81, 0x64, 0x24, 0x10, 0xff, 0xbf, 0xff, 0xff});  // and dword [rsp + 16], ~NT
    gp.bytes({0x48, 0xcf});

    const u64 registers[] = {0, LONG_APIC_ICR, 0x44400 /* NMI to itself */, below(4)};
    for (unsigned i = 0; i < std::size(registers); ++i) set(at_ + LONG_TEST_GPR + 8 * (8 + i), registers[i]);
  }
  void around_nmis(Emitter& code) {
    if (code.is_full(20)) return;
    switch (below(8)) {
      case 0:
      case 1:
      case 2:
        if (cpl_ == 0) {
          send_nmi(code);
          break;
        }
        [[fallthrough]];
      case 3: code.bytes({0xcd, 0x50}); break;
      case 4: return_to_here(code, cpl_ ? data_r3 : data_r0, cpl_ ? code64_r3 : code64_r0); break;
      case 5: faulting_return(code); break;
      case 6:  // the shadow holds an NMI back that the next instruction sends
        code.bytes({0xb8}).value_of(cpl_ ? data_r3 : data_r0, 4).bytes({0x8e, 0xd0});
        if (cpl_ == 0) send_nmi(code);
        break;
      default: trace(code, below(8)); break;
    }
  }

  std::mt19937_64 random_;
  Subject subject_;
  bool intel_;
  Memory memory_;
  u64 at_ = 0, boot_cr4_ = 0, flags_ = 0, rsp_ = 0, base_ = 0;
  u32 code_ = 0;
  unsigned patches_ = 0, msrs_ = 0, bits_ = 64, cpl_ = 0;
  bool far_pointer_used_ = false, frame_used_ = false;
};

constexpr Field log_fields[] = {
    {"rax", 0x08, 8},
    {"rcx", 0x10, 8},
    {"rdx", 0x18, 8},
    {"rbx", 0x20, 8},
    {"rbp", 0x28, 8},
    {"rsi", 0x30, 8},
    {"rdi", 0x38, 8},
    {"r8-r15", 0x40, 8, 8},
    {"vector", LONG_LOG_VECTOR, 8},
    {"frame", LONG_LOG_FRAME, 8, 8},
    {"rsp", LONG_LOG_RSP, 8},
    {"cr0", 0xd0, 8},
    {"cr2", 0xd8, 8},
    {"cr3", 0xe0, 8},
    {"cr4", 0xe8, 8},
    {"cr8", 0xf0, 8},
    {"dr7", 0xf8, 8},
    {"dr6", 0x100, 8},
    {"dr", 0x108, 8, 4},
    {"efer", LONG_LOG_MSRS, 8},
    {"fs.base", LONG_LOG_MSRS + 8, 8},
    {"gs.base", LONG_LOG_MSRS + 0x10, 8},
    {"kernel_gs", LONG_LOG_MSRS + 0x18, 8},
    {"star", LONG_LOG_MSRS + 0x20, 8},
    {"lstar", LONG_LOG_MSRS + 0x28, 8},
    {"sfmask", LONG_LOG_MSRS + 0x30, 8},
    {"sysenter", LONG_LOG_MSRS + 0x38, 8, 3},
    {"ds", LONG_LOG_SEGMENTS, 8},
    {"es", LONG_LOG_SEGMENTS + 0x8, 8},
    {"fs", LONG_LOG_SEGMENTS + 0x10, 8},
    {"gs", LONG_LOG_SEGMENTS + 0x18, 8},
    {"tr", LONG_LOG_SEGMENTS + 0x20, 8},
    {"ldtr", LONG_LOG_SEGMENTS + 0x28, 8},
    {"gdtr", LONG_LOG_SEGMENTS + 0x30, 8, 2},
    {"idtr", LONG_LOG_SEGMENTS + 0x40, 8, 2},
    {"pkru", LONG_LOG_SEGMENTS + 0x50, 8},
    {"gdt", LONG_LOG_COPIES, 4, 96},
    {"ldt", LONG_LOG_COPIES + 0x180, 4, 8},
    {"pml5", LONG_LOG_COPIES + 0x1a0, 8, 2},
    {"pml4", LONG_LOG_COPIES + 0x1b0, 8, 2},
    {"pdpte", LONG_LOG_COPIES + 0x1c0, 8, 4},
    {"pde", LONG_LOG_COPIES + 0x1e0, 8, 4},
    {"pte", LONG_LOG_COPIES + 0x200, 8, 12},
    {"low pte", LONG_LOG_COPIES + 0x260, 8, 10},
    {"page", LONG_LOG_COPIES + 0x2b0, 8, 8},
    {"user stack", LONG_LOG_COPIES + 0x2f0, 8, 16},
    {"rsp0 stack", LONG_LOG_COPIES + 0x370, 8, 8},
    {"ist3 stack", LONG_LOG_COPIES + 0x3b0, 8, 8},
};

/// The CPUID of QEMU's "max" as far as our CPU looks at it.
std::vector<kvm_cpuid_entry2> like_qemus(bool intel) {
  std::vector<kvm_cpuid_entry2> entries(x86::supported_cpuid().begin(), x86::supported_cpuid().end());
  for (kvm_cpuid_entry2& e : entries) {
    if (e.function == 0 || e.function == 0x80000000) {
      const char* name = intel ? "GenuntelineI" : "AuthcAMDenti";  // EBX, ECX, EDX
      std::memcpy(&e.ebx, name, 4), std::memcpy(&e.ecx, name + 4, 4), std::memcpy(&e.edx, name + 8, 4);
    }
    if (e.function == 7 && e.index == 0) e.ecx |= 1u << 3 | 1u << 16;  // PKU, LA57
    if (e.function == 0x80000008) e.eax = (e.eax & ~0xffffu) | 57 << 8 | 40;
  }
  return entries;
}

}  // namespace

LongGuest::LongGuest(u64 seed, unsigned count, Subject subject) {
  const bool five_levels = seed & 1, intel = seed & 2;
  Generator generator(seed, subject, five_levels, intel);
  for (unsigned i = 0; i < count; ++i) generator.add_test(i);
  image = generator.take();
  tests = count;
  log = LONG_LOG;
  log_size = LONG_LOG_SIZE;
  fields = log_fields;
  cpuid = like_qemus(intel);
  if (intel) qemu_cpu = "max,vendor=GenuineIntel";
}

Ending LongGuest::ending(const Memory& memory, unsigned test) const {
  const u64 at = log + u64(test) * log_size;
  Ending ending{.vector = get<u64>(memory, at + LONG_LOG_VECTOR)};
  ending.has_error = has_error_code(ending.vector);
  const u64 frame = at + LONG_LOG_FRAME + (ending.has_error ? 8 : 0);
  ending.error = ending.has_error ? get<u64>(memory, at + LONG_LOG_FRAME) : 0;
  ending.rip = get<u64>(memory, frame), ending.cs = get<u64>(memory, frame + 8),
  ending.flags = get<u64>(memory, frame + 16);
  ending.rsp = get<u64>(memory, frame + 24), ending.ss = get<u64>(memory, frame + 32);
  return ending;
}

std::span<const u8> LongGuest::code_at(unsigned test, u64 cs, u64 rip) const {
  if ((cs & ~7ull) == (code16_r3 & ~7)) rip += 0x10000;
  rip -= rip >= LONG_SUPER_CODE ? LONG_SUPER_CODE : LONG_USER_CODE;
  if (rip >= LONG_TEST_CODE_SIZE) return {};
  return std::span(image).subspan(LONG_TESTS + test * LONG_TEST_SIZE + LONG_TEST_CODE + rip, LONG_TEST_CODE_SIZE - rip);
}

u64 LongGuest::descriptor(const Memory& memory, unsigned test, u64 selector) const {
  const bool local = selector & 4;
  if (selector > (local ? 0x1fu : unsigned(LONG_GDT_LIMIT))) return 0;
  return get<u64>(memory, log + u64(test) * log_size + LONG_LOG_COPIES + (local ? 0x180 : 0) + (selector & ~7ull));
}

void LongGuest::skip(unsigned test) {
  const u64 at = LONG_TESTS + test * LONG_TEST_SIZE;
  put<u64>(image, at + LONG_TEST_PATCHES, 0);
  put<u64>(image, at + LONG_TEST_MSRS, 0);
  std::memset(&image[at + LONG_TEST_CODE], 0xcc, LONG_TEST_CODE_SIZE);
}

std::span<const u8> LongGuest::code(unsigned test) const {
  return std::span(image).subspan(LONG_TESTS + test * LONG_TEST_SIZE + LONG_TEST_CODE, LONG_TEST_CODE_SIZE);
}

std::string LongGuest::describe(unsigned test) const {
  const u64 at = LONG_TESTS + test * LONG_TEST_SIZE;
  const auto word = [&](u32 offset) { return (unsigned long long)get<u64>(image, at + offset); };
  char line[200];
  std::snprintf(line, sizeof line, "  cs %llx rip %llx rflags %llx ss %llx rsp %llx cr0 %llx cr4 %llx pkru %llx\n",
                word(LONG_TEST_FRAME + 8), word(LONG_TEST_FRAME), word(LONG_TEST_FRAME + 16),
                word(LONG_TEST_FRAME + 32), word(LONG_TEST_FRAME + 24), word(LONG_TEST_CR0), word(LONG_TEST_CR4),
                word(LONG_TEST_PKRU));
  std::string text = line;
  std::snprintf(line, sizeof line, "  ds %llx es %llx fs %llx gs %llx dr7 %llx dr0-3 %llx %llx %llx %llx, %s\n",
                word(LONG_TEST_SEGMENTS), word(LONG_TEST_SEGMENTS + 8), word(LONG_TEST_SEGMENTS + 16),
                word(LONG_TEST_SEGMENTS + 24), word(LONG_TEST_DR7), word(LONG_TEST_DR), word(LONG_TEST_DR + 8),
                word(LONG_TEST_DR + 16), word(LONG_TEST_DR + 24), qemu_cpu.c_str());
  text += line;
  const u64 cs = word(LONG_TEST_FRAME + 8);
  const unsigned bits = cs == code16_r3 ? 16 : cs == code32_r3 || cs == code32_r0 ? 32 : 64;
  text += disassemble(std::span(image).subspan(at + LONG_TEST_CODE, 0x80), word(LONG_TEST_FRAME), bits);
  text += "  data behind the code:";
  for (unsigned i = 0; i < 10; ++i) {
    std::snprintf(line, sizeof line, " %llx", word(LONG_TEST_CODE + 0xb0 + 8 * i));
    text += line;
  }
  text += "\n";
  for (unsigned i = 0; i < word(LONG_TEST_MSRS); ++i) {
    std::snprintf(line, sizeof line, "  msr %llx: %llx\n", word(LONG_TEST_MSRS + 8 + 16 * i),
                  word(LONG_TEST_MSRS + 16 + 16 * i));
    text += line;
  }
  for (unsigned i = 0; i < word(LONG_TEST_PATCHES); ++i) {
    std::snprintf(line, sizeof line, "  patch %llx: %016llx\n", word(LONG_TEST_PATCHES + 8 + 16 * i),
                  word(LONG_TEST_PATCHES + 16 + 16 * i));
    text += line;
  }
  return text;
}

}  // namespace anykvm::oracle
