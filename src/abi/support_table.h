// The two tables as text: docs/ioctls.md is the first function's output, `anykvm info` prints either.
#pragma once

#include <string>

namespace anykvm::abi {

/// The Markdown page: every ioctl, every extension.
std::string support_table_markdown();

/// {"ioctls": [{number, name, fd, argument, type, size, capability}...], "capabilities": [{number, name, value}...]}
std::string support_table_json();

}  // namespace anykvm::abi
