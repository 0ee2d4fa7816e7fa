// One virtual CPU: what a KVM vCPU fd stands for. One typed method per ioctl, named after it; arguments are already
// copied from the client, results are >= 0 or -errno with the kernel's choice of errno, and a bad call changes nothing.
// Reference: Documentation/virt/kvm/api.rst, "vcpu ioctls" and chapter 5, "The kvm_run structure". See docs/vcpu.md.
//
// Thread-safety: the ioctls may be called from any thread and wait for a KVM_RUN in progress, as the kernel's do; the
// section "any thread" never waits.
#pragma once

#include <pthread.h>

#include <atomic>
#include <csignal>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "anykvm/kvm.h"
#include "irqchip/lapic.h"
#include "os/fault_guard.h"
#include "os/signal_handlers.h"
#include "paravirt/paravirt.h"
#include "vcpu/trace.h"
#include "vm/stats.h"
#include "x86/cpu.h"
#include "x86/machine.h"

namespace anykvm::engine {
class Engine;
}
namespace anykvm::vm {
class Vm;
}

namespace anykvm::vcpu {

class SignalMask;

class Vcpu final : public x86::Machine, public irqchip::ApicClient {
 public:
  Vcpu(std::shared_ptr<vm::Vm> vm, u32 id, kvm_run* run);
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  u32 id() const { return id_; }
  vm::Vm& vm() { return *vm_; }

  // --- ioctls ---------------------------------------------------------------------------------------------------
  /// leaving, if given, is called before client's signal handlers that were held back, which may not come back (and the
  /// vCPU may go with what it gives up).
  int run(void (*leaving)(void*) = nullptr, void* arg = nullptr);

  int get_regs(kvm_regs& regs);
  int set_regs(const kvm_regs& regs);
  int get_sregs(kvm_sregs& sregs);
  int set_sregs(const kvm_sregs& sregs);
  int get_sregs2(kvm_sregs2& sregs);
  int set_sregs2(const kvm_sregs2& sregs);
  int get_fpu(kvm_fpu& fpu);
  int set_fpu(const kvm_fpu& fpu);
  int get_xsave(kvm_xsave& xsave);        ///< the first 4096 bytes
  int set_xsave(const kvm_xsave& xsave);  ///< 4096 bytes
  int get_xsave2(std::span<u8> area);     ///< area: KVM_CAP_XSAVE2 bytes
  int set_xsave(std::span<const u8> area);
  int get_xcrs(kvm_xcrs& xcrs);
  int set_xcrs(const kvm_xcrs& xcrs);
  int get_msrs(std::span<kvm_msr_entry> entries);        ///< how many were read, up to the first that cannot be
  int set_msrs(std::span<const kvm_msr_entry> entries);  ///< how many were written
  int get_lapic(kvm_lapic_state& lapic);
  int set_lapic(const kvm_lapic_state& lapic);
  int get_mp_state(kvm_mp_state& state);
  int set_mp_state(const kvm_mp_state& state);
  int get_vcpu_events(kvm_vcpu_events& events);
  int set_vcpu_events(const kvm_vcpu_events& events);
  int get_debugregs(kvm_debugregs& regs);
  int set_debugregs(const kvm_debugregs& regs);
  int set_guest_debug(const kvm_guest_debug& debug);
  int set_cpuid2(std::span<const kvm_cpuid_entry2> entries);
  /// Fills entries, count becomes their number; E2BIG (count set to what is needed) when there is too little room.
  int get_cpuid2(std::span<kvm_cpuid_entry2> entries, u32& count);
  int translate(kvm_translation& translation);
  int interrupt(const kvm_interrupt& interrupt);
  int nmi();
  int set_signal_mask(const u64* mask);  ///< nullptr: none
  int get_tsc_khz();
  int set_tsc_khz(u32 khz);
  int kvmclock_ctrl();
  /// The ring of coalesced I/O is this vCPU's, the VM's first.
  void own_coalesced_ring();
  u64 tsc_offset();  ///< KVM_VCPU_TSC_OFFSET of KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR
  void set_tsc_offset(u64 offset);
  int x86_setup_mce(const u64& capabilities);
  int x86_set_mce(const kvm_x86_mce& error);
  int set_vapic_addr(u64 address);  ///< 0: none
  int tpr_access_reporting(kvm_tpr_access_ctl& control);
  int enable_cap(const kvm_enable_cap& cap);
  int get_stats_fd();  ///< a new descriptor
  void publish_stats(os::Mapping page);
  const vm::VcpuStats& stats() const { return stats_; }

