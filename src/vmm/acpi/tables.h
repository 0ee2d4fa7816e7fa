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

struct AcpiMachine {
  unsigned cpus = 1;
  std::span<const VirtioSlot> virtio;
};

/// Where the tables are: in the area that PC firmware has, which the memory map reserves.
inline constexpr Gpa acpi_base = 0xe'0000;
inline constexpr u64 acpi_size = 0x2'0000;

/// Writes the tables and returns the address of the RSDP. Throws std::length_error when the machine has more than the
/// area describes (some thousand CPUs).
Gpa write_acpi_tables(const GuestMemory& memory, const AcpiMachine& machine);

/// The single tables, for tests. Each with its checksum.
std::vector<u8> make_dsdt(const AcpiMachine& machine);
std::vector<u8> make_fadt(Gpa dsdt);
std::vector<u8> make_madt(const AcpiMachine& machine);
std::vector<u8> make_xsdt(std::span<const Gpa> tables);
std::vector<u8> make_rsdp(Gpa xsdt);

}  // namespace anykvm::vmm
