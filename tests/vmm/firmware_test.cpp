// What firmware finds: its ROM, the configuration device, the script for the ACPI tables, early ports.
#include "vmm/firmware.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "vmm/acpi/tables.h"
#include "vmm/loader/kernel.h"

namespace anykvm::vmm {
namespace {

using ::testing::HasSubstr;

struct FirmwareFile {
  explicit FirmwareFile(std::vector<u8> bytes) : path(testing::TempDir() + "firmware-" + std::to_string(getpid())) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  }
  ~FirmwareFile() { std::filesystem::remove(path); }
  std::string path;
};

std::vector<u8> image(size_t size, u8 reset_vector) {
  std::vector<u8> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = u8(i >> 12);
  if (size >= 16) bytes[size - 16] = reset_vector;
  return bytes;
}

std::string refusal(const std::string& path) {
  try {
    FirmwareRom rom(path);
  } catch (const BadInput& error) {
    return error.what();
  }
  return {};
}

TEST(FirmwareRom, EndsAtFourGiBAndIsShadowed) {
  const FirmwareFile file(image(256 << 10, 0xea));
  const FirmwareRom rom(file.path);
  EXPECT_EQ(rom.base(), 0xfffc'0000u);
  const GuestMemory memory(4 << 20);
  rom.write_shadow(memory);
  EXPECT_EQ(memory.at(0xffff0, 1)[0], 0xea);
  EXPECT_EQ(std::memcmp(memory.at(0xe0000, 0x20000).data(), rom.host() + 0x20000, 0x20000), 0);
  EXPECT_EQ(memory.at(0xdffff, 1)[0], 0) << "no more than 128 KiB";
}

TEST(FirmwareRom, RefusesWhatIsNone) {
  EXPECT_THAT(refusal("/nonexistent/bios.bin"), HasSubstr("/nonexistent/bios.bin"));
  const FirmwareFile empty({});
  EXPECT_THAT(refusal(empty.path), HasSubstr("empty"));
  const FirmwareFile cut(image((128 << 10) - 512, 0xea));
  EXPECT_THAT(refusal(cut.path), HasSubstr("cut off"));
  const FirmwareFile small(image(32 << 10, 0xea));
  EXPECT_THAT(refusal(small.path), HasSubstr("32768 bytes"));
  const FirmwareFile erased(image(128 << 10, 0xff));
  EXPECT_THAT(refusal(erased.path), HasSubstr("reset vector"));
}

struct FwCfgTest : testing::Test {
  GuestMemory memory{1 << 20};
  FwCfg device{memory};

  void select(u16 item) {
    const u8 bytes[] = {u8(item), u8(item >> 8)};
    device.write(0, bytes);
  }
  std::vector<u8> read(size_t count) {
    std::vector<u8> result(count);
    for (u8& byte : result) device.read(1, {&byte, 1});
    return result;
  }
  void dma(u32 control, u32 length, Gpa address) {
    constexpr Gpa descriptor = 0x1000;
    u8 bytes[16];
    for (int i = 0; i < 4; ++i) bytes[i] = u8(control >> (24 - 8 * i)), bytes[4 + i] = u8(length >> (24 - 8 * i));
    for (int i = 0; i < 8; ++i) bytes[8 + i] = u8(address >> (56 - 8 * i));
    memory.write(descriptor, bytes);
    const u8 low[] = {0, 0, u8(descriptor >> 8), u8(descriptor)};
    device.write(8, low);
  }
  u8 dma_result() { return memory.at(0x1003, 1)[0]; }
};

TEST_F(FwCfgTest, IdentifiesItself) {
  select(FwCfg::signature);
  EXPECT_EQ(read(5), (std::vector<u8>{'Q', 'E', 'M', 'U', 0}));
  select(FwCfg::id);
  EXPECT_EQ(read(4), (std::vector<u8>{3, 0, 0, 0}));
  u8 port[8];
  device.read(4, port);
  EXPECT_EQ(std::memcmp(port, "QEMU CFG", 8), 0);
}

TEST_F(FwCfgTest, FilesAreInTheDirectory) {
  device.add_file("etc/two", std::vector<u8>{1, 2, 3});
  device.add_file("etc/one", 0x3f8, 2);
  select(FwCfg::directory);
  const auto bytes = read(4 + 2 * 64);
  EXPECT_EQ(bytes[3], 2) << "count";
  EXPECT_STREQ(reinterpret_cast<const char*>(&bytes[4 + 8]), "etc/one") << "sorted by name";
  EXPECT_EQ(bytes[4 + 3], 2) << "size";
  EXPECT_STREQ(reinterpret_cast<const char*>(&bytes[4 + 64 + 8]), "etc/two");
  select(u16(bytes[4 + 64 + 4] << 8 | bytes[4 + 64 + 5]));
  EXPECT_EQ(read(4), (std::vector<u8>{1, 2, 3, 0}));
  EXPECT_THROW(device.add_file(std::string(56, 'x'), std::vector<u8>{}), std::logic_error);
}

TEST_F(FwCfgTest, TransfersByDma) {
  device.add_file("file", std::vector<u8>{1, 2, 3, 4, 5});
  memory.at(0x2000, 8)[4] = 9;
  dma(0x20'0008 | 0x02, 2, 0x2000);  // select the first file, read
  EXPECT_EQ(dma_result(), 0);
  dma(0x04, 1, 0);       // skip
  dma(0x02, 3, 0x2002);  // read to the end and beyond
  EXPECT_EQ(std::memcmp(memory.at(0x2000, 5).data(), "\1\2\4\5\0", 5), 0);
  dma(0x20'0008 | 0x02, 2, 0x10'0000);
  EXPECT_EQ(dma_result(), 1) << "no memory there";
  dma(0x20'0008 | 0x10, 1, 0x2000);
  EXPECT_EQ(dma_result(), 1) << "nothing can be written";
}

/// Does what firmware does with the script, and checks what came of it.
TEST(AcpiFiles, ScriptMakesTablesThatAreWhole) {
  const PciSlot slots[] = {{2, 10}, {3, 11}};
  AcpiFiles files = make_acpi_files({.cpus = 2, .pci = slots});
  constexpr Gpa tables_at = 0x1ff0'0000, rsdp_at = 0xf'6000;
  ASSERT_EQ(files.loader.size() % 128, 0u);
  const auto number = [](const u8* at, unsigned bytes) {
    u64 value = 0;
    std::memcpy(&value, at, bytes);
    return value;
  };
  for (size_t at = 0; at < files.loader.size(); at += 128) {
    const u8* entry = &files.loader[at];
    const auto name = [&](size_t offset) { return std::string(reinterpret_cast<const char*>(entry + offset)); };
    auto& file = name(4) == AcpiFiles::rsdp_name ? files.rsdp : files.tables;
    switch (number(entry, 4)) {
      case 1: EXPECT_EQ(entry[64], name(4) == AcpiFiles::rsdp_name ? 2 : 1); break;
      case 2: {
        const u64 offset = number(entry + 116, 4);
        const unsigned bytes = entry[120];
        const u64 value = number(&file[offset], bytes) + (name(60) == AcpiFiles::rsdp_name ? rsdp_at : tables_at);
        std::memcpy(&file[offset], &value, bytes);
        break;
      }
      case 3: {
        const u64 offset = number(entry + 60, 4), start = number(entry + 64, 4), length = number(entry + 68, 4);
        ASSERT_LE(start + length, file.size());
        file[offset] = u8(file[offset] - std::accumulate(&file[start], &file[start] + length, 0));
        break;
      }
      default: FAIL() << "command " << number(entry, 4);
    }
  }
  const auto sum = [](std::span<const u8> bytes) { return u8(std::accumulate(bytes.begin(), bytes.end(), 0)); };
  EXPECT_EQ(sum(std::span(files.rsdp).first(20)), 0);
  EXPECT_EQ(sum(files.rsdp), 0);
  const auto table = [&](u64 address, const char* signature) {
    const auto rest = std::span(files.tables).subspan(address - tables_at);
    EXPECT_EQ(std::memcmp(rest.data(), signature, 4), 0) << signature;
    const auto bytes = rest.first(number(&rest[4], 4));
    EXPECT_EQ(sum(bytes), 0) << signature;
    return bytes;
  };
  const auto xsdt = table(number(&files.rsdp[24], 8), "XSDT");
  const auto fadt = table(number(&xsdt[36], 8), "FACP");
  table(number(&xsdt[44], 8), "APIC");
  EXPECT_EQ(number(&fadt[40], 4), number(&fadt[140], 8));
  const auto dsdt = table(number(&fadt[140], 8), "DSDT");
  EXPECT_THAT(std::string(dsdt.begin(), dsdt.end()), HasSubstr("_PRT"));
}

TEST(SystemControlPort, FastResetAndA20) {
  unsigned resets = 0;
  SystemControlPort port([&] { ++resets; });
  const auto write = [&](u8 value) { port.write(0, {&value, 1}); };
  u8 value[1];
  write(0x00);
  port.read(0, value);
  EXPECT_EQ(value[0], 0x02) << "A20 stays open";
  EXPECT_EQ(resets, 0u);
  write(0x03);
  write(0x03);
  EXPECT_EQ(resets, 1u) << "an edge";
}

}  // namespace
}  // namespace anykvm::vmm
