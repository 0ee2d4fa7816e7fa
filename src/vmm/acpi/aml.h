// An encoder of ACPI machine language, as small as our DSDT needs. (ACPI 6.4, chapter 20, and 6.4 for resources.)
//
// Each function gives the bytes of one term; terms nest by concatenation.
#pragma once

#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

#include "x86/types.h"

namespace anykvm::vmm::aml {

using Bytes = std::vector<u8>;

/// The terms one after the other.
Bytes join(std::initializer_list<Bytes> terms);

Bytes integer(u64 value);
Bytes string(std::string_view text);
/// A package (array) of terms, at most 255.
Bytes package(std::initializer_list<Bytes> elements);
Bytes package(std::span<const Bytes> elements);
/// A compressed identifier such as "PNP0501".
Bytes eisa_id(std::string_view id);

/// Name (NAME, value). A name has four characters, shorter ones are filled up with '_'; a leading '\' is the root.
Bytes name(std::string_view name, const Bytes& value);
Bytes scope(std::string_view name, const Bytes& terms);
Bytes device(std::string_view name, const Bytes& terms);

/// A buffer of resource descriptors, for _CRS.
Bytes resources(std::initializer_list<Bytes> descriptors);
Bytes io_ports(u16 base, u8 count);
/// An ISA interrupt: edge, active high.
Bytes isa_irq(unsigned irq);
Bytes fixed_memory(u32 base, u32 size);
/// What a bridge hands on to its bus: bus numbers, ports, memory. The ends are inclusive.
Bytes bus_numbers(u16 first, u16 last);
Bytes port_window(u16 first, u16 last);
Bytes memory_window(u32 first, u32 last);
/// A level-triggered, active-high interrupt of the I/O APIC.
Bytes level_interrupt(u32 gsi);

}  // namespace anykvm::vmm::aml
