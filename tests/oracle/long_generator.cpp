// The start of a test of long mode, and which parts make it.
#include <cstring>

#include "oracle/long_generator.h"

extern "C" const anykvm::u8 long_boot[], long_boot_end[], long_code[], long_code_end[];

namespace anykvm::oracle {

using namespace long_mode;

LongGenerator::LongGenerator(u64 seed, Subject subject, bool five_levels, bool intel)
    : Generator(seed * 64 + unsigned(subject) * 4 + five_levels * 2 + intel), subject_(subject), intel_(intel) {
  // What is not anything else ends whoever runs there.
  std::memset(memory_.data(), 0xcc, LONG_TESTS);
  std::memset(&memory_[LONG_TABLES], 0, LONG_TABLES_SIZE);
  std::memcpy(&memory_[LONG_BOOT], long_boot, std::size_t(long_boot_end - long_boot));
  std::memcpy(&memory_[LONG_CODE], long_code, std::size_t(long_code_end - long_code));
  boot_cr4_ = 0x20 | (five_levels ? 0x1000 : 0);
  set(LONG_CR4, boot_cr4_);
  set(LONG_CR3, five_levels ? LONG_PML5 : LONG_PML4);
  tables();
  std::memcpy(&memory_[LONG_PRISTINE], &memory_[LONG_TABLES], LONG_TABLES_SIZE);
}

void LongGenerator::add_test(unsigned index) {
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

void LongGenerator::patch(u64 address, u64 value) {
  if (patches_ == 24) return;
  set(at_ + LONG_TEST_PATCHES + 8 + 16 * patches_, address);
  set(at_ + LONG_TEST_PATCHES + 16 + 16 * patches_, value);
  ++patches_;
}

void LongGenerator::msr(u32 index, u64 value) {
  if (msrs_ == 6) return;
  set(at_ + LONG_TEST_MSRS + 8 + 16 * msrs_, index);
  set(at_ + LONG_TEST_MSRS + 16 + 16 * msrs_, value);
  ++msrs_;
}

void LongGenerator::start_mode() {
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

void LongGenerator::control_bits() {
  // WP, TS, EM, MP (not AM: TCG has no #AC); TSD, DE, PGE, UMIP, FSGSBASE, SMEP, SMAP, PKE
  set(at_ + LONG_TEST_CR0, 0x80010031 ^ (random_() & (below(2) ? 0x10000 : 0x1000e)));
  u64 cr4 = boot_cr4_ | (random_() & 0x71088c);
  if (bits_ == 64 || cpl_ == 3) cr4 |= random_() & 0;
  set(at_ + LONG_TEST_CR4, cr4);
  set(at_ + LONG_TEST_PKRU, below(2) ? u32(random_()) & ~3u : 0);
}

u16 LongGenerator::selector() {
  if (below(8) == 0) return u16(below(5) << 3 | 4 | below(4));
  return u16(below(gdt_slots + 1) << 3 | below(4));
}

u64 LongGenerator::strange_address() {
  static constexpr u64 list[] = {0x0000800000000000, 0xffff7fffffffffff, 0x8000000000000000, 0x00007ffffffffff8,
                                 0xffff800000000000, 0x0100000000000000, 0x00fffffffffffff8, 0xff00000000000000,
                                 0x0001000000000000, 0x123456789abcdef0, 0x0000900000000000, 0xfffffffffffffff8};
  return any_of(list);
}

u64 LongGenerator::flags_image() {
  u64 flags = 2 | (random_() & 0x244dd5 & ~(below(4) ? 0x4100ull : 0)) | below(4) << 12;
  if (below(8) == 0) flags |= 0x10000;
  return flags;  // never VM, which TCG obeys in long mode, too
}

u64 LongGenerator::data_address() {
  if (bits_ == 64 && below(4)) return window_address();
  static constexpr u32 places[] = {LONG_USER_STACK + 8, LONG_SUPER_DATA + 16, LONG_USER_CODE + 0xf8, LONG_FRAMES};
  return (bits_ == 16 ? places[below(3)] : any_of(places)) - base_ + below(8);
}

void LongGenerator::put_data(unsigned offset, u64 value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) put<u8>(at_ + LONG_TEST_CODE + 0xb0 + offset + i, u8(value >> 8 * i));
}

}  // namespace anykvm::oracle
