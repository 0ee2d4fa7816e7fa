// Where TCG (QEMU 7.2) is wrong by the manuals: the one list, each with the rule, recognised as narrowly as can be.
#pragma once

#include <span>

#include "oracle/guest.h"

namespace anykvm::oracle {

/// One test's two endings.
struct Case {
  const Guest& guest;
  unsigned test;
  Ending mine, other;        ///< ours, TCG's
  std::span<const u8> code;  ///< at our RIP
  u64 code_segment = 0;      ///< the descriptor of our CS
  u64 named = 0;             ///< the descriptor that our error code names
};

/// A value in the log entries.
struct Difference {
  const char* field;
  unsigned index;
  u64 mine, other;
};

struct Mistake {
  const char* rule;  ///< what TCG does, and what it should do
  /// Whether this difference is of this mistake.
  bool (*explains)(const Case&, const Difference&);
  unsigned met = 0;
};

std::span<Mistake> tcg_mistakes();

}  // namespace anykvm::oracle
