// Vm: everything of a virtual machine but its memory slots, which are in memory_slots.cpp.
#include "anykvm/vm.h"

#include "anykvm/kvm.h"
#include "anykvm/vcpu.h"
#include "client/flexible.h"
#include "client/vm_state.h"

namespace anykvm {

Vm::Vm(KvmHandle handle, std::size_t vcpu_mmap_size) : state_(new State{std::move(handle), vcpu_mmap_size}) {
  const int slots = check_extension(KVM_CAP_NR_MEMSLOTS);
  state_->slot_limit = slots > 0 ? std::size_t(slots) : 32;
}

Vm::~Vm() = default;
Vm::Vm(Vm&&) noexcept = default;
Vm& Vm::operator=(Vm&&) noexcept = default;

const KvmHandle& Vm::handle() const { return state_->handle; }

int Vm::check_extension(long capability) const {
  const long result = handle().try_ioctl(KVM_CHECK_EXTENSION, static_cast<unsigned long>(capability));
  return result < 0 ? 0 : int(result);
}

void Vm::enable_capability(std::uint32_t capability, std::span<const std::uint64_t> arguments) const {
  kvm_enable_cap enable{.cap = capability};
  for (std::size_t i = 0; i < arguments.size() && i < std::size(enable.args); ++i) enable.args[i] = arguments[i];
  handle().ioctl("KVM_ENABLE_CAP", KVM_ENABLE_CAP, &enable);
}

void Vm::set_tss_address(std::uint64_t gpa) const { handle().ioctl("KVM_SET_TSS_ADDR", KVM_SET_TSS_ADDR, gpa); }

void Vm::set_identity_map_address(std::uint64_t gpa) const {
  handle().ioctl("KVM_SET_IDENTITY_MAP_ADDR", KVM_SET_IDENTITY_MAP_ADDR, &gpa);
}

void Vm::coalesce_mmio(std::uint64_t gpa, std::uint32_t size) const {
  const kvm_coalesced_mmio_zone zone{.addr = gpa, .size = size};
  handle().ioctl("KVM_REGISTER_COALESCED_MMIO", KVM_REGISTER_COALESCED_MMIO, &zone);
}

void Vm::uncoalesce_mmio(std::uint64_t gpa, std::uint32_t size) const {
  const kvm_coalesced_mmio_zone zone{.addr = gpa, .size = size};
  handle().ioctl("KVM_UNREGISTER_COALESCED_MMIO", KVM_UNREGISTER_COALESCED_MMIO, &zone);
}

void Vm::create_irq_chip() {
  handle().ioctl("KVM_CREATE_IRQCHIP", KVM_CREATE_IRQCHIP);
  state_->has_irq_chip = true;
}

bool Vm::has_irq_chip() const { return state_->has_irq_chip; }

void Vm::create_pit(bool speaker_dummy) const {
  const kvm_pit_config config{.flags = speaker_dummy ? std::uint32_t{KVM_PIT_SPEAKER_DUMMY} : 0u};
  handle().ioctl("KVM_CREATE_PIT2", KVM_CREATE_PIT2, &config);
}

void Vm::set_irq_line(std::uint32_t gsi, bool level) const {
  const kvm_irq_level line{.irq = gsi, .level = level};
  handle().ioctl("KVM_IRQ_LINE", KVM_IRQ_LINE, &line);
}

bool Vm::signal_msi(std::uint64_t address, std::uint32_t data) const {
  const kvm_msi message{.address_lo = std::uint32_t(address), .address_hi = std::uint32_t(address >> 32), .data = data};
  return handle().ioctl("KVM_SIGNAL_MSI", KVM_SIGNAL_MSI, &message) > 0;
}

void Vm::set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) const {
  Flexible<kvm_irq_routing, kvm_irq_routing_entry> table(entries);
  table->nr = std::uint32_t(entries.size());
  handle().ioctl("KVM_SET_GSI_ROUTING", KVM_SET_GSI_ROUTING, table.header());
}

void Vm::attach_irqfd(int event_fd, std::uint32_t gsi, std::optional<int> resample_fd) const {
  kvm_irqfd irqfd{.fd = std::uint32_t(event_fd), .gsi = gsi};
  if (resample_fd) {
    irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
    irqfd.resamplefd = std::uint32_t(*resample_fd);
  }
  handle().ioctl("KVM_IRQFD", KVM_IRQFD, &irqfd);
}

void Vm::detach_irqfd(int event_fd, std::uint32_t gsi) const {
  const kvm_irqfd irqfd{.fd = std::uint32_t(event_fd), .gsi = gsi, .flags = KVM_IRQFD_FLAG_DEASSIGN};
  handle().ioctl("KVM_IRQFD", KVM_IRQFD, &irqfd);
}

void Vm::get_irq_chip(kvm_irqchip& chip) const { handle().ioctl("KVM_GET_IRQCHIP", KVM_GET_IRQCHIP, &chip); }
void Vm::set_irq_chip(const kvm_irqchip& chip) const { handle().ioctl("KVM_SET_IRQCHIP", KVM_SET_IRQCHIP, &chip); }
void Vm::get_pit(kvm_pit_state2& pit) const { handle().ioctl("KVM_GET_PIT2", KVM_GET_PIT2, &pit); }
void Vm::set_pit(const kvm_pit_state2& pit) const { handle().ioctl("KVM_SET_PIT2", KVM_SET_PIT2, &pit); }

namespace {

kvm_ioeventfd describe(int event_fd, const Vm::IoEvent& event) {
  kvm_ioeventfd result{.datamatch = event.match.value_or(0), .addr = event.address, .len = event.size, .fd = event_fd};
  if (event.match) result.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH;
  if (event.is_port) result.flags |= KVM_IOEVENTFD_FLAG_PIO;
  return result;
}

}  // namespace

void Vm::attach_ioeventfd(int event_fd, const IoEvent& event) const {
  const auto request = describe(event_fd, event);
  handle().ioctl("KVM_IOEVENTFD", KVM_IOEVENTFD, &request);
}

void Vm::detach_ioeventfd(int event_fd, const IoEvent& event) const {
  auto request = describe(event_fd, event);
  request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
  handle().ioctl("KVM_IOEVENTFD", KVM_IOEVENTFD, &request);
}

kvm_clock_data Vm::clock() const {
  kvm_clock_data clock{};
  handle().ioctl("KVM_GET_CLOCK", KVM_GET_CLOCK, &clock);
  return clock;
}

void Vm::set_clock(const kvm_clock_data& clock) const { handle().ioctl("KVM_SET_CLOCK", KVM_SET_CLOCK, &clock); }

std::uint32_t Vm::allocate_vcpu_id() { return state_->next_vcpu_id++; }

Vcpu Vm::create_vcpu(std::uint32_t id) const {
  const long fd = handle().ioctl("KVM_CREATE_VCPU", KVM_CREATE_VCPU, static_cast<unsigned long>(id));
  return Vcpu({handle().device(), int(fd)}, id, state_->vcpu_mmap_size);
}

Vcpu Vm::create_vcpu() { return create_vcpu(allocate_vcpu_id()); }

Device Vm::create_device(std::uint32_t type) const {
  kvm_create_device request{.type = type};
  handle().ioctl("KVM_CREATE_DEVICE", KVM_CREATE_DEVICE, &request);
  return Device({handle().device(), int(request.fd)});
}

}  // namespace anykvm
