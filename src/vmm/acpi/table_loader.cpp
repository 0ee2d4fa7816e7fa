// The tables as files, with addresses relative to their file, and the script that makes them absolute and their
// checksums right again. (QEMU, hw/acpi/bios-linker-loader.c: commands of 128 bytes.)
#include <algorithm>
#include <string_view>

#include "vmm/acpi/tables.h"

namespace anykvm::vmm {

namespace {

class Script {
 public:
  void allocate(std::string_view file, u32 alignment, bool low) {
    begin(1);
    name(file);
    number(alignment, 4);
    number(low ? 2 : 1, 1);  // 2: where the RSDP is looked for
    end();
  }
  /// Adds the address of `target` to the `bytes` at `offset` of `file`.
  void add_pointer(std::string_view file, std::string_view target, u32 offset, u8 bytes) {
    begin(2);
    name(file);
    name(target);
    number(offset, 4);
    number(bytes, 1);
    end();
  }
  /// Makes the `length` bytes from `start` on sum to zero by the byte at `offset`.
  void add_checksum(std::string_view file, u32 offset, u32 start, u32 length) {
    begin(3);
    name(file);
    number(offset, 4);
    number(start, 4);
    number(length, 4);
    end();
  }
  std::vector<u8> finish() { return std::move(bytes_); }

 private:
  static constexpr size_t entry_size = 128, name_size = 56;
  void begin(u32 command) { number(command, 4); }
  void name(std::string_view text) {
    bytes_.insert(bytes_.end(), text.begin(), text.end());
    bytes_.insert(bytes_.end(), name_size - text.size(), 0);
  }
  void number(u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) bytes_.push_back(u8(value >> (8 * i)));
  }
  void end() { bytes_.resize((bytes_.size() + entry_size - 1) / entry_size * entry_size); }

  std::vector<u8> bytes_;
};

// Offsets of the specification (ACPI 6.4, chapter 5).
constexpr u32 header_size = 36, header_checksum = 9;
constexpr u32 fadt_dsdt = 40, fadt_x_dsdt = 140;
constexpr u32 rsdp_checksum = 8, rsdp_xsdt = 24, rsdp_extended_checksum = 32;

}  // namespace

AcpiFiles make_acpi_files(const AcpiMachine& machine) {
  AcpiFiles files;
  Script script;
  constexpr auto tables = AcpiFiles::tables_name, rsdp = AcpiFiles::rsdp_name;
  script.allocate(tables, 64, false);
  script.allocate(rsdp, 16, true);

  struct Place {
    u32 offset, size;
  };
  const auto place = [&](const std::vector<u8>& table) {
    files.tables.resize((files.tables.size() + 15) & ~size_t{15});
    const Place at{u32(files.tables.size()), u32(table.size())};
    files.tables.insert(files.tables.end(), table.begin(), table.end());
    return at;
  };
  const auto pointer = [&](u32 offset, u8 bytes) { script.add_pointer(tables, tables, offset, bytes); };
  const auto checksum = [&](Place at) { script.add_checksum(tables, at.offset + header_checksum, at.offset, at.size); };

  const Place dsdt = place(make_dsdt(machine));
  const Place fadt = place(make_fadt(dsdt.offset));
  pointer(fadt.offset + fadt_dsdt, 4);
  pointer(fadt.offset + fadt_x_dsdt, 8);
  checksum(fadt);
  const Place madt = place(make_madt(machine));
  const Gpa listed[] = {fadt.offset, madt.offset};
  const Place xsdt = place(make_xsdt(listed));
  for (u32 i = 0; i < std::size(listed); ++i) pointer(xsdt.offset + header_size + 8 * i, 8);
  checksum(xsdt);

  files.rsdp = make_rsdp(xsdt.offset);
  script.add_pointer(rsdp, tables, rsdp_xsdt, 8);
  script.add_checksum(rsdp, rsdp_checksum, 0, 20);
  script.add_checksum(rsdp, rsdp_extended_checksum, 0, u32(files.rsdp.size()));
  files.loader = script.finish();
  return files;
}

}  // namespace anykvm::vmm
