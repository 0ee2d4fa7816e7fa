// Which translations may outlive a change of the page tables: random changes, invalidations, loads and jumps, executed,
// against a model of what the manual lets a processor keep. Reference: Intel SDM volume 3, 4.10.
#include <gtest/gtest.h>

#include <random>

#include "engine/engine.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using x86::rax, x86::rcx, x86::rdx;
namespace pte = x86::pte;
namespace cr4 = x86::cr4;

/// Four pages of 4 KiB and, as the last, one of 2 MiB. Each shows one of two frames, which says in a word, and in code
/// that loads RDX, which it is. More code jumps to the next page's.
class TlbTest : public testing::TestWithParam<Kind>, protected x86::LongMode {
 protected:
  static constexpr unsigned pages = 5, large = 4, spaces = 2, pcids = 3;
  static constexpr Gva window = 1ull << 39;
  static constexpr Gpa frames = 0x300000, mark = 0x1f0100;
  static constexpr unsigned to_code = 0x40, to_jump = 0x80;   // from the word
  static constexpr Gpa space[spaces] = {0x100000, 0x110000};  // PML4, PDPT, PD, PT
  static constexpr u64 no_flush = 1ull << 63, keep_bits = pte::p | pte::w | pte::a | pte::d;
  enum Snippet : u64 {
    load = 0x5000,
    jump = 0x5060,
    set_cr3 = 0x5010,
    set_cr4 = 0x5020,
    invlpg = 0x5030,
    invpcid = 0x5040
  };

  TlbTest() {
    EXPECT_EQ(cpu.cpuid.set(x86::supported_cpuid()), 0);
    stop_at_exceptions();
    const auto code = [&](u64 at, std::initializer_list<u8> bytes) {
      std::memset(machine.base + at, 0xf4, 16);  // hlt
      std::copy(bytes.begin(), bytes.end(), machine.base + at);
    };
    code(load, {0x48, 0x8b, 0x11});                 // mov rdx, [rcx]
    code(jump, {0xff, 0xe1});                       // jmp rcx
    code(set_cr3, {0x0f, 0x22, 0xd8});              // mov cr3, rax
    code(set_cr4, {0x0f, 0x22, 0xe0});              // mov cr4, rax
    code(invlpg, {0x0f, 0x01, 0x39});               // invlpg [rcx]
    code(invpcid, {0x66, 0x0f, 0x38, 0x82, 0x01});  // invpcid rax, [rcx]
    for (unsigned s = 0; s < spaces; ++s) {
      std::memcpy(machine.base + space[s], machine.base + pml4, page_size);
      for (unsigned level = 0; level < 3; ++level)
        machine.put<u64>(space[s] + level * page_size + (level == 0 ? 8 : 0),
                         (space[s] + (level + 1) * page_size) | keep_bits | pte::u);
      for (unsigned page = 0; page < pages; ++page) set_entry(s, page, page & 1, page == 0);
    }
    const auto frame = [&](Gpa word, u8 n) {
      machine.put<u64>(word, n);
      code(word + to_code, {0xba, n, 0, 0, 0});  // mov edx, n
      code(word + to_jump, {0xe9});              // jmp
      machine.put<u32>(word + to_jump + 1, u32(page_size + to_code - to_jump - 5));
    };
    for (u8 n = 0; n < 8; ++n) frame(frames + n * page_size + (mark & ~page_mask), n);
    for (u8 n = 0; n < 2; ++n) frame((Gpa(n) << 21) + mark, n);
    engine = make(GetParam());
  }

  static Gva address(unsigned page) {
    return page == large ? window + (1 << 21) + mark : window + page * page_size + (mark & ~page_mask);
  }
  /// Lets a page show the frame `n`: 0 or 1 of its two.
  void set_entry(unsigned s, unsigned page, unsigned n, bool global) {
    const u64 bits = keep_bits | (global ? pte::g : 0);
    if (page == large)
      machine.put<u64>(space[s] + 2 * page_size + 8, u64(n) << 21 | pte::ps | bits);
    else
      machine.put<u64>(space[s] + 3 * page_size + page * 8, (frames + (n + 2 * page) * page_size) | bits);
    current[s][page] = {n, global};
  }
  /// Runs a snippet up to its HLT; false: it faulted. Code does not change, so that engines may go on with what they
  /// know of it.
  bool run(Snippet at) {
    cpu.exit.kind = x86::ExitKind::none;
    cpu.state.rip = at;
    engine->keep_code();
    engine->run(cpu);
    EXPECT_EQ(cpu.exit.kind, x86::ExitKind::halt);
    return cpu.state.rip < 0x6000 || cpu.state.rip >= window;
  }

