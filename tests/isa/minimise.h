// Makes a failing case smaller while it fails in the same field.
#pragma once

#include <functional>

#include "isa/state.h"

namespace anykvm::isa {

/// `fails`: runs a case on both sides and says whether it still fails the same way.
Case minimise(const Case& from, const std::function<bool(const Case&)>& fails);

}  // namespace anykvm::isa
