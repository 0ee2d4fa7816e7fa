// Vcpu: its shared area, its state, its ioctls. Exits are decoded in exit.cpp.
#include "anykvm/vcpu.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <utility>

#include "anykvm/kvm.h"
#include "client/flexible.h"

namespace anykvm {

const unsigned long Vcpu::run_request = KVM_RUN;

Vcpu::Vcpu(KvmHandle handle, std::uint32_t id, std::size_t area_size)
    : handle_(std::move(handle)), id_(id), area_size_(area_size) {
  void* area = handle_.device()->map(handle_.fd(), area_size_);
  if (area == MAP_FAILED) throw KvmError(errno, "mmap of a vCPU");
  run_ = static_cast<kvm_run*>(area);
}

void Vcpu::unmap() {
  if (run_) handle_.device()->unmap(run_, area_size_);
  run_ = nullptr;
}

Vcpu::~Vcpu() { unmap(); }

Vcpu::Vcpu(Vcpu&& other) noexcept
    : handle_(std::move(other.handle_)),
      id_(other.id_),
      area_size_(other.area_size_),
      run_(std::exchange(other.run_, nullptr)) {}

Vcpu& Vcpu::operator=(Vcpu&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(id_, other.id_);
  std::swap(area_size_, other.area_size_);
  std::swap(run_, other.run_);
  return *this;
}

void Vcpu::set_immediate_exit(bool on) const {
  std::atomic_ref(run_->immediate_exit).store(on, std::memory_order_seq_cst);
}

std::size_t Vcpu::drain_coalesced_mmio(const std::function<void(const CoalescedWrite&)>& write) const {
  const long page = handle_.try_ioctl(KVM_CHECK_EXTENSION, static_cast<unsigned long>(KVM_CAP_COALESCED_MMIO));
  // Only system and VM descriptors answer that on every KVM; the ring has never been anywhere but at this page.
  const std::size_t offset = std::size_t(page > 0 ? page : KVM_COALESCED_MMIO_PAGE_OFFSET) * 4096;
  if (offset + 4096 > area_size_) return 0;
  auto* ring = reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<char*>(run_) + offset);
  const std::size_t capacity = (4096 - sizeof *ring) / sizeof(kvm_coalesced_mmio);
  std::size_t count = 0;
  std::uint32_t first = std::atomic_ref(ring->first).load(std::memory_order_relaxed);
  while (first < capacity && first != std::atomic_ref(ring->last).load(std::memory_order_acquire)) {
    const kvm_coalesced_mmio& entry = ring->coalesced_mmio[first];
    if (entry.len <= sizeof entry.data)
      write({.address = entry.phys_addr, .data = {entry.data, entry.len}, .is_port = entry.pio != 0});
    first = std::uint32_t((first + 1) % capacity);
    std::atomic_ref(ring->first).store(first, std::memory_order_release);
    ++count;
  }
  return count;
}

kvm_regs Vcpu::regs() const {
  kvm_regs regs;
  handle_.ioctl("KVM_GET_REGS", KVM_GET_REGS, &regs);
  return regs;
}
void Vcpu::set_regs(const kvm_regs& regs) { handle_.ioctl("KVM_SET_REGS", KVM_SET_REGS, &regs); }

kvm_sregs Vcpu::sregs() const {
  kvm_sregs sregs;
  handle_.ioctl("KVM_GET_SREGS", KVM_GET_SREGS, &sregs);
  return sregs;
}
void Vcpu::set_sregs(const kvm_sregs& sregs) { handle_.ioctl("KVM_SET_SREGS", KVM_SET_SREGS, &sregs); }

kvm_fpu Vcpu::fpu() const {
  kvm_fpu fpu;
  handle_.ioctl("KVM_GET_FPU", KVM_GET_FPU, &fpu);
  return fpu;
}
void Vcpu::set_fpu(const kvm_fpu& fpu) { handle_.ioctl("KVM_SET_FPU", KVM_SET_FPU, &fpu); }

kvm_xcrs Vcpu::xcrs() const {
  kvm_xcrs xcrs{};
  handle_.ioctl("KVM_GET_XCRS", KVM_GET_XCRS, &xcrs);
  return xcrs;
}
void Vcpu::set_xcrs(const kvm_xcrs& xcrs) { handle_.ioctl("KVM_SET_XCRS", KVM_SET_XCRS, &xcrs); }

std::vector<std::uint32_t> Vcpu::xsave() const {
  // KVM_GET_XSAVE2's area is as large as the VM says, which a vCPU cannot be asked; 64 KiB hold every feature there is.
  std::vector<std::uint32_t> area(16384);
  const long result = handle_.try_ioctl(KVM_GET_XSAVE2, area.data());
  if (result == 0) return area;
  area.assign(1024, 0);
  handle_.ioctl("KVM_GET_XSAVE", KVM_GET_XSAVE, area.data());
  return area;
}
void Vcpu::set_xsave(std::span<const std::uint32_t> area) {
  if (area.size_bytes() < 4096) throw KvmError(EINVAL, "KVM_SET_XSAVE");
  handle_.ioctl("KVM_SET_XSAVE", KVM_SET_XSAVE, area.data());
}

std::size_t Vcpu::get_msrs(std::span<kvm_msr_entry> entries) const {
  Flexible<kvm_msrs, kvm_msr_entry> list{std::span<const kvm_msr_entry>(entries)};
  list->nmsrs = std::uint32_t(entries.size());
  const auto count = std::size_t(handle_.ioctl("KVM_GET_MSRS", KVM_GET_MSRS, list.header()));
  for (std::size_t i = 0; i < count && i < entries.size(); ++i) entries[i] = list.data()[i];
  return count;
}

