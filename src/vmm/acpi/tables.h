// The ACPI tables of our machine. (ACPI 6.4, chapter 5.)
#pragma once

#include <span>
#include <vector>

#include "vmm/guest_memory.h"
#include "x86/types.h"

namespace anykvm::vmm {

/// A device that the guest finds by ACPI: a page of registers and an interrupt.
struct VirtioSlot {
  u32 base;
  u32 size;
  u32 gsi;
};

/// A function on the PCI bus, and the interrupt that firmware routes its INTA# to.
struct PciSlot {
  unsigned slot;
  u32 gsi;
};

struct AcpiMachine {
  unsigned cpus = 1;
  std::span<const VirtioSlot> virtio = {};
  /// Empty: the DSDT has no PCI bus, and a guest finds what is there by itself.
  std::span<const PciSlot> pci = {};
};

/// Where the tables are: in the area that PC firmware has, which the memory map reserves.
inline constexpr Gpa acpi_base = 0xe'0000;
inline constexpr u64 acpi_size = 0x2'0000;

/// Writes the tables and returns the address of the RSDP. Throws std::length_error when the machine has more than the
/// area describes (some thousand CPUs).
Gpa write_acpi_tables(const GuestMemory& memory, const AcpiMachine& machine);

/// The same tables for firmware that puts them where it wants: the contents of fw_cfg's files, and the script
/// (etc/table- loader) that says what to relocate in them.
struct AcpiFiles {
  static constexpr const char* tables_name = "etc/acpi/tables";
  static constexpr const char* rsdp_name = "etc/acpi/rsdp";
  static constexpr const char* loader_name = "etc/table-loader";
  std::vector<u8> tables, rsdp, loader;
};
AcpiFiles make_acpi_files(const AcpiMachine& machine);

/// The single tables, for tests. Each with its checksum.
std::vector<u8> make_dsdt(const AcpiMachine& machine);
std::vector<u8> make_fadt(Gpa dsdt);
std::vector<u8> make_madt(const AcpiMachine& machine);
std::vector<u8> make_xsdt(std::span<const Gpa> tables);
std::vector<u8> make_rsdp(Gpa xsdt);

}  // namespace anykvm::vmm
