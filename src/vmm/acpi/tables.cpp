// Table by table. Offsets in the comments are the specification's.
#include "vmm/acpi/tables.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>

#include "vmm/acpi/aml.h"
#include "vmm/pci/bus.h"
#include "vmm/power_management.h"
#include "vmm/rtc.h"

namespace anykvm::vmm {

namespace {

/// Bytes of a table under construction, written by offset.
class Table {
 public:
  Table(std::string_view signature, u8 revision, size_t size = 36) : bytes_(size) {
    text(0, signature, 4);
    bytes_[8] = revision;
    text(10, "ANYKVM", 6);
    text(16, "ANYKVM", 8);
    put(24, 1, 4);  // OEM revision
    text(28, "ANYK", 4);
    put(32, 1, 4);  // creator revision
  }

  void put(size_t offset, u64 value, unsigned size) {
    if (bytes_.size() < offset + size) bytes_.resize(offset + size);
    for (unsigned i = 0; i < size; ++i) bytes_[offset + i] = u8(value >> (8 * i));
  }
  void append(u64 value, unsigned size) { put(bytes_.size(), value, size); }
  void append(const std::vector<u8>& bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }

  /// A generic address structure: an I/O port range.
  void port(size_t offset, u64 address, u8 bits, u8 access_size) {
    put(offset, 1, 1);
    put(offset + 1, bits, 1);
    put(offset + 2, 0, 1);
    put(offset + 3, access_size, 1);
    put(offset + 4, address, 8);
  }

  std::vector<u8> finish() {
    put(4, bytes_.size(), 4);
    bytes_[9] = u8(-std::accumulate(bytes_.begin(), bytes_.end(), 0));
    return std::move(bytes_);
  }

