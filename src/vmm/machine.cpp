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
    : outcome_(outcome), memory_(options.memory_bytes), vm_(create_vm(kvm)) {
  for (const GuestMemory::Region& region : memory_.regions())
    vm_.set_up_memory_slot(vm_.allocate_memory_slot(region.size), region.host, region.base);

  const auto reset = [this] { outcome_.set({Outcome::Kind::reset, {}}); };
  serial_ = std::make_unique<Serial16550>(line(serial_gsi), std::move(console));
  keyboard_ = std::make_unique<I8042>(line(keyboard_gsi), reset);
  rtc_ = std::make_unique<Rtc>(memory_.low_size(), memory_.high_size());
  power_ = std::make_unique<PowerManagement>([this] { outcome_.set({Outcome::Kind::power_off, {}}); });
  ports_.add(serial_port, Serial16550::port_count, *serial_);
  ports_.add(keyboard_data_port, 1, keyboard_->data());
  ports_.add(keyboard_command_port, 1, keyboard_->command());
  ports_.add(Rtc::base_port, Rtc::port_count, *rtc_);
  ports_.add(PowerManagement::base_port, PowerManagement::port_count, *power_);
  ports_.add(PciHost::base_port, PciHost::port_count, pci_);

  for (const DiskOption& disk : options.disks) {
    try {
      add_virtio(make_block({.path = disk.path, .read_only = disk.read_only, .serial = {}}));
    } catch (const std::runtime_error& error) {
      throw BadInput(error.what());
    }
  }
  if (options.network) add_virtio(make_user_net(loop));
  add_virtio(make_entropy(loop));

  const Gpa rsdp = write_acpi_tables(memory_, {.cpus = options.cpus, .virtio = virtio_slots_});
  create_vcpus(kvm, options.cpus, load_kernel(memory_, options.files, rsdp));
}

Machine::~Machine() { stop(); }

IrqLine& Machine::line(u32 gsi) { return *lines_.emplace_back(std::make_unique<GsiLine>(vm_, gsi)); }

void Machine::add_virtio(std::unique_ptr<VirtioDevice> device) {
  const size_t index = virtio_.size();
  if (index >= virtio_limit) throw BadInput("too many devices: 16 disks, network card and entropy source together");
  const VirtioSlot slot{u32(virtio_base + index * VirtioMmio::window_size), u32(VirtioMmio::window_size),
                        virtio_gsis[index]};
  virtio_slots_.push_back(slot);
  virtio_.push_back(std::make_unique<VirtioMmio>(std::move(device), memory_, line(slot.gsi)));
  mmio_.add(slot.base, slot.size, *virtio_.back());
}

void Machine::create_vcpus(const Kvm& kvm, unsigned count, const LoadedKernel& kernel) {
  for (unsigned id = 0; id < count; ++id) {
    Vcpu vcpu = vm_.create_vcpu();
    vcpu.set_cpuid(cpuid_of(kvm, id, count));
    set_firmware_state(vcpu);
    if (id == 0) {  // the others wait for the first one's INIT and SIPI
      kvm_regs regs{};
      kvm_sregs sregs = vcpu.sregs();
      set_entry_state(memory_, kernel, regs, sregs);
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
