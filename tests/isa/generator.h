// Makes cases: a few instructions of given or random forms, and a state in which their operands lie where something can
// be seen.
#pragma once

#include <span>
#include <vector>

#include "isa/forms.h"
#include "isa/state.h"
#include "isa/worker.h"

namespace anykvm::isa {

class Generator {
 public:
  /// `features`: the XCR0 components that take part. `modes`: whose code to make.
  Generator(u64 seed, u64 features, std::vector<Mode> modes);

  /// Moves the forms that the host does not execute to those that fault, so that they do not take every turn.
  void sort_out(Worker& worker);
  /// What the data pages hold before the pokes.
  std::span<const u8, data_total> pattern() const { return pattern_; }
  /// Case `number` of this seed; always the same.
  void make(u64 number, Case& c) const;
  /// Another one: a block of up to 30 instructions, most of them the common ones, with branches and loops.
  void make_block(u64 number, Case& c) const;

  struct Coverage {
    std::size_t forms, undefined;
  };
  Coverage coverage(Mode mode) const;
  u64 features() const { return features_; }

 private:
  struct Forms {
    Mode mode;
    std::vector<Form> runs, faults;
    std::vector<Form> common;  ///< of those that run, the one-byte opcodes
  };
  void begin(u64 number, Mode mode, Case& c) const;
  const Form& choose(const Forms& forms, u64 turn, bool first, Random& random) const;

  u64 seed_, features_;
  std::vector<Forms> modes_;
  Registers base_;
  alignas(64) u8 pattern_[data_total];
};

}  // namespace anykvm::isa
