// Which CPU it is and what belongs to its model: CPUID, MSRs, FPU state, the TSC's frequency, the signal mask.
// Reference: api.rst 4.18 - 4.20 KVM_GET/SET_MSRS, KVM_SET_CPUID; 4.22 FPU; 4.42 XSAVE; 4.55 TSC_KHZ; 4.17
// KVM_SET_SIGNAL_MASK.
#include <asm/kvm_para.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

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

// --- machine check ------------------------------------------------------------------------------------------------

int Vcpu::x86_setup_mce(const u64& capabilities) {
  std::lock_guard lock(mutex_);
  const int result = x86::setup_mce(cpu_, capabilities);
  update_apic_features();
  return result;
}

/// Records an error in its bank, and raises #MC for an uncorrected one. SDM volume 3, 16.3.2 and 16.6.
int Vcpu::x86_set_mce(const kvm_x86_mce& error) {
  constexpr u64 valid = 1ull << 63, overflow = 1ull << 62, uncorrected = 1ull << 61, context_corrupt = 1ull << 57,
                signaled = 1ull << 56, action_required = 1ull << 55;
  constexpr u64 cap_ctl = 1 << 8, in_progress = 1 << 2, cmci_enable = 1 << 30;
  std::lock_guard lock(mutex_);
  x86::MsrState& msr = cpu_.state.msr;
  if (error.bank >= (msr.mcg_cap & 0xff) || !(error.status & valid)) return -EINVAL;
  u64* const bank = msr.mc_bank + 4 * error.bank;
  u64 &control = bank[0], &status = bank[1];
  const auto record = [&](u64 new_status) {
    status = new_status;
    bank[2] = error.addr;
    bank[3] = error.misc;
  };
  if (error.status & uncorrected && error.mcg_status == 0 &&
      !(error.status & (context_corrupt | signaled | action_required))) {
    // No action required: recorded, and announced by a CMCI where the guest wants one for this bank.
    record(error.status);
    msr.mcg_status = 0;
    if (apic_ && msr.mcg_cap & x86::mce_cap_cmci && msr.mci_ctl2[error.bank] & cmci_enable) apic_->deliver_cmci();
    return 0;
  }
  const u64 lost = status & valid ? overflow : 0;
  if (error.status & uncorrected) {
    if ((msr.mcg_cap & cap_ctl && msr.mcg_ctl != ~0ull) || control != ~0ull) return 0;  // the guest has turned it off
    if (msr.mcg_status & in_progress || !(cpu_.state.cr4 & x86::cr4::mce)) {
      cpu_.state.event.triple_fault_pending = true;
      return 0;
    }
    record(error.status | lost);
    msr.mcg_status = error.mcg_status;
    x86::EventState& event = cpu_.state.event;
    event.exception_pending = true;
    event.exception_injected = event.exception_has_error = event.exception_has_payload = false;
    event.exception_vector = x86::exception::mc;
  } else if (!(status & uncorrected) || !lost) {
    record(error.status | lost);
  } else {
    status |= overflow;
  }
  return 0;
}

// --- CPUID --------------------------------------------------------------------------------------------------------

void Vcpu::update_cpuid_quirk() {
  cpu_.cpuid.set_mwait_follows_misc_enable(cpu_.disabled_quirks.load(std::memory_order_relaxed) &
                                           KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT);
}

int Vcpu::set_cpuid2(std::span<const kvm_cpuid_entry2> entries) {
  std::lock_guard lock(mutex_);
  update_cpuid_quirk();
  const bool apic_enabled = apic_base() & irqchip::LocalApic::base_enable;
  // A guest that has run must not see its CPU change; setting the same again is what CPU hot-plug does.
  if (has_run()) return cpu_.cpuid.equals(cpu_.state, apic_enabled, entries) ? 0 : -EINVAL;
  // A vCPU that keeps its halts to itself cannot be kicked out of them.
  if (vm_->halts_in_guest()) cpu_.cpuid.withhold_kvm_features(1u << KVM_FEATURE_PV_UNHALT);
  if (const int error = cpu_.cpuid.set(entries)) return error;
  cpuid_set();
  return 0;
}

void Vcpu::update_apic_features() {
  if (!apic_) return;
  const x86::Cpuid& cpuid = cpu_.cpuid;
  apic_->set_features({.x2apic = cpuid.has(x86::Feature::x2apic),
                       .tsc_deadline = cpuid.has(x86::Feature::tsc_deadline),
                       .directed_eoi = cpuid.has(x86::Feature::x2apic) && !vm_->chips(),
                       .cmci = (cpu_.state.msr.mcg_cap & x86::mce_cap_cmci) != 0,
                       .physical_address_bits = static_cast<u8>(cpuid.physical_bits())});
}

void Vcpu::cpuid_set() {
  update_apic_features();
  cpu_.mmu.flush_all();
  cpu_.update_mode();
}

int Vcpu::get_cpuid2(std::span<kvm_cpuid_entry2> entries, u32& count) {
  std::lock_guard lock(mutex_);
  update_cpuid_quirk();
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
  const u32 pkru = cpu_.state.fpu.pkru;
  if (!x86::xsave_to_fpu(cpu_.state.fpu, x86::supported_xcr0(), area)) return -EINVAL;
  if (cpu_.state.fpu.pkru != pkru) cpu_.mmu.flush_all();
  return 0;
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

u64 Vcpu::tsc_offset() {
  std::lock_guard lock(mutex_);
  return cpu_.state.tsc_offset;
}

void Vcpu::set_tsc_offset(u64 offset) {
  std::lock_guard lock(mutex_);
  paravirt_.set_tsc_offset(offset);
  tsc_moved();
}

int Vcpu::kvmclock_ctrl() {
  std::lock_guard lock(mutex_);
  return paravirt_.kvmclock_ctrl();
}

int Vcpu::set_vapic_addr(u64 address) {
  std::lock_guard lock(mutex_);
  if (!apic_) return -EINVAL;
  // One page, and RAM.
  if (address != 0 && ((address & ~page_mask) > page_size - sizeof(u32) || !vm_->memory().has_page(address)))
    return -EINVAL;
  vapic_ = address;
  return 0;
}

/// As on a CPU that virtualises the TPR: the guest reaches it without an exit, so that there is none to report.
int Vcpu::tpr_access_reporting(kvm_tpr_access_ctl& control) { return control.flags ? -EINVAL : 0; }

namespace {
std::string stats_id(u32 id) { return "kvm-" + std::to_string(getpid()) + "/vcpu-" + std::to_string(id); }
}  // namespace

int Vcpu::get_stats_fd() {
  std::lock_guard lock(mutex_);
  return stats_.open(stats_id(id_));
}

void Vcpu::publish_stats(os::Mapping page) { stats_.publish(std::move(page), stats_id(id_)); }

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
