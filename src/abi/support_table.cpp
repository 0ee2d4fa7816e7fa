#include "abi/support_table.h"

#include <cstdio>
#include <string_view>

#include "abi/capabilities.h"
#include "abi/ioctl_table.h"
#include "anykvm/kvm.h"

namespace anykvm::abi {
namespace {

std::string hex(u32 number) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", number);
  return text;
}

std::string argument_of(const Ioctl& row) {
  switch (row.argument) {
    case Argument::none: return "";
    case Argument::value: return std::string(row.type);
    default: return "`struct " + std::string(row.type) + "`";
  }
}

/// Some extensions answer with a number that depends on where it runs; the page must not.
std::string value_on_the_page(const Capability& row) {
  switch (row.number) {
    case KVM_CAP_NR_VCPUS: return "CPUs online";
    case KVM_CAP_XSAVE2: return "bytes, at least 4096";
    default: return std::to_string(row.value());
  }
}

}  // namespace

std::string support_table_markdown() {
  std::string page =
      "# What of the KVM API is there\n\n"
      "Made from the tables in `src/abi/ioctl_table.cpp` and `src/abi/capabilities.cpp`; a test compares, "
      "and rewrites it when `ANYKVM_UPDATE_DOCS` is set. What is not listed answers as a kernel without it: `ENOTTY` "
      "on a VM, `EINVAL` on the system and "
      "on a vCPU, 0 for an extension.\n\n"
      "## ioctls\n\n"
      "| ioctl | number | on | argument | direction | announced by |\n|---|---|---|---|---|---|\n";
  for (const Ioctl& row : ioctls()) {
    page += "| `" + std::string(row.name) + "` | `" + hex(row.number) + "` | " + std::string(to_string(row.fd)) +
            " | " + argument_of(row) + " | " + std::string(to_string(row.argument)) + " | " +
            (row.capability.empty() ? "basic" : "`" + std::string(row.capability) + "`") + " |\n";
  }
  page += "\n## Extensions (`KVM_CHECK_EXTENSION`)\n\n| extension | number | answer |\n|---|---|---|\n";
  for (const Capability& row : capabilities())
    page +=
        "| `" + std::string(row.name) + "` | " + std::to_string(row.number) + " | " + value_on_the_page(row) + " |\n";
  return page;
}

std::string support_table_json() {
  // Names and types are identifiers: nothing in them needs escaping.
  const auto text = [](std::string_view value) { return "\"" + std::string(value) + "\""; };
  std::string json = "{\"ioctls\": [";
  std::string_view separator = "";
  for (const Ioctl& row : ioctls()) {
    json += std::string(separator) + "\n  {\"number\": " + std::to_string(row.number) +
            ", \"name\": " + text(row.name) + ", \"fd\": " + text(to_string(row.fd)) +
            ", \"argument\": " + text(to_string(row.argument)) + ", \"type\": " + text(row.type) +
            ", \"size\": " + std::to_string(row.size) + ", \"capability\": " + text(row.capability) + "}";
    separator = ",";
  }
  json += "\n], \"capabilities\": [";
  separator = "";
  for (const Capability& row : capabilities()) {
    json += std::string(separator) + "\n  {\"number\": " + std::to_string(row.number) +
            ", \"name\": " + text(row.name) + ", \"value\": " + std::to_string(row.value()) + "}";
    separator = ",";
  }
  return json + "\n]}\n";
}

}  // namespace anykvm::abi