  // --- any thread -------------------------------------------------------------------------------------------------
  /// Has the vCPU forget every host pointer into guest memory; returns when it has, or will before it uses one.
  void flush_tlb_and_wait();
  /// VmClock has changed: the guest's clock page is written again before it runs on.
  void clock_changed() { wake(); }
  bool has_run() const { return has_run_.load(std::memory_order_relaxed); }
  void set_disabled_quirks(u64 quirks) { cpu_.disabled_quirks.store(quirks, std::memory_order_relaxed); }
  void wake() override;
  void signal_nmi() override;
  void signal_smi() override {}  ///< no system management mode: dropped, as by a kernel built without it
  void signal_init() override;
  void signal_sipi(u8 vector) override;
  void signal_unhalt() override;

  // --- what the CPU, its APIC and its paravirtual devices ask (the vCPU's thread) ------------------------------------
  x86::HostPage page(Gpa gpa, bool for_write) override;
  unsigned ram(x86::RamRange* out, unsigned most) override;
  u64 ram_version() override;
  bool mmio_read(Gpa gpa, void* data, unsigned length) override;
  bool mmio_write(Gpa gpa, const void* data, unsigned length) override;
  bool pio_in(u16 port, void* data, unsigned size) override;
  bool pio_out(u16 port, const void* data, unsigned size) override;
  MsrResult read_msr(u32 index, u64& value) override;
  MsrResult write_msr(u32 index, u64 value) override;
  void cpuid(u32 leaf, u32 subleaf, u32 out[4]) override;
  u64 read_cr8() override;
  x86::Result write_cr8(u64 value) override;
  x86::Result hypercall() override;
  void interrupt_window_changed() override;

  u64 tsc_deadline_ns(u64 guest_tsc) override;
  void ioapic_eoi(u8 vector) override;

 private:
  /// What the client's answer in kvm_run belongs to.
  enum class Pending : u8 { none, pio_in, pio_out, mmio_read, mmio_write, hypercall, msr };
  /// Requests that INIT and start-up IPIs make.
  static constexpr u32 init_request = 1, sipi_request = 2;
  /// run_loop() and what it calls: go on in the guest, or return from KVM_RUN with 0 or -errno.
  static constexpr int go_on = 1;

  // run.cpp
  int run_locked();
  int run_loop();
  int complete_exit();
  int finish_instruction();
  int enter_guest();
  void enter_guarded();
  void sync_vapic(bool entering);
  int handle_exit();
  int exit_to_client(u32 reason);
  int next_mmio_write();
  int exit_pio();
  bool skips_out_at_once() const;
  int exit_halt();
  int exit_irq_window();
  int exit_debug();
  int exit_hypercall();
  int exit_internal_error();
  int run_refused();
  void count_engine();
  int sync_regs_in();
  void sync_regs_out();
  void save_run_state();
  bool guest_state_is_valid() const;
  /// Calls f; false when the host refused it an access to guest memory. Destructors in f are skipped then.
  template <class F>
  bool guarded(F&& f) {
    struct Call {
      F& f;
      Vcpu& vcpu;
    } call{f, *this};
    return os::run_guarded(
        [](void* arg) { static_cast<Call*>(arg)->f(); }, &call, os::HostFaults::all,
        [](void* arg, const void* address) { return static_cast<Call*>(arg)->vcpu.accepts_fault(address); });
  }
  bool accepts_fault(const void* address);

  // events.cpp
  bool accept_init_sipi();
  bool inject_events();
  bool inject_exception();
  void collect_nmis();
  int take_interrupt();
  bool has_interrupt();
  bool has_events();
  bool has_pic_interrupt();
  bool interrupts_allowed() const;
  bool accepts_client_interrupt();
  bool ready_for_client_interrupt();
  bool wants_interrupt_window();
  bool needs_reinjection() const;
  void reset_after_init();

  // tracing.cpp
  void trace_guest(u64 began_ns);
  void trace_entry();
  void trace_return();
  void trace_halt(u64 began_ns);
  void trace_injection(const char* name, int vector);

  // machine.cpp, user_msr.cpp
  bool coalesce(bool pio, u64 address, const void* data, unsigned length) const;
  MsrResult read_own_msr(u32 index, u64& value);
  MsrResult write_own_msr(u32 index, u64 value);
  MsrResult read_filtered_msr(u32 index, u64& value);
  MsrResult write_filtered_msr(u32 index, u64 value);
  MsrResult fail_msr(x86::ExitKind kind, u32 index, u64 value, u32 reason);
  int exit_msr();

  // wait.cpp
  int block();
  void wait(u32 ticket);
  void enter_guest_mode();
  void leave_guest_mode() { in_guest_mode_.store(0, std::memory_order_release); }
  void serve_tlb_flush();
  bool signal_arrived();

