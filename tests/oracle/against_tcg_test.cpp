// What user mode cannot show, against QEMU's TCG: the same generated guest runs in the engine and in QEMU, and leaves
// the same memory behind. Where TCG is wrong by the manuals, tcg_mistakes.cpp says so.
//
// ANYKVM_ORACLE_SEED and ANYKVM_ORACLE_ROUNDS choose other tests and more (`make fuzz-system`), ANYKVM_ORACLE_REPORTS
// how many differences of a guest are shown. The engine is the reference one unless ANYKVM_ENGINE names another:
// translate does not keep the flags that are compared (docs/quirks.md), translate-exact does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>

#include "oracle/legacy_guest.h"
#include "oracle/long_guest.h"
#include "oracle/machines.h"

namespace anykvm::oracle {
namespace {

u64 from_environment(const char* name, u64 otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

/// `rounds` guests, as few and short as every test run has time for, unless the environment asks for other ones.
template <class AnyGuest>
void compare(u64 rounds, auto... arguments) {
  if (!qemu_is_there()) GTEST_SKIP() << "no qemu-system-x86_64";
  const bool is_long = std::getenv("ANYKVM_ORACLE_ROUNDS");
  const unsigned tests = is_long ? 2000 : 800;
  const u64 first = from_environment("ANYKVM_ORACLE_SEED", 1);
  rounds = from_environment("ANYKVM_ORACLE_ROUNDS", rounds);
  u64 compared = 0, shutdowns = 0, lost = 0;
  for (u64 seed = first; seed < first + rounds; ++seed) {
    AnyGuest guest(seed, tests, arguments...);
    std::string why;
    End end, their_end;
    Memory ours, theirs;
    for (;;) {
      ours = run_in_engine(guest, end, why);
      theirs = run_in_qemu(guest, end == End::none ? int(tests_done(guest, ours)) : -1, their_end);
      ASSERT_EQ(theirs.size(), ours.size());
      if (end == End::guests && their_end == End::guests) break;
      // Both may have shut down or loop, or TCG not have survived. The others go on without that test.
      const unsigned done = tests_done(guest, ours), their_done = tests_done(guest, theirs);
      const bool same_end = done == their_done && end == their_end;
      ASSERT_TRUE(same_end || (their_done < done && their_end != End::guests))
          << "seed " << seed << ": " << why << ", TCG's end " << int(their_end) << ", "
          << report(guest, ours, theirs, std::min(done, their_done));
      same_end ? ++shutdowns : ++lost;
      ASSERT_LT(lost, 4 + compared / 100)
          << "seed " << seed << ", TCG ends in " << report(guest, ours, theirs, their_done);
      guest.skip(their_done);
    }
    u64 reports = from_environment("ANYKVM_ORACLE_REPORTS", 1);
    for (int test = -1; (test = next_difference(guest, ours, theirs, unsigned(test + 1))) != -1 && reports; --reports)
      ADD_FAILURE() << "seed " << seed << ", " << report(guest, ours, theirs, unsigned(test));
    if (testing::Test::HasFailure()) return;
    compared += guest.tests;
  }
  if (is_long)
    std::cout << compared << " tests, of which " << shutdowns << " neither machine ended and " << lost
              << " were too much for TCG; where TCG is known to be wrong:\n"
              << mistakes_met();
}

TEST(AgainstTcg, SegmentsGatesTasksAndModes) { compare<LegacyGuest>(2, LegacySubject::segments); }
TEST(AgainstTcg, LegacyPaging) { compare<LegacyGuest>(2, LegacySubject::paging); }
TEST(AgainstTcg, LongModeTransfers) { compare<LongGuest>(2, Subject::transfers); }
TEST(AgainstTcg, LongModeRegisters) { compare<LongGuest>(2, Subject::registers); }
TEST(AgainstTcg, LongModePaging) { compare<LongGuest>(2, Subject::paging); }
TEST(AgainstTcg, LongModeDebugging) { compare<LongGuest>(2, Subject::debugging); }
TEST(AgainstTcg, LongModeNmis) { compare<LongGuest>(2, Subject::nmis); }
TEST(AgainstTcg, LongModeExceptions) { compare<LongGuest>(2, Subject::exceptions); }

}  // namespace
}  // namespace anykvm::oracle
