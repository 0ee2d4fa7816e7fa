// What user mode cannot show, against QEMU's TCG: the same generated guest runs in the engine and in QEMU, and leaves
// the same memory behind. Where TCG is wrong by the manuals, tcg_mistakes.cpp says so.
//
// ANYKVM_ORACLE_SEED and ANYKVM_ORACLE_ROUNDS choose other tests and more (`make fuzz-system`).
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "oracle/legacy_guest.h"
#include "oracle/machines.h"

namespace anykvm::oracle {
namespace {

constexpr unsigned tests_per_guest = 2000;

u64 from_environment(const char* name, u64 otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

template <class AnyGuest>
void compare() {
  if (!qemu_is_there()) GTEST_SKIP() << "no qemu-system-x86_64";
  const u64 first = from_environment("ANYKVM_ORACLE_SEED", 1), rounds = from_environment("ANYKVM_ORACLE_ROUNDS", 1);
  u64 compared = 0;
  for (u64 seed = first; seed < first + rounds; ++seed) {
    const AnyGuest guest(seed, tests_per_guest);
    std::string end;
    const Memory ours = run_in_engine(guest, end), theirs = run_in_qemu(guest);
    ASSERT_EQ(theirs.size(), ours.size());
    const int different = first_difference(guest, ours, theirs);
    ASSERT_EQ(different, -1) << "seed " << seed << ", " << report(guest, ours, theirs, unsigned(different));
    const unsigned done = tests_done(guest, ours);
    ASSERT_TRUE(end.empty() && done == guest.tests)
        << "seed " << seed << ": " << end << ", " << report(guest, ours, theirs, done);
    ASSERT_EQ(tests_done(guest, theirs), guest.tests) << "seed " << seed;
    compared += guest.tests;
  }
  if (rounds > 1) std::cout << compared << " tests; where TCG is known to be wrong:\n" << mistakes_met();
}

TEST(AgainstTcg, SegmentsGatesTasksAndModes) { compare<LegacyGuest>(); }

}  // namespace
}  // namespace anykvm::oracle
