// Parsing of sizes, durations, disks.
#include "tools/options.h"

#include <CLI/Error.hpp>
#include <charconv>
#include <cmath>

namespace anykvm::tools {

u64 parse_memory(const std::string& text) {
  const auto refuse = [&](const char* why) { throw CLI::ValidationError("--memory", "'" + text + "' " + why); };
  u64 number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest == text.data()) refuse("is not a size such as 512M or 2G");
  unsigned shift = 20;
  if (rest != end) {
    const std::string unit(rest, end);
    if (unit == "K" || unit == "k")
      shift = 10;
    else if (unit == "M" || unit == "m")
      shift = 20;
    else if (unit == "G" || unit == "g")
      shift = 30;
    else
      refuse("is not a size such as 512M or 2G");
  }
  constexpr u64 least = u64{8} << 20, most = u64{1} << 40;
  if (number > most >> shift) refuse("is more than 1024G");
  if (number << shift < least) refuse("is less than 8M, in which no kernel starts");
  return number << shift;
}

std::chrono::nanoseconds parse_duration(const std::string& option, const std::string& text) {
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  const std::string unit(error == std::errc{} ? rest : end, end);
  const double scale = unit.empty() || unit == "s" ? 1 : unit == "m" ? 60 : 0;
  constexpr double most_seconds = 1e9;
  if (error != std::errc{} || scale == 0 || !std::isfinite(number) || number <= 0 || number * scale > most_seconds)
    throw CLI::ValidationError(option, "'" + text + "' is not a time in seconds above zero, such as 60");
  return std::chrono::nanoseconds(static_cast<s64>(number * scale * 1e9));
}

vmm::DiskOption parse_disk(const std::string& text) {
  vmm::DiskOption disk{.path = text};
  if (disk.path.ends_with(",ro")) {
    disk.read_only = true;
    disk.path.resize(disk.path.size() - 3);
  } else if (const auto comma = disk.path.rfind(','); comma != std::string::npos &&
                                                      disk.path.find('/', comma) == std::string::npos &&
                                                      disk.path.size() - comma <= 4) {
    throw CLI::ValidationError("--disk",
                               "'" + text.substr(comma + 1) + "' is not known behind the file's name: only ',ro' is");
  }
  if (disk.path.empty()) throw CLI::ValidationError("--disk", "no file is named");
  return disk;
}

}  // namespace anykvm::tools
