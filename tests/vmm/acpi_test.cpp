// AML bytes against the specification's encoding, checksums, and iasl's opinion when it is installed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "vmm/acpi/aml.h"
#include "vmm/acpi/tables.h"

namespace anykvm::vmm {
namespace {

using ::testing::HasSubstr;

u8 sum(std::span<const u8> bytes) { return u8(std::accumulate(bytes.begin(), bytes.end(), 0)); }

const VirtioSlot slots[] = {{0xd000'0000, 0x1000, 16}, {0xd000'1000, 0x1000, 17}};
const AcpiMachine machine{.cpus = 4, .virtio = slots};

TEST(Aml, Integers) {
  EXPECT_EQ(aml::integer(0), (aml::Bytes{0x00}));
  EXPECT_EQ(aml::integer(1), (aml::Bytes{0x01}));
  EXPECT_EQ(aml::integer(0xff), (aml::Bytes{0x0a, 0xff}));
  EXPECT_EQ(aml::integer(0x1234), (aml::Bytes{0x0b, 0x34, 0x12}));
  EXPECT_EQ(aml::integer(0x12345678), (aml::Bytes{0x0c, 0x78, 0x56, 0x34, 0x12}));
  EXPECT_EQ(aml::integer(u64{1} << 32), (aml::Bytes{0x0e, 0, 0, 0, 0, 1, 0, 0, 0}));
}

TEST(Aml, Names) {
  EXPECT_EQ(aml::eisa_id("PNP0501"), (aml::Bytes{0x0c, 0x41, 0xd0, 0x05, 0x01}));
  EXPECT_EQ(aml::name("\\_S5", aml::integer(1)), (aml::Bytes{0x08, '\\', '_', 'S', '5', '_', 0x01}));
  EXPECT_EQ(aml::string("AB"), (aml::Bytes{0x0d, 'A', 'B', 0}));
}

TEST(Aml, PackageLengthCountsItself) {
  const auto length_of = [](size_t content) { return aml::scope("_SB", aml::Bytes(content - 4, 0)); };
  EXPECT_EQ(length_of(62)[1], 63);
  const auto two = length_of(63);  // 63 + 2 = 65 = 0x41
  EXPECT_EQ(two[1], 0x41);
  EXPECT_EQ(two[2], 0x04);
  const auto three = length_of(4094);  // 4094 + 3 = 4097 = 0x1001
  EXPECT_EQ(three[1], 0x81);
  EXPECT_EQ(three[2], 0x00);
  EXPECT_EQ(three[3], 0x01);
}

TEST(AcpiTables, SumToZeroAndKnowTheirLength) {
  const Gpa xsdt_entries[] = {0xe0000, 0xe1000};
  for (const auto& table : {make_dsdt(machine), make_fadt(0xe0100), make_madt(machine), make_xsdt(xsdt_entries)}) {
    EXPECT_EQ(sum(table), 0);
    EXPECT_EQ(u32(table[4] | table[5] << 8), table.size());
  }
  const auto rsdp = make_rsdp(0xe0400);
  EXPECT_EQ(sum(std::span(rsdp).first(20)), 0);
  EXPECT_EQ(sum(rsdp), 0);
}

TEST(AcpiTables, AreFoundFromTheRsdp) {
  const GuestMemory memory(4 << 20);
  const Gpa rsdp = write_acpi_tables(memory, machine);
  const auto u64_at = [&](Gpa at) {
    u64 value = 0;
    std::memcpy(&value, memory.at(at, 8).data(), 8);
    return value;
  };
  EXPECT_EQ(std::memcmp(memory.at(rsdp, 8).data(), "RSD PTR ", 8), 0);
  EXPECT_EQ(rsdp % 16, 0u);
  const Gpa xsdt = u64_at(rsdp + 24), fadt = u64_at(xsdt + 36), madt = u64_at(xsdt + 44);
  EXPECT_EQ(std::memcmp(memory.at(fadt, 4).data(), "FACP", 4), 0);
  EXPECT_EQ(std::memcmp(memory.at(madt, 4).data(), "APIC", 4), 0);
  EXPECT_EQ(std::memcmp(memory.at(u64_at(fadt + 140), 4).data(), "DSDT", 4), 0);
  EXPECT_THROW(write_acpi_tables(memory, {.cpus = 10'000, .virtio = {}}), std::length_error);
}

TEST(AcpiTables, IaslReadsThem) {
  if (std::system("command -v iasl > /dev/null 2>&1") != 0) GTEST_SKIP() << "no iasl here (package acpica-tools)";
  const auto folder = std::filesystem::temp_directory_path() / ("anykvm-acpi-" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  const std::pair<const char*, std::vector<u8>> tables[] = {
      {"dsdt", make_dsdt(machine)}, {"facp", make_fadt(0xe0100)}, {"apic", make_madt(machine)}};
  for (const auto& [name, bytes] : tables) {
    std::ofstream(folder / (std::string(name) + ".aml"), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
    const auto command = "cd " + folder.string() + " && iasl -d " + name + ".aml > " + name + ".log 2>&1";
    EXPECT_EQ(std::system(command.c_str()), 0) << name;
    std::ifstream source(folder / (std::string(name) + ".dsl"));
    const std::string text((std::istreambuf_iterator<char>(source)), {});
    EXPECT_EQ(text.find("Invalid"), std::string::npos) << text;
    EXPECT_EQ(text.find("Unknown"), std::string::npos) << text;
    if (name != std::string("dsdt")) continue;
    EXPECT_THAT(text, HasSubstr("LNRO0005"));
    EXPECT_THAT(text, HasSubstr("PNP0501"));
    // And it compiles again without an error.
    const auto again = "cd " + folder.string() + " && iasl -p again dsdt.dsl > again.log 2>&1";
    EXPECT_EQ(std::system(again.c_str()), 0) << text;
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace anykvm::vmm
