// Assembly, in the order that KVM wants: chips, memory, devices, kernel, vCPUs.
#include "vmm/machine.h"

#include "vmm/cpu_model.h"
#include "vmm/virtio/devices.h"

namespace anykvm::vmm {

namespace {

constexpr u64 serial_port = 0x3f8, keyboard_data_port = 0x60, keyboard_command_port = 0x64;
constexpr u32 keyboard_gsi = 1, serial_gsi = 4;

/// GSIs that no ISA device has: those of the I/O APIC alone first.
constexpr u32 virtio_gsis[Machine::virtio_limit] = {16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15};

constexpr unsigned isa_bridge_slot = 1, first_virtio_slot = 2;

/// Where firmware for this board routes PIRQA to PIRQD: SeaBIOS and OVMF know no other way.
constexpr u32 pci_gsis[4] = {10, 10, 11, 11};

Vm create_vm(const Kvm& kvm) {
  Vm vm = kvm.create_vm();
  // Pages that KVM on Intel hosts needs for itself, in the hole below the 4 GiB line.
  if (kvm.cap_set_identity_map_address()) vm.set_identity_map_address(0xfeff'c000);
  if (kvm.cap_set_tss_address()) vm.set_tss_address(0xfeff'd000);
  vm.create_irq_chip();
  vm.create_pit();
  return vm;
}

}  // namespace

Machine::Machine(const Kvm& kvm, const MachineOptions& options, EventLoop& loop, OutcomeBox& outcome,
                 std::function<void(u8)> console)
    : outcome_(outcome), memory_(options.memory_bytes, options.memory_backing), vm_(create_vm(kvm)), pci_([this] { reset(); }) {
  for (const GuestMemory::Region& region : memory_.regions())
    vm_.set_up_memory_slot(vm_.allocate_memory_slot(region.size), region.host, region.base);

  // Firmware's drivers poll the serial port and raise no RTS.
  const auto flow = options.firmware ? Serial16550::Flow::none : Serial16550::Flow::rts;
  serial_ = std::make_unique<Serial16550>(line(serial_gsi), std::move(console), flow);
  keyboard_ = std::make_unique<I8042>(line(keyboard_gsi), [this] { reset(); });
  rtc_ = std::make_unique<Rtc>(memory_.low_size(), memory_.high_size());
  power_ = std::make_unique<PowerManagement>([this] { outcome_.set({Outcome::Kind::power_off, {}}); });
  ports_.add(serial_port, Serial16550::port_count, *serial_);
  ports_.add(keyboard_data_port, 1, keyboard_->data());
  ports_.add(keyboard_command_port, 1, keyboard_->command());
  ports_.add(Rtc::base_port, Rtc::port_count, *rtc_);
  ports_.add(PowerManagement::base_port, PowerManagement::port_count, *power_);
  ports_.add(PciBus::base_port, PciBus::port_count, pci_);
  add_bridges(options.firmware.has_value());
  if (options.firmware) add_firmware(*options.firmware);

  for (const DiskOption& disk : options.disks) {
    try {
      add_virtio(make_block({.path = disk.path, .read_only = disk.read_only, .serial = {}}));
    } catch (const std::runtime_error& error) {
      throw BadInput(error.what());
    }
  }
  if (options.network) add_virtio(make_user_net(loop));
  add_virtio(make_entropy(loop));

  if (options.firmware) {
    describe_to_firmware(options);
    create_vcpus(kvm, options.cpus, nullptr);
  } else {
    const Gpa rsdp = write_acpi_tables(memory_, {.cpus = options.cpus, .virtio = virtio_slots_});
    const LoadedKernel kernel = load_kernel(memory_, options.files, rsdp);
    create_vcpus(kvm, options.cpus, &kernel);
  }
}

Machine::~Machine() { stop(); }

IrqLine& Machine::line(u32 gsi) { return *lines_.emplace_back(std::make_unique<GsiLine>(vm_, gsi)); }

void Machine::reset() { outcome_.set({Outcome::Kind::reset, {}}); }

void Machine::add_bridges(bool for_firmware) {
  std::array<IrqLine*, 16> isa_lines{};
  if (for_firmware) {
    for (const u32 gsi : pci_gsis) isa_lines[gsi] = &line(gsi);
    mmio_.add(PciBus::window_begin, PciBus::window_end - PciBus::window_begin, pci_.memory());
  }
  isa_bridge_ = std::make_unique<Piix3>(isa_lines);
  if (for_firmware) {
    host_bridge_ = std::make_unique<I440fx>();
    pci_.add(isa_bridge_slot, *isa_bridge_, *isa_bridge_);
  } else {
    host_bridge_ = std::make_unique<GenericHostBridge>();
  }
  pci_.add(0, *host_bridge_, *isa_bridge_);
}

void Machine::add_firmware(const FirmwareOptions& options) {
  rom_ = std::make_unique<FirmwareRom>(options.path);
  rom_->write_shadow(memory_);
  vm_.set_up_memory_slot(vm_.allocate_memory_slot(rom_->size()), rom_->host(), rom_->base(), KVM_MEM_READONLY);
  fw_cfg_ = std::make_unique<FwCfg>(memory_);
  ports_.add(FwCfg::base_port, FwCfg::port_count, *fw_cfg_);
  system_control_ = std::make_unique<SystemControlPort>([this] { reset(); });
  ports_.add(SystemControlPort::base_port, 1, *system_control_);
  if (!options.log.empty()) {
    debug_port_ = std::make_unique<DebugPort>(options.log);
    ports_.add(DebugPort::base_port, 1, *debug_port_);
  }
}

void Machine::describe_to_firmware(const MachineOptions& options) {
  FwCfg& config = *fw_cfg_;
  config.add(FwCfg::ram_size, memory_.size(), 8);
  config.add(FwCfg::cpu_count, options.cpus, 2);
  config.add(FwCfg::cpu_limit, options.cpus, 2);
  config.add(FwCfg::boot_menu, options.firmware->boot_menu, 2);
  config.add_file("etc/e820", firmware_memory_map(memory_, *rom_));
  config.add_file("etc/sercon-port", serial_port, 2);  // what the firmware shows and asks is on the serial port
  const AcpiFiles acpi = make_acpi_files({.cpus = options.cpus, .pci = pci_slots_});
  config.add_file(AcpiFiles::tables_name, acpi.tables);
  config.add_file(AcpiFiles::rsdp_name, acpi.rsdp);
  config.add_file(AcpiFiles::loader_name, acpi.loader);

  // Where PC firmware looks for the number of CPUs and the order of boot devices: disk, CD.
  constexpr u8 cmos_cpus = 0x5f, cmos_boot_order = 0x3d, boot_order = 0x32;
  rtc_->preset(cmos_cpus, u8(options.cpus - 1));
  rtc_->preset(cmos_boot_order, boot_order);
}

void Machine::add_virtio(std::unique_ptr<VirtioDevice> device) {
  const size_t index = virtio_.size();
  if (index >= virtio_limit) throw BadInput("too many devices: 16 disks, network card and entropy source together");
  if (rom_) {
    const unsigned slot = first_virtio_slot + unsigned(index);
    auto function = std::make_unique<VirtioPci>(std::move(device), memory_);
    pci_.add(slot, *function, *isa_bridge_);
    pci_slots_.push_back({slot, pci_gsis[Piix3::pirq_of(slot)]});
    virtio_.push_back(std::move(function));
    return;
  }
  const VirtioSlot slot{u32(virtio_base + index * VirtioMmio::window_size), u32(VirtioMmio::window_size),
                        virtio_gsis[index]};
  virtio_slots_.push_back(slot);
  auto registers = std::make_unique<VirtioMmio>(std::move(device), memory_, line(slot.gsi));
  mmio_.add(slot.base, slot.size, *registers);
  virtio_.push_back(std::move(registers));
}

void Machine::create_vcpus(const Kvm& kvm, unsigned count, const LoadedKernel* kernel) {
  for (unsigned id = 0; id < count; ++id) {
    Vcpu vcpu = vm_.create_vcpu();
    vcpu.set_cpuid(cpuid_of(kvm, id, count));
    set_power_on_state(vcpu);
    if (kernel) set_firmware_state(vcpu);
    if (kernel && id == 0) {  // the others wait for the first one's INIT and SIPI
      kvm_regs regs{};
      kvm_sregs sregs = vcpu.sregs();
      set_entry_state(memory_, *kernel, regs, sregs);
      vcpu.set_sregs(sregs);
      vcpu.set_regs(regs);
    }
    vcpus_.push_back(std::make_unique<VcpuThread>(std::move(vcpu), ports_, mmio_, memory_, outcome_));
  }
}

void Machine::start() {
  for (auto& vcpu : vcpus_) vcpu->start();
}

void Machine::stop() {
  for (auto& vcpu : vcpus_) vcpu->stop();
}

}  // namespace anykvm::vmm
