// A failed case for the reader: listing, the state that it starts from, and what differs.
#pragma once

#include <string>

#include "isa/compare.h"

namespace anykvm::isa {

/// One line per instruction: address, bytes, text.
std::string listing(const Case& c);
/// The mnemonics alone: what failures are grouped by.
std::string mnemonics(const Case& c);
/// Everything about one failure.
std::string report(const Case& c, const Outcome& host, const Outcome& engine, const char* engine_name);

}  // namespace anykvm::isa
