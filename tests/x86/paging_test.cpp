// The page walk and the software TLB: error codes, accessed and dirty bits, page sizes, invalidation.
#include <gtest/gtest.h>

#include <random>

#include "x86/long_mode.h"

namespace anykvm::x86 {
namespace {

constexpr Gva page = 0x80'0000'0000;
constexpr u32 P = 1, W = 2, U = 4, RSVD = 8, I = 16;

class Paging : public testing::Test, public LongMode {
 protected:
  /// -1: allowed; else the error code of the page fault.
  int access(Access kind, Privilege privilege = Privilege::supervisor_ac, Gva gva = page) {
    Mmu::Translation out;
    cpu.mmu.flush_all();
    const Result result = cpu.mmu.translate(cpu, gva, kind, privilege, out);
    if (result == Result::ok) return -1;
    EXPECT_EQ(result, Result::fault);
    EXPECT_EQ(cpu.fault.vector, exception::pf);
    EXPECT_EQ(cpu.fault.payload, gva);
    EXPECT_TRUE(cpu.fault.has_error);
    return int(cpu.fault.error);
  }
};

constexpr Access R = Access::read, X = Access::fetch;
constexpr Access S = Access::write;  // store
constexpr Privilege user = Privilege::user, smap = Privilege::supervisor;

TEST_F(Paging, NotPresentCodes) {
  EXPECT_EQ(access(R), 0);
  EXPECT_EQ(access(S), int(W));
  EXPECT_EQ(access(X), int(I));
  EXPECT_EQ(access(R, user), int(U));
  EXPECT_EQ(access(S, user), int(U | W));
  EXPECT_EQ(access(X, user), int(U | I));
  cpu.state.msr.efer &= ~efer::nx;
  EXPECT_EQ(access(X), 0) << "the I bit needs NX or SMEP";
  cpu.state.cr4 |= cr4::smep;
  EXPECT_EQ(access(X), int(I));
}

TEST_F(Paging, AmdReservesTheGlobalBitOfItsTopTables) {
  const auto give_cpuid = [&](const char* vendor) {  // EBX, ECX, EDX
    kvm_cpuid_entry2 leaf{};
    __builtin_memcpy(&leaf.ebx, vendor, 4), __builtin_memcpy(&leaf.ecx, vendor + 4, 4);
    __builtin_memcpy(&leaf.edx, vendor + 8, 4);
    kvm_cpuid_entry2 size{.function = 0x80000008, .eax = 48 << 8 | 40};
    const kvm_cpuid_entry2 entries[] = {leaf, size};
    ASSERT_EQ(cpu.cpuid.set(entries), 0);
  };
  map(page, 0x5000, pte::p);
  for (unsigned level : {4u, 3u, 2u}) {
    const u64 before = machine.get<u64>(entry(page, level));
    machine.put<u64>(entry(page, level), before | pte::g);
    give_cpuid("AuthcAMDenti");
    EXPECT_EQ(access(R), level == 4 ? int(P | RSVD) : -1) << level;
    give_cpuid("GenuntelineI");
    EXPECT_EQ(access(R), -1) << level;
    machine.put<u64>(entry(page, level), before);
  }
}

TEST_F(Paging, AStoreThatFaultsOnItsSecondPageMakesNoPageDirty) {
  map(page, 0x5000, pte::p | pte::w);
  map(page + page_size, 0x6000, pte::p);
  EXPECT_EQ(cpu.write(page + 0xffc, u64{0}), Result::fault);
  EXPECT_EQ(cpu.fault.payload, page + page_size);
  EXPECT_EQ(machine.get<u64>(entry(page, 1)) & pte::d, 0u);
  map(page + page_size, 0x6000, pte::p | pte::w);
  EXPECT_EQ(cpu.write(page + 0xffc, u64{0}), Result::ok);
  EXPECT_EQ(machine.get<u64>(entry(page, 1)) & pte::d, pte::d);
  EXPECT_EQ(machine.get<u64>(entry(page + page_size, 1)) & pte::d, pte::d);
}

TEST_F(Paging, UserRights) {
  map(page, 0x5000, pte::p);
  EXPECT_EQ(access(R, user), int(P | U));
  EXPECT_EQ(access(S, user), int(P | U | W));
  EXPECT_EQ(access(X, user), int(P | U | I));
  map(page, 0x5000, pte::p | pte::u);
  EXPECT_EQ(access(R, user), -1);
  EXPECT_EQ(access(X, user), -1);
  EXPECT_EQ(access(S, user), int(P | U | W));
  map(page, 0x5000, pte::p | pte::u | pte::w | pte::nx);
  EXPECT_EQ(access(S, user), -1);
  EXPECT_EQ(access(X, user), int(P | U | I));
}

TEST_F(Paging, EveryLevelMustGrant) {
  map(page, 0x5000, pte::p | pte::u | pte::w);
  for (unsigned level = 2; level <= 4; ++level) {
    const Gpa at = entry(page, level);
    const u64 value = machine.get<u64>(at);
    machine.put<u64>(at, value & ~pte::w);
    EXPECT_EQ(access(S, user), int(P | U | W)) << level;
    machine.put<u64>(at, value & ~pte::u);
    EXPECT_EQ(access(R, user), int(P | U)) << level;
    machine.put<u64>(at, value | pte::nx);
    EXPECT_EQ(access(X, user), int(P | U | I)) << level;
    machine.put<u64>(at, value & ~pte::p);
    EXPECT_EQ(access(X, user), int(U | I)) << level;
    machine.put<u64>(at, value);
    EXPECT_EQ(access(X, user), -1) << level;
  }
}

TEST_F(Paging, WriteProtectOfTheSupervisor) {
  map(page, 0x5000, pte::p);
  EXPECT_EQ(access(S), int(P | W));
  cpu.state.cr0 &= ~cr0::wp;
  EXPECT_EQ(access(S), -1);
  EXPECT_EQ(access(S, user), int(P | U | W));
}

TEST_F(Paging, SmepAndSmap) {
  map(page, 0x5000, pte::p | pte::u | pte::w);
  EXPECT_EQ(access(X), -1);
  cpu.state.cr4 |= cr4::smep;
  EXPECT_EQ(access(X), int(P | I));
  EXPECT_EQ(access(R, smap), int(P));
  EXPECT_EQ(access(S, smap), int(P | W));
  EXPECT_EQ(access(R), -1);
  cpu.state.cr4 |= cr4::smap;
  cpu.update_mode();
  EXPECT_EQ(cpu.data_privilege, Privilege::supervisor);
  cpu.write_rflags(flag::ac, flag::ac);
  EXPECT_EQ(cpu.data_privilege, Privilege::supervisor_ac);
  EXPECT_EQ(cpu.system_privilege, Privilege::supervisor);
}

TEST_F(Paging, ReservedBits) {
  map(page, 0x5000, pte::p | pte::u | pte::w | 1ull << 51);
  EXPECT_EQ(access(R, user), int(P | U | RSVD));
  EXPECT_EQ(access(S), int(P | W | RSVD));
  map(page, 0x5000, pte::p | pte::nx);
  cpu.state.msr.efer &= ~efer::nx;
  EXPECT_EQ(access(R), int(P | RSVD)) << "NX is reserved without EFER.NXE";
  cpu.state.msr.efer |= efer::nx;
  machine.put<u64>(entry(page, 4), machine.get<u64>(entry(page, 4)) | pte::ps);
  EXPECT_EQ(access(R), int(P | RSVD)) << "no large PML4 entries";
}

TEST_F(Paging, AccessedAndDirty) {
  map(page, 0x5000, pte::p | pte::u | pte::w);
  EXPECT_EQ(access(R), -1);
  EXPECT_EQ(entry_value(page) & (pte::a | pte::d), pte::a);
  for (unsigned level = 2; level <= 4; ++level) EXPECT_EQ(entry_value(page, level) & (pte::a | pte::d), pte::a);
  EXPECT_TRUE(machine.dirty.contains(entry(page, 1) & page_mask)) << "the table itself is dirtied";
  EXPECT_FALSE(machine.dirty.contains(0x5000));
  EXPECT_EQ(access(S), -1);
  EXPECT_EQ(entry_value(page) & (pte::a | pte::d), pte::a | pte::d);
  EXPECT_TRUE(machine.dirty.contains(0x5000));
}

TEST_F(Paging, AFaultSetsNoBits) {
  map(page, 0x5000, pte::p | pte::u);
  EXPECT_EQ(access(S, user), int(P | W | U));
  for (unsigned level = 1; level <= 4; ++level) EXPECT_EQ(entry_value(page, level) & (pte::a | pte::d), 0u);
}

TEST_F(Paging, AReadDoesNotMakeThePageWritable) {
  map(page, 0x5000, pte::p | pte::w);
  u64 value;
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  EXPECT_FALSE(machine.dirty.contains(0x5000));
  ASSERT_EQ(cpu.write(page, value), Result::ok);
  EXPECT_TRUE(machine.dirty.contains(0x5000));
  EXPECT_TRUE(entry_value(page) & pte::d);
}

TEST_F(Paging, LargePages) {
  machine.put<u64>(0x20'0000 + 0x12'3456, u64{0x1234});
  map(page, 0x20'0000, pte::p | pte::w, 2);
  u64 value = 0;
  ASSERT_EQ(cpu.read(page + 0x12'3456, value), Result::ok);
  EXPECT_EQ(value, 0x1234u);
  EXPECT_EQ(entry_value(page, 2) & (pte::a | pte::d), pte::a);
  map(page, 0x20'2000, pte::p | pte::w, 2);
  EXPECT_EQ(access(R), int(P | RSVD));

  constexpr Gva huge = 0x41'0000'0000;
  map(huge, 0, pte::p | pte::w, 3);
  cpu.mmu.flush_all();
  ASSERT_EQ(cpu.read(huge + 0x20'0000 + 0x12'3456, value), Result::ok);
  EXPECT_EQ(value, 0x1234u);
  ASSERT_EQ(cpu.write(huge + 0x20'0000, value), Result::ok);
  EXPECT_TRUE(entry_value(huge, 3) & pte::d);
  map(huge, 0x2000, pte::p | pte::w, 3);
  EXPECT_EQ(access(R, Privilege::supervisor_ac, huge), int(P | RSVD));
}

TEST_F(Paging, InvlpgDropsOnePage) {
  map(page, 0x5000, pte::p | pte::w);
  map(page + 0x1000, 0x5000, pte::p | pte::w);
  machine.put<u64>(0x5000, 5);
  machine.put<u64>(0x6000, 6);
  u64 value;
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  map(page, 0x6000, pte::p | pte::w);
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  EXPECT_EQ(value, 5u) << "the TLB still has the old page";
  cpu.mmu.flush_page(cpu, page + 0x1000);
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  EXPECT_EQ(value, 5u);
  cpu.mmu.flush_page(cpu, page + 8);
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  EXPECT_EQ(value, 6u);
}

TEST_F(Paging, InvlpgDropsAllOfALargePage) {
  map(page, 0x20'0000, pte::p | pte::w, 2);
  machine.put<u64>(0x20'5000, 5);
  u64 value;
  ASSERT_EQ(cpu.read(page + 0x5000, value), Result::ok);
  EXPECT_EQ(value, 5u);
  map(page, 0, pte::p | pte::w, 2);
  machine.put<u64>(0x5000, 7);
  cpu.mmu.flush_page(cpu, page + 0x1f'0000);
  ASSERT_EQ(cpu.read(page + 0x5000, value), Result::ok);
  EXPECT_EQ(value, 7u);
}

TEST_F(Paging, Cr3SwitchesSpacesWithAndWithoutPcid) {
  constexpr Gpa other = 0x200000;
  for (unsigned i = 0; i < 512; ++i) machine.put<u64>(other + 8 * i, machine.get<u64>(pml4 + 8 * i));
  map(page, 0x5000, pte::p | pte::w);
  machine.put<u64>(0x5000, 5);
  u64 value;
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  cpu.state.cr4 |= cr4::pcide;
  ASSERT_EQ(cpu.write_cr(3, other | 7 | 1ull << 63), Result::ok);
  EXPECT_EQ(cpu.state.cr3, other | 7);
  EXPECT_EQ(cpu.read(page, value), Result::fault);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 1ull << 63), Result::ok);
  EXPECT_EQ(cpu.read(page, value), Result::ok);
  cpu.state.cr4 &= ~cr4::pcide;
  EXPECT_EQ(cpu.write_cr(3, other | 1ull << 63), Result::fault) << "bit 63 is reserved without PCID";
  EXPECT_EQ(cpu.fault.vector, exception::gp);
}

TEST_F(Paging, AddressSpacesAndGlobalPagesAreKept) {
  constexpr Gva global = page + page_size;
  map(page, 0x5000, pte::p | pte::w | pte::a | pte::d);
  map(global, 0x6000, pte::p | pte::w | pte::a | pte::d | pte::g);
  const auto touch = [&](Gva gva) {
    const u64 before = cpu.mmu.walks;
    u8 byte;
    EXPECT_EQ(cpu.read(gva, byte), Result::ok);
    return cpu.mmu.walks - before;
  };
  ASSERT_EQ(cpu.write_cr(4, cpu.state.cr4 | cr4::pcide), Result::ok);
  constexpr u64 keep = 1ull << 63;
  ASSERT_EQ(cpu.write_cr(3, pml4 | 1), Result::ok);
  EXPECT_EQ(touch(page) + touch(global), 2u);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 2), Result::ok);
  EXPECT_EQ(touch(global), 0u);
  EXPECT_EQ(touch(page + 2 * page_size - page_size), 0u);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 1 | keep), Result::ok);
  EXPECT_EQ(touch(page), 0u) << "its own entries, which the other space has not displaced";
  EXPECT_EQ(touch(global), 0u);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 1), Result::ok);
  EXPECT_EQ(touch(page), 1u) << "flushed";
  EXPECT_EQ(touch(global), 0u);
  cpu.mmu.flush_page(cpu, global);
  EXPECT_EQ(touch(global), 1u) << "INVLPG takes global pages, too";
  cpu.mmu.flush_context(1);
  EXPECT_EQ(touch(page), 1u);
  EXPECT_EQ(touch(global), 0u);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 2 | keep), Result::ok);
  EXPECT_EQ(touch(page), 1u);
  cpu.mmu.flush_context(1);
  EXPECT_EQ(touch(page), 0u) << "another space's flush";
  cpu.mmu.flush_non_global();
  EXPECT_EQ(touch(page), 1u);
  EXPECT_EQ(touch(global), 0u);
  cpu.mmu.flush_all();
  EXPECT_EQ(touch(page) + touch(global), 2u);
  ASSERT_EQ(cpu.write_cr(4, cpu.state.cr4 & ~cr4::pge), Result::ok);
  EXPECT_EQ(touch(global), 1u);
  ASSERT_EQ(cpu.write_cr(3, pml4 | 2), Result::ok);
  EXPECT_EQ(touch(global), 1u) << "without CR4.PGE no page is global";
}

TEST_F(Paging, ARevivedGlobalPageHasTheRightsThatItHad) {
  map(page, 0x5000, pte::p | pte::g);
  u8 byte = 0;
  ASSERT_EQ(cpu.read(page, byte), Result::ok);
  ASSERT_EQ(cpu.write_cr(3, pml4), Result::ok);
  EXPECT_EQ(cpu.write(page, byte), Result::fault);
  EXPECT_EQ(cpu.fault.error, P | W);
}

TEST_F(Paging, ProtectionKeys) {
  constexpr u32 PK = 32;
  cpu.state.cr4 |= cr4::pke;
  map(page, 0x5000, pte::p | pte::w | pte::u | 5ull << 59);
  EXPECT_EQ(access(R, user), -1);
  cpu.state.fpu.pkru = 2u << 10;  // write disable
  EXPECT_EQ(access(R, user), -1);
  EXPECT_EQ(access(S, user), int(P | W | U | PK));
  EXPECT_EQ(access(S), int(P | W | PK)) << "CR0.WP";
  cpu.state.cr0 &= ~cr0::wp;
  EXPECT_EQ(access(S), -1);
  cpu.state.fpu.pkru = 1u << 10;  // access disable
  EXPECT_EQ(access(R), int(P | PK));
  EXPECT_EQ(access(X, user), -1) << "fetches are free";
  map(page, 0x5000, pte::p | pte::w | 5ull << 59);
  EXPECT_EQ(access(S), -1) << "supervisor pages have no key";
}

TEST_F(Paging, FiveLevels) {
  const Gpa pml5 = next_table;
  next_table += page_size;
  machine.put<u64>(pml5, pml4 | pte::p | pte::w | pte::u);
  constexpr Gva high = 0xff12'0000'0000'0000;
  EXPECT_FALSE(cpu.canonical(high));
  cpu.state.cr4 |= cr4::la57;
  cpu.state.cr3 = pml5;
  EXPECT_TRUE(cpu.canonical(high));
  EXPECT_FALSE(cpu.canonical(1ull << 56));
  map(page, 0x5000, pte::p | pte::w);
  EXPECT_EQ(access(R), -1);
  EXPECT_EQ(access(R, Privilege::supervisor_ac, high), 0);
  machine.put<u64>(pml5 + 8 * (high >> 48 & 511), pml4 | pte::p | pte::w);
  EXPECT_EQ(access(R, Privilege::supervisor_ac, high | page), -1);
  machine.put<u64>(pml5 + 8 * (high >> 48 & 511), pml4 | pte::p | pte::ps);
  EXPECT_EQ(access(R, Privilege::supervisor_ac, high | page), int(P | RSVD));
}

TEST_F(Paging, AlignmentChecks) {
  map(page, 0x5000, pte::p | pte::w | pte::u);
  enter(3);
  cpu.state.cr0 |= cr0::am;
  cpu.state.other_flags |= flag::ac;
  cpu.update_mode();
  u32 word = 0;
  EXPECT_EQ(cpu.read(page + 4, word), Result::ok);
  EXPECT_EQ(cpu.write(page + 2, word), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ac);
  Operand operand;
  EXPECT_EQ(cpu.open_operand(page + 1, 2, Cpu::Use::read, operand), Result::fault);
  EXPECT_EQ(cpu.open_operand(page + 8, 8, Cpu::Use::read_write, operand), Result::ok);
  cpu.write_rflags(0, flag::ac);
  EXPECT_EQ(cpu.write(page + 2, word), Result::ok);
}

TEST_F(Paging, GenerationsWrap) {
  map(page, 0x5000, pte::p | pte::w);
  machine.put<u64>(0x5000, 5);
  machine.put<u64>(0x6000, 6);
  u64 value;
  ASSERT_EQ(cpu.read(page, value), Result::ok);
  map(page, 0x6000, pte::p | pte::w);
  for (int i = 0; i < 10000; ++i) {
    cpu.mmu.flush_all();
    ASSERT_EQ(cpu.mmu.lookup(page, 8, Access::read, cpu.data_privilege), nullptr) << i;
    if (i % 4095 < 3) {
      ASSERT_EQ(cpu.read(page, value), Result::ok);
      ASSERT_EQ(value, 6u);
    }
  }
}

TEST_F(Paging, CanonicalForm) {
  Mmu::Translation out;
  EXPECT_EQ(cpu.mmu.translate(cpu, 0x0000'8000'0000'0000, Access::read, user, out), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
  EXPECT_EQ(cpu.fault.error, 0u);
  EXPECT_EQ(cpu.mmu.translate(cpu, 0x0000'8000'0000'0000, Access::read, user, out, true), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::ss);
}

TEST_F(Paging, TablesOutsideRamAreNotPresent) {
  machine.put<u64>(entry(page, 4), machine.size | pte::p | pte::w);
  EXPECT_EQ(access(R), 0);
}

TEST_F(Paging, ProbeHasNoSideEffects) {
  map(page, 0x5000, pte::p);
  machine.dirty.clear();
  Gpa gpa;
  ASSERT_TRUE(cpu.mmu.probe(cpu, page + 0x123, gpa));
  EXPECT_EQ(gpa, 0x5123u);
  EXPECT_EQ(entry_value(page), 0x5000 | pte::p);
  EXPECT_TRUE(machine.dirty.empty());
  EXPECT_FALSE(cpu.mmu.probe(cpu, page + 0x1000, gpa));
}

TEST_F(Paging, ReadOnlySlotsTakeReadsAndTurnStoresIntoMmio) {
  machine.read_only.insert(0x5000);
  map(page, 0x5000, pte::p | pte::w);
  u32 value = 7;
  EXPECT_EQ(cpu.read(page, value), Result::ok);
  EXPECT_EQ(cpu.write(page + 8, u32{9}), Result::ok);
  ASSERT_TRUE(cpu.mmio.has_writes());
  EXPECT_EQ(cpu.mmio.next_write().gpa, 0x5008u);
  EXPECT_EQ(machine.get<u32>(0x5008), 0u);
}

/// 32-bit paging: 4 KiB and 4 MiB pages.
TEST(LegacyPaging, TwoLevels) {
  FakeMachine machine(16 << 20);
  Cpu cpu(machine);
  cpu.state.cr0 = cr0::pe | cr0::pg | cr0::wp;
  cpu.state.cr3 = 0x1000;
  cpu.state.cr4 = cr4::pse;
  cpu.update_mode();
  machine.put<u32>(0x1000, 0x2000 | 7);
  machine.put<u32>(0x2000 + 4 * 5, 0x9000 | 3);
  machine.put<u32>(0x1004, 0x0080'0000 | 0x83);  // 4 MiB at 4 MiB
  machine.put<u32>(0x9010, 0xabcd);
  machine.put<u32>(0x0081'2344, 0x4321);
  u32 value;
  ASSERT_EQ(cpu.read(0x5010, value), Result::ok);
  EXPECT_EQ(value, 0xabcdu);
  EXPECT_EQ(machine.get<u32>(0x2000 + 20), 0x9000u | 3 | 32);
  ASSERT_EQ(cpu.read(0x41'2344, value), Result::ok);
  EXPECT_EQ(value, 0x4321u);
  ASSERT_EQ(cpu.write(0x41'2344, u32{1}), Result::ok);
  EXPECT_EQ(machine.get<u32>(0x1004) & 0x60, 0x60u);
  EXPECT_EQ(cpu.read_as(0x5010, &value, 4, Privilege::user), Result::fault);
  EXPECT_EQ(cpu.fault.error, P | U);
  EXPECT_EQ(cpu.read(0x6000, value), Result::fault);
  EXPECT_EQ(cpu.fault.error, 0u);
}

TEST(LegacyPaging, Pae) {
  FakeMachine machine(16 << 20);
  Cpu cpu(machine);
  cpu.state.cr0 = cr0::pe;
  cpu.state.cr4 = cr4::pae;
  machine.put<u64>(0x1020, 0x2000 | 1);
  machine.put<u64>(0x2000, 0x3000 | 3);
  machine.put<u64>(0x2008, 0x20'0000 | 0x83);
  machine.put<u64>(0x3028, 0x9000 | 3);
  ASSERT_EQ(cpu.write_cr(3, 0x1020), Result::ok);
  ASSERT_EQ(cpu.write_cr(0, cr0::pe | cr0::pg | cr0::wp), Result::ok);
  EXPECT_EQ(cpu.state.pdpte[0], 0x2001u);
  machine.put<u32>(0x9010, 0xabcd);
  u32 value;
  ASSERT_EQ(cpu.read(0x5010, value), Result::ok);
  EXPECT_EQ(value, 0xabcdu);
  ASSERT_EQ(cpu.write(0x20'0000, u32{5}), Result::ok);
  EXPECT_EQ(machine.get<u32>(0x20'0000), 5u);
  EXPECT_EQ(cpu.read(0x4000'0000, value), Result::fault);
  machine.put<u64>(0x1028, 0x4000 | 1 | 4);  // reserved bit in a PDPTE
  EXPECT_EQ(cpu.write_cr(3, 0x1020), Result::fault);
  EXPECT_EQ(cpu.fault.vector, exception::gp);
}

/// Random tables and accesses against a walk written the plain way.
TEST_F(Paging, RandomRightsMatchTheRules) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 20000; ++i) {
    u64 all_w = 1, all_u = 1, any_nx = 0;
    map(page, 0x5000, 0);
    for (unsigned level = 1; level <= 4; ++level) {
      const u64 bits = random() & (pte::w | pte::u | pte::nx);
      all_w &= bits >> 1 & 1, all_u &= bits >> 2 & 1, any_nx |= bits >> 63;
      machine.put<u64>(entry(page, level), (entry_value(page, level) & 0xffffffffff000) | bits | pte::p);
    }
    const u64 choice = random();
    cpu.state.cr0 = (cpu.state.cr0 & ~cr0::wp) | (choice & 1 ? cr0::wp : 0);
    cpu.state.cr4 = (cpu.state.cr4 & ~cr4::smep) | (choice & 2 ? cr4::smep : 0);
    const auto kind = Access(choice >> 2 & 3);
    const auto privilege = Privilege((choice >> 4 & 3) % 3);
    if (kind > Access::fetch) continue;
    bool allowed;
    if (privilege == Privilege::user) {
      allowed = all_u && (kind != Access::write || all_w) && !(kind == Access::fetch && any_nx);
    } else if (kind == Access::fetch) {
      allowed = !any_nx && !(all_u && choice & 2);
    } else {
      allowed = !(all_u && privilege == Privilege::supervisor) && !(kind == Access::write && !all_w && choice & 1);
    }
    const u32 code =
        P | (kind == Access::write ? W : 0) | (privilege == Privilege::user ? U : 0) | (kind == Access::fetch ? I : 0);
    ASSERT_EQ(access(kind, privilege), allowed ? -1 : int(code)) << i;
  }
}

}  // namespace
}  // namespace anykvm::x86
