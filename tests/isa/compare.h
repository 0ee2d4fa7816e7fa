// What differs between two outcomes of a case.
#pragma once

#include <string>
#include <vector>

#include "isa/state.h"

namespace anykvm::isa {

struct Difference {
  std::string field;
  std::string before, host, engine;  ///< hexadecimal
};

/// The components that take part, of the Worker.
bool same(const Case& c, const Outcome& host, const Outcome& engine);
std::vector<Difference> differences(const Case& c, const Outcome& host, const Outcome& engine);

}  // namespace anykvm::isa
