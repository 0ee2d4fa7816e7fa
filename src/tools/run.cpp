// The program runs in this process's place, with libanykvm-preload.so before everything else that it loads; what it
// starts inherits that.
#include "tools/run.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sysexits.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "engine/engine.h"
#include "tools/engine_choice.h"
#include "tools/preloadable.h"

namespace anykvm::tools {

namespace {

constexpr int cannot_execute = 126, not_found = 127;
constexpr const char* library_name = "libanykvm-preload.so";

/// Beside the command: lib/ in a build folder, the library folder of an installation.
std::string find_library() {
  std::error_code error;
  const auto command = std::filesystem::read_symlink("/proc/self/exe", error);
  const auto prefix = command.parent_path().parent_path();
  for (const char* folder : {ANYKVM_LIBRARY_FOLDER, "lib"})
    if (const auto path = prefix / folder / library_name; std::filesystem::exists(path, error)) return path;
  return {};
}

/// LD_PRELOAD without our library: at most one of several builds may be loaded.
std::string other_preloads() {
  const char* variable = std::getenv("LD_PRELOAD");
  std::string_view rest = variable ? variable : "";
  std::string others;
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find_first_of(" :"), rest.size());
    const std::string_view entry = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (entry.empty() || std::filesystem::path(entry).filename() == library_name) continue;
    others += (others.empty() ? "" : ":") + std::string(entry);
  }
  return others;
}

int fail(int status, const std::string& message) {
  fmt::print(stderr, "anykvm: {}\n", message);
  return status;
}

int fail_to_execute(const std::string& name, int error) {
  const bool missing = error == ENOENT || error == ENOTDIR;
  return fail(missing ? not_found : cannot_execute,
              fmt::format("{}: {}", name, missing ? "not found" : std::strerror(error)));
}

int execute(const std::string& path, const std::vector<std::string>& program) {
  std::vector<char*> arguments;
  for (const std::string& argument : program) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  execv(path.c_str(), arguments.data());
  if (errno == ENOEXEC) {  // a script without a first line that says so
    std::string shell = "sh", script = path;
    arguments[0] = script.data();
    arguments.insert(arguments.begin(), shell.data());
    execv("/bin/sh", arguments.data());
  }
  return fail_to_execute(program[0], errno);
}

/// Once, before the program starts, and never into a pipe: test runners read it.
void announce(const RunOptions& options, const std::string& what) {
  if (!options.quiet && isatty(STDERR_FILENO)) fmt::print(stderr, "anykvm: {}\n", what);
}

}  // namespace

int run_program(const RunOptions& options) {
  const std::string& name = options.program[0];
  const FoundProgram found = find_program(name);
  if (found.error) return fail_to_execute(name, found.error);

  const EngineChoice choice = choose_engine(options.engine, true);
  std::string preloads = other_preloads();
  if (choice.host) {
    announce(options, fmt::format("/dev/kvm is the host's ({})", choice.reason));
    if (options.statistics || !options.trace.empty())
      fmt::print(stderr, "anykvm: there are no statistics and no trace of the host's KVM\n");
    preloads.empty() ? unsetenv("LD_PRELOAD") : setenv("LD_PRELOAD", preloads.c_str(), 1);
    return execute(found.path, options.program);
  }
  if (engine::Kind kind; !engine::parse_kind(choice.name, kind))
    return fail(EX_UNAVAILABLE, fmt::format("the engine {} needs a processor with BMI2", choice.name));
  if (const auto obstacle = preload_obstacle(found.path))
    return fail(EX_UNAVAILABLE, *obstacle + ": LD_PRELOAD does not reach it, and it would not find this KVM");
  const std::string library = find_library();
  if (library.empty()) return fail(EX_UNAVAILABLE, fmt::format("{} is not beside the command", library_name));
  if (library.find_first_of(" :") != std::string::npos)
    return fail(EX_UNAVAILABLE, library + " has a space or a colon in its path, which LD_PRELOAD cannot express");

  if (!options.trace.empty()) {
    // Empty, for the processes to add to.
    const int fd = open(options.trace.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail(EX_CANTCREAT, fmt::format("cannot write {}: {}", options.trace, std::strerror(errno)));
    close(fd);
    setenv("ANYKVM_TRACE", std::filesystem::absolute(options.trace).c_str(), 1);
  }
  announce(options, fmt::format("/dev/kvm is the software engine {} ({})", choice.name, choice.reason));
  setenv("LD_PRELOAD", (library + (preloads.empty() ? "" : ":") + preloads).c_str(), 1);
  setenv("ANYKVM_ENGINE", choice.name.c_str(), 1);
  setenv("ANYKVM_QUIET", "1", 1);  // it has been said, or was not wanted
  if (!options.quiet) setenv("ANYKVM_ERRORS", "1", 1);
  if (options.statistics) setenv("ANYKVM_STATS", "1", 1);
  return execute(found.path, options.program);
}

}  // namespace anykvm::tools