  // state.cpp
  int set_sregs_locked(const kvm_sregs& sregs);
  void get_sregs_locked(kvm_sregs& sregs);
  /// The fields that both forms have; check changes nothing.
  template <class Sregs>
  bool sregs_are_valid(const Sregs& sregs) const;
  template <class Sregs>
  void load_sregs(const Sregs& sregs);
  template <class Sregs>
  void store_sregs(Sregs& sregs);
  void load_pdptes_from_memory();
  int set_apic_base(u64 value);
  u64 apic_base() const { return apic_ ? apic_->base() : apic_base_; }
  void cpuid_set();
  void update_apic_features();
  void update_cpuid_quirk();
  void tsc_moved();
  bool host_get_msr(u32 index, u64& value);
  bool host_set_msr(u32 index, u64 value);
  void load_regs(const kvm_regs& regs);
  void store_regs(kvm_regs& regs) const;
  int load_events(const kvm_vcpu_events& events);
  void store_events(kvm_vcpu_events& events);

  const std::shared_ptr<vm::Vm> vm_;
  const u32 id_;
  kvm_run* const run_;
  std::mutex mutex_;  ///< held by every ioctl, KVM_RUN for as long as it runs

  x86::Cpu cpu_;
  paravirt::Paravirt paravirt_;
  std::unique_ptr<os::RunDelay> run_delay_;
  std::unique_ptr<irqchip::LocalApic> apic_;  ///< nullptr: interrupts are the client's
  std::unique_ptr<engine::Engine> engine_;
  bool told_ = true;  ///< the guest may learn next of what others have written to its memory

  // Under mutex_.
  Pending pending_ = Pending::none;
  u64 pending_rip_ = 0;  ///< the client's answer is dropped when it has set another RIP
  u64 next_rip_ = 0;     ///< Pending::pio_out: behind the instruction
  u32 mp_state_;
  u64 apic_base_ = 0;       ///< without a local APIC
  u64 cr8_ = 0;             ///< without a local APIC
  int client_vector_ = -1;  ///< of KVM_INTERRUPT, with a local APIC but no PIC
  vm::VcpuStats stats_;
  const std::shared_ptr<Trace> trace_;  ///< nullptr: nobody wants one
  const char* traced_mode_ = nullptr;
  u64 left_ns_ = 0;  ///< when KVM_RUN returned last
  u32 left_reason_ = 0;
  int ioapic_eoi_ = -1;  ///< vector whose EOI the client is to hear of
  kvm_coalesced_mmio_ring* coalesced_ring_ = nullptr;
  bool msr_answered_ = false;  ///< kvm_run holds the client's answer for the RDMSR or WRMSR that starts again
  u32 msr_reason_ = 0;         ///< KVM_MSR_EXIT_REASON_* of the exit
  Gpa vapic_ = 0;              ///< KVM_SET_VAPIC_ADDR; 0: none
  std::atomic<bool> has_run_{false};
  Gpa refused_gpa_ = 0;                      ///< where the host last refused an access to guest memory
  bool check_state_ = true;                  ///< the client has set registers since the last entry
  bool tpr_lowered_ = false;                 ///< without a local APIC: KVM_EXIT_SET_TPR is due
  u32 slot_hint_ = 0;                        ///< MemorySlots::page's last hit
  u64 tsc_offset_seen_ = 0;                  ///< what the APIC's timer was armed with
  std::unique_ptr<SignalMask> signal_mask_;  ///< KVM_SET_SIGNAL_MASK; nullptr: none

  // Any thread.
  std::atomic<u32> wake_word_{0};  ///< changes with every wake(); the futex a halted vCPU sleeps on
  std::atomic<bool> sleeping_{false};
  std::atomic<u32> init_sipi_{0};
  std::atomic<u32> sipi_vector_{0};
  std::atomic<u32> nmis_queued_{0};
  std::atomic<bool> unhalted_{false};
  std::atomic<u32> in_guest_mode_{0};  ///< may hold host pointers into guest memory
  std::atomic<u64> flushes_wanted_{0}, flushes_done_{0};
  std::atomic<int> wake_fd_{-1};  ///< of signal_mask_: also signalled by wake()

  // Signal handlers on the vCPU's thread.
  std::atomic<bool> interrupted_{false};
  std::atomic<pthread_t> runner_{};  ///< the thread in KVM_RUN
  static void on_signal(void* vcpu);
  static void on_cancel(void* vcpu);  ///< on the canceller's thread
};

}  // namespace anykvm::vcpu
