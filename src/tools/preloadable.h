// Whether a program will load what LD_PRELOAD names. Said beforehand: the program itself would only find no /dev/kvm.
#pragma once

#include <optional>
#include <string>

namespace anykvm::tools {

/// Where execvp(3) finds the program: by its path, or in PATH. On failure `path` is empty and `error` an errno: ENOENT
/// and its kind, or EACCES and its kind for what is there and cannot be executed.
struct FoundProgram {
  std::string path;
  int error = 0;
};
FoundProgram find_program(const std::string& name);

/// Why the program at this path, or the interpreter of a script, does not load a preloaded library, as a clause with
/// the file's name in it; nothing when it does. What cannot be read is taken to be as programs are.
std::optional<std::string> preload_obstacle(const std::string& path);

}  // namespace anykvm::tools