  struct Entry {
    unsigned n;
    bool global;
  };
  Entry current[spaces][pages];
  std::unique_ptr<Engine> engine;
};

TEST_P(TlbTest, KeepsNothingThatIsToGo) {
  std::mt19937_64 random(5);
  const auto below = [&](unsigned n) { return unsigned(random() % n); };
  // Which of its two frames a translation may show: a bit each. Global ones belong to no PCID.
  unsigned cached[pcids][pages] = {}, cached_global[pages] = {};
  unsigned now = 0, pcid = 0, stale_global = 0, stale_in_other_space = 0;
  bool pge = true, pcide = false;
  const auto forget = [&](bool globals, unsigned one_pcid, unsigned one_page = pages) {
    for (unsigned page = 0; page < pages; ++page) {
      if (one_page != pages && one_page != page) continue;
      for (unsigned p = 0; p < pcids; ++p)
        if (one_pcid == pcids || one_pcid == p) cached[p][page] = 0;
      if (globals) cached_global[page] = 0;
    }
  };
  const auto switch_to = [&](unsigned s, unsigned p, bool keep) {
    now = s, pcid = p;
    cpu.state.gpr[rax] = space[s] | p | (keep ? no_flush : 0);
    ASSERT_TRUE(run(set_cr3));
    if (!keep) forget(false, p);
  };
  const auto write_cr4 = [&](u64 value) {
    cpu.state.gpr[rax] = value;
    ASSERT_TRUE(run(set_cr4));
  };
  // What has been seen now or walked through may stay.
  const auto use = [&](unsigned page) {
    const Entry entry = current[now][page];
    (entry.global && pge ? cached_global[page] : cached[pcid][page]) |= 1u << entry.n;
  };
  const auto check = [&](unsigned page) {
    // A load, a jump there, a jump there from the page before.
    const unsigned way = below(page == 0 || page == large ? 2 : 3);
    cpu.state.gpr[rcx] = address(page) + (way == 0 ? 0 : way == 1 ? to_code : to_jump - page_size);
    ASSERT_TRUE(run(way == 0 ? load : jump));
    if (way == 2) use(page - 1);
    const unsigned seen = unsigned(cpu.state.gpr[rdx]) - (page == large ? 0 : 2 * page);
    const Entry entry = current[now][page];
    ASSERT_LT(seen, 2u);
    const unsigned allowed = cached[pcid][page] | cached_global[page] | 1u << entry.n;
    ASSERT_TRUE(allowed >> seen & 1) << "page " << page << ": a translation that is gone";
    stale_global += seen != entry.n && !(cached[pcid][page] >> seen & 1);
    stale_in_other_space += seen != entry.n && pcid != 0;
    use(page);
  };
  switch_to(0, 0, false);
  for (unsigned tries = 0; tries < 20000; ++tries) {
    SCOPED_TRACE(tries);
    const unsigned page = below(pages), action = below(24);
    const bool invalidates = action < 5;
    switch (action) {
      case 0: switch_to(below(spaces), pcide ? below(pcids) : 0, pcide && below(3)); break;
      case 1:
        cpu.state.gpr[rcx] = (address(page) & page_mask) + below(page == large ? 1 << 16 : page_size);
        ASSERT_TRUE(run(invlpg));
        forget(true, pcid, page);
        break;
      case 2: {
        const unsigned type = below(4), p = pcide ? below(pcids) : 0;
        machine.put<u64>(0x4000, type < 2 ? p : 0);
        machine.put<u64>(0x4008, address(page));
        cpu.state.gpr[rax] = type, cpu.state.gpr[rcx] = 0x4000;
        ASSERT_TRUE(run(invpcid));
        if (type == 0) forget(false, p, page);
        if (type == 1) forget(false, p);
        if (type >= 2) forget(type == 2, pcids);
        break;
      }
      case 3:
        if (below(4)) break;
        pge = !pge;
        write_cr4(cpu.state.cr4 ^ cr4::pge);
        forget(true, pcids);
        break;
      case 4:
        if (below(4)) break;
        if (!pcide && pcid) break;
        pcide = !pcide;
        write_cr4(cpu.state.cr4 ^ cr4::pcide);
        if (!pcide) {
          forget(true, pcids);
          pcid = 0;  // CR3's low bits are PWT and PCD now
          switch_to(now, 0, false);
        }
        break;
      case 5:
      case 6:
      case 7:
      case 8:
      case 9: set_entry(below(spaces), page, below(2), below(4) == 0); break;
      default: check(page);
    }
    if (invalidates)
      for (unsigned each = 0; each < pages; ++each) check(each);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(stale_global, 100u) << "the TLB keeps so little that nothing was tested";
  EXPECT_GT(stale_in_other_space, 100u);
}

// The same page at several addresses, each before another.
TEST_P(TlbTest, AJumpGoesToTheNextPageOfWhereItIs) {
  constexpr unsigned places = 4;
  const auto place = [](unsigned n) { return window + (8 + 2 * n) * page_size; };
  for (unsigned n = 0; n < places; ++n)
    for (unsigned next : {0, 1})
      machine.put<u64>(space[0] + 3 * page_size + (8 + 2 * n + next) * 8,
                       (frames + next * (1 + n) * page_size) | keep_bits | (n & 1 || next ? pte::g : 0));
  cpu.state.gpr[rax] = space[0];
  ASSERT_TRUE(run(set_cr3));
  std::mt19937_64 random(6);
  unsigned n = 0;
  for (unsigned tries = 0; tries < 200; ++tries) {
    SCOPED_TRACE(tries);
    if (random() % 4 == 0) {
      n = unsigned(random() % places);
      cpu.state.gpr[rax] = space[0];
      if (random() % 4) {
        ASSERT_TRUE(run(set_cr3));
      }
    }
    cpu.state.gpr[rcx] = place(n) + (mark & ~page_mask) + to_jump;
    ASSERT_TRUE(run(jump));
    ASSERT_EQ(cpu.state.gpr[rdx], 1 + n);
  }
}

TEST_P(TlbTest, InvpcidRefuses) {
  const auto invalidate = [&](u64 type, u64 low, u64 high) {
    machine.put<u64>(0x4000, low);
    machine.put<u64>(0x4008, high);
    cpu.state.gpr[rax] = type, cpu.state.gpr[rcx] = 0x4000;
    cpu.state.gpr[x86::rsp] = 0x7000;
    const bool done = run(invpcid);
    if (!done) {
      EXPECT_EQ(cpu.state.rip, 0x6000u + 16 * x86::exception::gp + 1);
      EXPECT_EQ(word(cpu.state.gpr[x86::rsp], 0), 0u) << "the error code";
      EXPECT_EQ(word(cpu.state.gpr[x86::rsp], 1), invpcid) << "the instruction";
    }
    return done;
  };
  constexpr u64 not_canonical = 1ull << 47;
  for (u64 type = 0; type < 4; ++type) {
    EXPECT_TRUE(invalidate(type, 0, 0));
    for (unsigned bit = 12; bit < 64; ++bit) EXPECT_FALSE(invalidate(type, 1ull << bit, 0)) << type << ", bit " << bit;
    EXPECT_EQ(invalidate(type, 0, not_canonical), type != 0);
    EXPECT_EQ(invalidate(type, 0xfff, 0), type >= 2) << "without CR4.PCIDE there is PCID 0 alone";
  }
  for (u64 type : {u64(4), u64(5), u64(1) << 32, ~u64(0)}) EXPECT_FALSE(invalidate(type, 0, 0)) << type;
  cpu.state.cr4 |= cr4::pcide;
  for (u64 type = 0; type < 4; ++type) EXPECT_TRUE(invalidate(type, 0xfff, 0));
}

INSTANTIATE_TEST_SUITE_P(Engines, TlbTest, testing::Values(Kind::interpret, Kind::translate),
                         [](const auto& info) { return info.param == Kind::interpret ? "interpret" : "translate"; });

}  // namespace
}  // namespace anykvm::engine
