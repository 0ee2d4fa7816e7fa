// Which CPU it is and what belongs to its model: CPUID, MSRs, FPU state, the TSC's frequency, the signal mask.
// Reference: api.rst 4.18 - 4.20 KVM_GET/SET_MSRS, KVM_SET_CPUID; 4.22 FPU; 4.42 XSAVE; 4.55 TSC_KHZ; 4.17
// KVM_SET_SIGNAL_MASK.
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>

#include "vcpu/signal_mask.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"
#include "x86/cpuid.h"
#include "x86/msr.h"
#include "x86/xsave.h"

namespace anykvm::vcpu {
namespace {

constexpr u32 msr_apic_base = 0x1b;

std::span<u8> bytes_of(kvm_xsave& xsave) { return {reinterpret_cast<u8*>(&xsave), 4096}; }
std::span<const u8> bytes_of(const kvm_xsave& xsave) { return {reinterpret_cast<const u8*>(&xsave), 4096}; }

}  // namespace

// --- MSRs ---------------------------------------------------------------------------------------------------------

bool Vcpu::host_get_msr(u32 index, u64& value) {
  if (apic_) {
    if (const MsrResult result = apic_->read_msr(index, value, true); result != MsrResult::not_mine)
      return result == MsrResult::ok;
  } else if (index == msr_apic_base) {
    value = apic_base_;
    return true;
  }
  if (const MsrResult result = paravirt_.read_msr(index, value, x86::Initiator::host); result != MsrResult::not_mine)
    return result == MsrResult::ok;
  return x86::get_msr(cpu_, index, value, x86::Initiator::host);
}

bool Vcpu::host_set_msr(u32 index, u64 value) {
  if (apic_) {
    if (const MsrResult result = apic_->write_msr(index, value, true); result != MsrResult::not_mine)
      return result == MsrResult::ok;
  } else if (index == msr_apic_base) {
    apic_base_ = value;
    return true;
  }
  if (const MsrResult result = paravirt_.write_msr(index, value, x86::Initiator::host); result != MsrResult::not_mine)
    return result == MsrResult::ok;
  return x86::set_msr(cpu_, index, value, x86::Initiator::host);
}

int Vcpu::get_msrs(std::span<kvm_msr_entry> entries) {
  std::lock_guard lock(mutex_);
  int done = 0;
  for (kvm_msr_entry& entry : entries) {
    u64 value = 0;
    if (!host_get_msr(entry.index, value)) break;
    entry.data = value;
    ++done;
  }
  return done;
}

int Vcpu::set_msrs(std::span<const kvm_msr_entry> entries) {
  std::lock_guard lock(mutex_);
  int done = 0;
  // Paravirtual MSRs may write to guest memory at once.
  enter_guest_mode();
  serve_tlb_flush();
  (void)guarded([&] {
    for (const kvm_msr_entry& entry : entries) {
      if (!host_set_msr(entry.index, entry.data)) break;
      ++done;
    }
  });
  leave_guest_mode();
  cpu_.update_mode();
  return done;
}

// --- CPUID --------------------------------------------------------------------------------------------------------

int Vcpu::set_cpuid2(std::span<const kvm_cpuid_entry2> entries) {
  std::lock_guard lock(mutex_);
  const bool apic_enabled = apic_base() & irqchip::LocalApic::base_enable;
  // A guest that has run must not see its CPU change; setting the same again is what CPU hot-plug does.
  if (has_run_) return cpu_.cpuid.equals(cpu_.state, apic_enabled, entries) ? 0 : -EINVAL;
  if (const int error = cpu_.cpuid.set(entries)) return error;
  cpuid_set();
  return 0;
}

void Vcpu::cpuid_set() {
  if (apic_)
    apic_->set_features({.x2apic = cpu_.cpuid.has(x86::Feature::x2apic),
                         .tsc_deadline = cpu_.cpuid.has(x86::Feature::tsc_deadline),
                         .physical_address_bits = static_cast<u8>(cpu_.cpuid.physical_bits())});
  cpu_.mmu.flush_all();
  cpu_.update_mode();
}

int Vcpu::get_cpuid2(std::span<kvm_cpuid_entry2> entries, u32& count) {
  std::lock_guard lock(mutex_);
  const size_t size = cpu_.cpuid.entries().size();
  count = static_cast<u32>(size);
  if (entries.size() < size) return -E2BIG;
  cpu_.cpuid.get(cpu_.state, apic_base() & irqchip::LocalApic::base_enable, entries.first(size));
  return 0;
}

// --- FPU ----------------------------------------------------------------------------------------------------------

int Vcpu::get_fpu(kvm_fpu& fpu) {
  std::lock_guard lock(mutex_);
  x86::fpu_to_kvm(cpu_.state.fpu, fpu);
  return 0;
}

int Vcpu::set_fpu(const kvm_fpu& fpu) {
  std::lock_guard lock(mutex_);
  x86::kvm_to_fpu(cpu_.state.fpu, fpu);
  return 0;
}

int Vcpu::get_xsave(kvm_xsave& xsave) { return get_xsave2(bytes_of(xsave)); }
int Vcpu::set_xsave(const kvm_xsave& xsave) { return set_xsave(bytes_of(xsave)); }

int Vcpu::get_xsave2(std::span<u8> area) {
  std::lock_guard lock(mutex_);
  x86::fpu_to_xsave(cpu_.state.fpu, x86::supported_xcr0(), area);
  return 0;
}

int Vcpu::set_xsave(std::span<const u8> area) {
  std::lock_guard lock(mutex_);
  return x86::xsave_to_fpu(cpu_.state.fpu, x86::supported_xcr0(), area) ? 0 : -EINVAL;
}

// --- time ---------------------------------------------------------------------------------------------------------

int Vcpu::get_tsc_khz() {
  std::lock_guard lock(mutex_);
  return static_cast<int>(paravirt_.tsc_khz());
}

int Vcpu::set_tsc_khz(u32 khz) {
  std::lock_guard lock(mutex_);
  if (const int error = paravirt_.set_tsc_khz(khz)) return error;
  tsc_moved();
  return 0;
}

int Vcpu::kvmclock_ctrl() {
  std::lock_guard lock(mutex_);
  return paravirt_.kvmclock_ctrl();
}

int Vcpu::enable_cap(const kvm_enable_cap& cap) {
  std::lock_guard lock(mutex_);
  if (cap.flags || cap.cap != KVM_CAP_ENFORCE_PV_FEATURE_CPUID) return -EINVAL;
  paravirt_.enforce_features(cap.args[0] != 0);
  return 0;
}

// --- signals ------------------------------------------------------------------------------------------------------

int Vcpu::set_signal_mask(const u64* mask) {
  std::lock_guard lock(mutex_);
  signal_mask_.reset();
  if (!mask) return 0;
  if (wake_fd_.load(std::memory_order_relaxed) < 0)
    wake_fd_.store(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), std::memory_order_release);
  constexpr u64 kill_and_stop = 1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1);
  signal_mask_ = std::make_unique<SignalMask>(*mask & ~kill_and_stop, cpu_.attention, in_guest_mode_,
                                              wake_fd_.load(std::memory_order_relaxed));
  return 0;
}

}  // namespace anykvm::vcpu
