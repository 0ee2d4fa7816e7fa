// `anykvm info`: what would run here, on what, and what this KVM has.
#pragma once

namespace anykvm::tools {

/// Prints the report to standard output, as text or as JSON; returns the exit code.
int info(bool json);

}  // namespace anykvm::tools
