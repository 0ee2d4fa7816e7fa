// The report is one JSON value; the text is made from it, so that both say the same.
#include "tools/info.h"

#include <cpuid.h>
#include <fmt/format.h>
#include <sys/utsname.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "abi/capabilities.h"
#include "abi/ioctl_table.h"
#include "abi/support_table.h"
#include "tools/engine_choice.h"

namespace anykvm::tools {

namespace {

using nlohmann::ordered_json;

/// The features that decide which engines can run and how fast. Everything else goes to the guest as it is.
struct Feature {
  const char* name;
  const char* use;
  unsigned leaf, subleaf;
  enum { eax, ebx, ecx, edx } where;
  unsigned bit;
};
constexpr Feature features[] = {
    {"vmx", "hardware virtualisation (Intel), for the host's KVM", 1, 0, Feature::ecx, 5},
    {"svm", "hardware virtualisation (AMD), for the host's KVM", 0x8000'0001, 0, Feature::ecx, 2},
    {"hypervisor", "this host is a guest itself", 1, 0, Feature::ecx, 31},
    {"sse4_2", "x86-64-v2 guests", 1, 0, Feature::ecx, 20},
    {"avx", "AVX in guests", 1, 0, Feature::ecx, 28},
    {"avx2", "x86-64-v3 guests", 7, 0, Feature::ebx, 5},
    {"fma", "x86-64-v3 guests", 1, 0, Feature::ecx, 12},
    {"bmi1", "x86-64-v3 guests", 7, 0, Feature::ebx, 3},
    {"bmi2", "flag-free shifts in translated code", 7, 0, Feature::ebx, 8},
    {"avx512f", "AVX-512 on this host", 7, 0, Feature::ebx, 16},
    {"aes", "AES in guests", 1, 0, Feature::ecx, 25},
    {"sha_ni", "SHA in guests", 7, 0, Feature::ebx, 29},
    {"xsave", "extended state in guests", 1, 0, Feature::ecx, 26},
    {"fsgsbase", "the GS base for translated code", 7, 0, Feature::ebx, 0},
    {"erms", "fast string copies", 7, 0, Feature::ebx, 9},
    {"constant_tsc", "a guest TSC that needs no scaling", 0x8000'0007, 0, Feature::edx, 8},
};

bool has(const Feature& feature) {
  unsigned registers[4];
  if (!__get_cpuid_count(feature.leaf, feature.subleaf, &registers[0], &registers[1], &registers[2], &registers[3]))
    return false;
  return registers[feature.where] >> feature.bit & 1;
}

std::string cpu_name() {
  std::string name;
  for (unsigned leaf = 0x8000'0002; leaf <= 0x8000'0004; ++leaf) {
    unsigned registers[4];
    if (!__get_cpuid(leaf, &registers[0], &registers[1], &registers[2], &registers[3])) return "unknown";
    name.append(reinterpret_cast<const char*>(registers), sizeof registers);
  }
  name.resize(std::strlen(name.c_str()));
  const auto begin = name.find_first_not_of(' ');
  return begin == std::string::npos ? "unknown" : name.substr(begin, name.find_last_not_of(' ') - begin + 1);
}

ordered_json report() {
  const EngineChoice choice = choose_engine("auto", true);
  ordered_json result;
  result["version"] = ANYKVM_VERSION;
  result["engine"] = {{"name", choice.name}, {"reason", choice.reason}};
  result["host_kvm"] = {{"serves_stock_guests", choice.host}, {"finding", choice.host_kvm}};
  utsname host;
  uname(&host);
  ordered_json list = ordered_json::array();
  for (const Feature& feature : features)
    list.push_back({{"name", feature.name}, {"present", has(feature)}, {"use", feature.use}});
  result["host"] = {{"cpu", cpu_name()},
                    {"cpus", std::thread::hardware_concurrency()},
                    {"kernel", std::string(host.sysname) + " " + host.release},
                    {"features", list}};
  const auto tables = ordered_json::parse(abi::support_table_json());
  result["ioctls"] = tables["ioctls"];
  result["capabilities"] = tables["capabilities"];
  return result;
}

void print_text(const ordered_json& report) {
  const auto text = [](const ordered_json& value) { return value.get<std::string>(); };
  fmt::print("anykvm {}\n\n", text(report["version"]));
  fmt::print("Engine here:    {}\n", text(report["engine"]["name"]));
  fmt::print("Because:        {}\n", text(report["engine"]["reason"]));
  fmt::print("Host's KVM:     {}\n", report["host_kvm"]["serves_stock_guests"].get<bool>()
                                         ? "serves stock guests"
                                         : "does not serve stock guests");
  fmt::print("Host:           {} x {}, {}\n\n", report["host"]["cpus"].get<unsigned>(), text(report["host"]["cpu"]),
             text(report["host"]["kernel"]));
  fmt::print("Host CPU features that matter\n");
  for (const auto& feature : report["host"]["features"])
    fmt::print("  {:<13} {:<4} {}\n", text(feature["name"]), feature["present"].get<bool>() ? "yes" : "no",
               text(feature["use"]));
  fmt::print("\nIoctls of the software engine\n");
  for (const abi::Ioctl& ioctl : abi::ioctls())
    fmt::print("  {:#010x}  {:<6} {}\n", ioctl.number, abi::to_string(ioctl.fd), ioctl.name);
  fmt::print("\nCapabilities of the software engine\n");
  for (const abi::Capability& capability : abi::capabilities())
    fmt::print("  {:>3}  {:<42} {}\n", capability.number, capability.name, capability.value());
}

}  // namespace

int info(bool json) {
  const auto result = report();
  if (json)
    fmt::print("{}\n", result.dump(2));
  else
    print_text(result);
  return 0;
}

}  // namespace anykvm::tools