std::size_t Vcpu::set_msrs(std::span<const kvm_msr_entry> entries) {
  Flexible<kvm_msrs, kvm_msr_entry> list{entries};
  list->nmsrs = std::uint32_t(entries.size());
  return std::size_t(handle_.ioctl("KVM_SET_MSRS", KVM_SET_MSRS, list.header()));
}

std::uint64_t Vcpu::msr(std::uint32_t index) const {
  kvm_msr_entry entry{.index = index};
  if (get_msrs({&entry, 1}) != 1) throw KvmError(EINVAL, "KVM_GET_MSRS");
  return entry.data;
}

void Vcpu::set_msr(std::uint32_t index, std::uint64_t value) {
  const kvm_msr_entry entry{.index = index, .data = value};
  if (set_msrs({&entry, 1}) != 1) throw KvmError(EINVAL, "KVM_SET_MSRS");
}

std::vector<kvm_cpuid_entry2> Vcpu::cpuid() const {
  for (std::size_t room = 128;; room *= 2) {
    Flexible<kvm_cpuid2, kvm_cpuid_entry2> list(room);
    list->nent = std::uint32_t(room);
    const long result = handle_.try_ioctl(KVM_GET_CPUID2, list.header());
    if (result == -E2BIG && room < 65536) continue;
    if (result < 0) throw KvmError(int(-result), "KVM_GET_CPUID2");
    const auto entries = list.entries(list->nent);
    return {entries.begin(), entries.end()};
  }
}

void Vcpu::set_cpuid(std::span<const kvm_cpuid_entry2> entries) {
  Flexible<kvm_cpuid2, kvm_cpuid_entry2> list(entries);
  list->nent = std::uint32_t(entries.size());
  handle_.ioctl("KVM_SET_CPUID2", KVM_SET_CPUID2, list.header());
}

kvm_lapic_state Vcpu::lapic() const {
  kvm_lapic_state state;
  handle_.ioctl("KVM_GET_LAPIC", KVM_GET_LAPIC, &state);
  return state;
}
void Vcpu::set_lapic(const kvm_lapic_state& state) { handle_.ioctl("KVM_SET_LAPIC", KVM_SET_LAPIC, &state); }

std::uint32_t Vcpu::mp_state() const {
  kvm_mp_state state{};
  handle_.ioctl("KVM_GET_MP_STATE", KVM_GET_MP_STATE, &state);
  return state.mp_state;
}
void Vcpu::set_mp_state(std::uint32_t state) {
  const kvm_mp_state wanted{.mp_state = state};
  handle_.ioctl("KVM_SET_MP_STATE", KVM_SET_MP_STATE, &wanted);
}

kvm_vcpu_events Vcpu::events() const {
  kvm_vcpu_events events{};
  handle_.ioctl("KVM_GET_VCPU_EVENTS", KVM_GET_VCPU_EVENTS, &events);
  return events;
}
void Vcpu::set_events(const kvm_vcpu_events& events) {
  handle_.ioctl("KVM_SET_VCPU_EVENTS", KVM_SET_VCPU_EVENTS, &events);
}

kvm_debugregs Vcpu::debug_registers() const {
  kvm_debugregs registers{};
  handle_.ioctl("KVM_GET_DEBUGREGS", KVM_GET_DEBUGREGS, &registers);
  return registers;
}
void Vcpu::set_debug_registers(const kvm_debugregs& registers) {
  handle_.ioctl("KVM_SET_DEBUGREGS", KVM_SET_DEBUGREGS, &registers);
}

void Vcpu::interrupt(std::uint8_t vector) {
  const kvm_interrupt request{.irq = vector};
  handle_.ioctl("KVM_INTERRUPT", KVM_INTERRUPT, &request);
}

void Vcpu::nmi() { handle_.ioctl("KVM_NMI", KVM_NMI); }

kvm_translation Vcpu::translate(std::uint64_t address) const {
  kvm_translation translation{.linear_address = address};
  handle_.ioctl("KVM_TRANSLATE", KVM_TRANSLATE, &translation);
  return translation;
}

void Vcpu::set_signal_mask(std::uint64_t mask) {
  const std::uint8_t* bytes = reinterpret_cast<const std::uint8_t*>(&mask);
  Flexible<kvm_signal_mask, std::uint8_t> request(std::span(bytes, sizeof mask));
  request->len = sizeof mask;
  handle_.ioctl("KVM_SET_SIGNAL_MASK", KVM_SET_SIGNAL_MASK, request.header());
}

void Vcpu::clear_signal_mask() { handle_.ioctl("KVM_SET_SIGNAL_MASK", KVM_SET_SIGNAL_MASK); }

std::uint32_t Vcpu::tsc_khz() const { return std::uint32_t(handle_.ioctl("KVM_GET_TSC_KHZ", KVM_GET_TSC_KHZ)); }

void Vcpu::set_tsc_khz(std::uint32_t khz) {
  handle_.ioctl("KVM_SET_TSC_KHZ", KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz));
}

void Vcpu::enable_capability(std::uint32_t capability, std::span<const std::uint64_t> arguments) {
  kvm_enable_cap enable{.cap = capability};
  for (std::size_t i = 0; i < arguments.size() && i < std::size(enable.args); ++i) enable.args[i] = arguments[i];
  handle_.ioctl("KVM_ENABLE_CAP", KVM_ENABLE_CAP, &enable);
}

}  // namespace anykvm