 private:
  void text(size_t offset, std::string_view text, size_t size) {
    for (size_t i = 0; i < size; ++i) bytes_[offset + i] = i < text.size() ? u8(text[i]) : u8(' ');
  }
  std::vector<u8> bytes_;
};

constexpr u8 sci_irq = 9;
constexpr u32 local_apic_base = 0xfee0'0000;
constexpr u32 io_apic_base = 0xfec0'0000;

aml::Bytes pci_bus(std::span<const PciSlot> slots) {
  using namespace aml;
  constexpr u32 all_functions = 0xffff;
  constexpr u64 inta = 0;
  std::vector<Bytes> routes;
  for (const PciSlot& slot : slots)
    routes.push_back(
        package({integer(u64{slot.slot} << 16 | all_functions), integer(inta), integer(0), integer(slot.gsi)}));
  return device(
      "PCI0", join({name("_HID", eisa_id("PNP0A03")), name("_UID", integer(0)), name("_PRT", package(routes)),
                    name("_CRS", resources({bus_numbers(0, 0xff), io_ports(PciBus::base_port, PciBus::port_count),
                                            port_window(0, PciBus::base_port - 1),
                                            port_window(PciBus::base_port + PciBus::port_count, 0xffff),
                                            memory_window(u32(PciBus::window_begin), u32(PciBus::window_end - 1))}))}));
}

}  // namespace

std::vector<u8> make_dsdt(const AcpiMachine& machine) {
  using namespace aml;
  Bytes devices = join({
      device("COM1", join({name("_HID", eisa_id("PNP0501")), name("_UID", integer(1)),
                           name("_CRS", resources({io_ports(0x3f8, 8), isa_irq(4)}))})),
      device("RTC", join({name("_HID", eisa_id("PNP0B00")),
                          name("_CRS", resources({io_ports(Rtc::base_port, Rtc::port_count)}))})),
      // The ports that belong to ACPI itself, so that nothing else is put there.
      device("PMIO", join({name("_HID", eisa_id("PNP0C02")),
                           name("_CRS", resources({io_ports(PowerManagement::base_port, 16)}))})),
  });
  if (!machine.pci.empty()) devices = join({devices, pci_bus(machine.pci)});
  unsigned number = 0;
  for (const VirtioSlot& slot : machine.virtio) {
    static constexpr char digits[] = "0123456789ABCDEF";
    const char device_name[] = {'V', 'I', digits[number >> 4 & 15], digits[number & 15]};
    devices = join(
        {devices,
         device({device_name, 4},
                join({name("_HID", string("LNRO0005")), name("_UID", integer(number)), name("_CCA", integer(1)),
                      name("_CRS", resources({fixed_memory(slot.base, slot.size), level_interrupt(slot.gsi)}))}))});
    ++number;
  }
  Table table("DSDT", 2);
  table.append(join({
      name("\\_S5", package({integer(PowerManagement::sleep_type_off), integer(PowerManagement::sleep_type_off),
                             integer(0), integer(0)})),
      scope("\\_SB", devices),
  }));
  return table.finish();
}

std::vector<u8> make_fadt(Gpa dsdt) {
  constexpr u64 event = PowerManagement::base_port + PowerManagement::event_block;
  constexpr u64 control = PowerManagement::base_port + PowerManagement::control_block;
  constexpr u64 timer = PowerManagement::base_port + PowerManagement::timer_block;
  Table table("FACP", 6, 276);
  table.put(40, dsdt, 4);
  table.put(45, 4, 1);  // preferred profile: enterprise server
  table.put(46, sci_irq, 2);
  // SMI_CMD (48) stays zero: ACPI mode is always on.
  table.put(56, event, 4);
  table.put(64, control, 4);
  table.put(76, timer, 4);
  table.put(88, 4, 1);      // PM1_EVT_LEN
  table.put(89, 2, 1);      // PM1_CNT_LEN
  table.put(91, 4, 1);      // PM_TMR_LEN
  table.put(96, 0xfff, 2);  // no C2
  table.put(98, 0xfff, 2);  // no C3
  table.put(108, Rtc::century_register, 1);
  // IAPC_BOOT_ARCH: legacy devices, no VGA, no MSI (there is no PCI), no PCIe ASPM. The 8042 answers when it is probed
  // but holds no keyboard worth a driver.
  table.put(109, 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4, 2);
  // WBINVD works, C1 on all CPUs, no power and sleep button, no RTC wake, 32-bit timer, reset register, headless.
  table.put(112, 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 12, 4);
  table.port(116, 0x64, 8, 1);  // RESET_REG: the keyboard controller …
  table.put(128, 0xfe, 1);      // … pulsing the reset line
  table.put(131, 4, 1);         // ACPI 6.4
  table.put(140, dsdt, 8);
  table.port(148, event, 32, 2);
  table.port(172, control, 16, 2);
  table.port(208, timer, 32, 3);
  return table.finish();
}

std::vector<u8> make_madt(const AcpiMachine& machine) {
  Table table("APIC", 5);
  table.append(local_apic_base, 4);
  table.append(1, 4);  // PCAT_COMPAT: there are 8259s to be masked
  for (unsigned cpu = 0; cpu < machine.cpus; ++cpu) {
    if (cpu < 255) {
      table.append(0, 1);  // local APIC, 8 bytes: processor UID, APIC id, enabled
      table.append(8, 1);
      table.append(cpu, 1);
      table.append(cpu, 1);
      table.append(1, 4);
    } else {
      table.append(9, 1);  // local x2APIC, 16 bytes: x2APIC id, enabled, processor UID
      table.append(16, 1);
      table.append(0, 2);
      table.append(cpu, 4);
      table.append(1, 4);
      table.append(cpu, 4);
    }
  }
  table.append(1, 1);  // I/O APIC, 12 bytes: id, address, first GSI. ISA interrupts keep their numbers, 0 included.
  table.append(12, 1);
  table.append(0, 2);
  table.append(io_apic_base, 4);
  table.append(0, 4);
  table.append(2, 1);  // interrupt override, 10 bytes: the SCI is level-triggered, active high
  table.append(10, 1);
  table.append(0, 1);
  table.append(sci_irq, 1);
  table.append(sci_irq, 4);
  table.append(0x0d, 2);
  table.append(4, 1);  // NMI on LINT1 of all local APICs, 6 bytes
  table.append(6, 1);
  table.append(0xff, 1);
  table.append(0, 2);
  table.append(1, 1);
  return table.finish();
}

std::vector<u8> make_xsdt(std::span<const Gpa> tables) {
  Table table("XSDT", 1);
  for (const Gpa address : tables) table.append(address, 8);
  return table.finish();
}

std::vector<u8> make_rsdp(Gpa xsdt) {
  std::vector<u8> rsdp(36);
  std::ranges::copy(std::string_view("RSD PTR "), rsdp.begin());
  std::ranges::copy(std::string_view("ANYKVM"), rsdp.begin() + 9);
  rsdp[15] = 2;  // revision
  rsdp[20] = u8(rsdp.size());
  for (unsigned i = 0; i < 8; ++i) rsdp[24 + i] = u8(xsdt >> (8 * i));
  rsdp[8] = u8(-std::accumulate(rsdp.begin(), rsdp.begin() + 20, 0));
  rsdp[32] = u8(-std::accumulate(rsdp.begin(), rsdp.end(), 0));
  return rsdp;
}

Gpa write_acpi_tables(const GuestMemory& memory, const AcpiMachine& machine) {
  // The RSDP comes first, where firmware's is looked for; it is written last, when it is known what it points to.
  Gpa next = acpi_base + 64;
  const auto place = [&](const std::vector<u8>& table) {
    const Gpa at = next;
    next = (next + table.size() + 15) & ~Gpa{15};
    if (next > acpi_base + acpi_size || !memory.write(at, table))
      throw std::length_error("the ACPI tables do not fit: too many CPUs or devices");
    return at;
  };
  const Gpa dsdt = place(make_dsdt(machine));
  const Gpa tables[] = {place(make_fadt(dsdt)), place(make_madt(machine))};
  const auto rsdp = make_rsdp(place(make_xsdt(tables)));
  if (!memory.write(acpi_base, rsdp)) throw std::length_error("no memory for the ACPI tables");
  return acpi_base;
}

}  // namespace anykvm::vmm
