// What reaches the vCPU from outside, and in which order it is delivered: exceptions whose delivery was begun, NMIs,
// interrupts (the client's, the PIC's, the local APIC's), INIT and start-up IPIs, and the interrupt window.
// Reference: Intel SDM volume 3, 6.9 "Priority among simultaneous exceptions and interrupts"; api.rst 4.16
// KVM_INTERRUPT, 4.64 KVM_NMI, chapter 5 "request_interrupt_window".
#include <algorithm>
#include <cerrno>
#include <utility>

#include "irqchip/irqchip.h"
#include "os/attention.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::vcpu {

using x86::EventState;
using x86::Result;

void Vcpu::signal_nmi() {
  nmis_queued_.fetch_add(1, std::memory_order_acq_rel);
  wake();
}

void Vcpu::signal_init() {
  init_sipi_.store(init_request, std::memory_order_release);
  wake();
}

void Vcpu::signal_sipi(u8 vector) {
  sipi_vector_.store(vector, std::memory_order_relaxed);
  init_sipi_.fetch_or(sipi_request, std::memory_order_acq_rel);
  wake();
}

void Vcpu::signal_unhalt() {
  unhalted_.store(true, std::memory_order_release);
  wake();
}

/// Takes the INIT and start-up IPIs that have come. Whether one did anything.
bool Vcpu::accept_init_sipi() {
  const u32 requests = init_sipi_.exchange(0, std::memory_order_acq_rel);
  told_ |= requests != 0;
  if (requests & init_request) {
    reset_after_init();
    mp_state_ = apic_base() & irqchip::LocalApic::base_bsp ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_INIT_RECEIVED;
  }
  if (requests & sipi_request && mp_state_ == KVM_MP_STATE_INIT_RECEIVED) {
    cpu_.start_up(static_cast<u8>(sipi_vector_.load(std::memory_order_relaxed)));
    mp_state_ = KVM_MP_STATE_RUNNABLE;
  }
  return requests != 0;
}

void Vcpu::reset_after_init() {
  cpu_.init();
  paravirt_.reset();
  if (apic_) apic_->init();
  unhalted_.store(false, std::memory_order_relaxed);
  pending_ = Pending::none;
  client_vector_ = -1;
}

/// At most two NMIs wait, one while another is being delivered: KVM's limit, since a PC's NMI line cannot count.
void Vcpu::collect_nmis() {
  if (nmis_queued_.load(std::memory_order_acquire) == 0) return;
  EventState& event = cpu_.state.event;
  const u32 limit = event.nmi_masked || event.nmi_injected ? 1 : 2;
  const u32 queued = nmis_queued_.exchange(0, std::memory_order_acq_rel);
  event.nmi_pending = static_cast<u8>(std::min(event.nmi_pending + queued, limit));
}

bool Vcpu::interrupts_allowed() const {
  return cpu_.state.other_flags & x86::flag::if_ && cpu_.state.event.shadow == 0;
}

bool Vcpu::has_pic_interrupt() {
  irqchip::IrqChips* chips = vm_->chips();
  return chips && chips->pic_output() && apic_->takes_pic_output();
}

/// Whether an interrupt waits that interrupts_allowed() would let in. Those of the client without a local APIC are
/// not among them: they count as delivery begun.
bool Vcpu::has_interrupt() {
  if (!apic_) return false;
  return (client_vector_ >= 0 && apic_->takes_pic_output()) || has_pic_interrupt() || apic_->pending() >= 0;
}

/// The acknowledge cycle; -1 when the interrupt has gone.
int Vcpu::take_interrupt() {
  told_ |= client_vector_ >= 0 || has_pic_interrupt();
  if (client_vector_ >= 0 && apic_->takes_pic_output()) return std::exchange(client_vector_, -1);
  if (has_pic_interrupt())
    if (const int vector = vm_->chips()->pic_acknowledge(); vector >= 0) return vector;
  return apic_->acknowledge();
}

/// Whether a halted vCPU has reason to go on.
bool Vcpu::has_events() {
  if (init_sipi_.load(std::memory_order_acquire) != 0) return true;
  if (mp_state_ == KVM_MP_STATE_INIT_RECEIVED || mp_state_ == KVM_MP_STATE_UNINITIALIZED) return false;
  if (unhalted_.load(std::memory_order_acquire)) return true;
  const EventState& event = cpu_.state.event;
  if (event.exception_pending || event.exception_injected || event.nmi_injected || event.interrupt_injected ||
      event.triple_fault_pending)
    return true;
  collect_nmis();
  if (event.nmi_pending != 0 && !event.nmi_masked) return true;
  return interrupts_allowed() && has_interrupt();
}

bool Vcpu::needs_reinjection() const {
  const EventState& event = cpu_.state.event;
  return event.exception_injected || event.interrupt_injected || event.nmi_injected;
}

/// Delivers what is due, in order of priority. false: the delivery has an exit of its own, the guest does not run.
bool Vcpu::inject_events() {
  EventState& event = cpu_.state.event;
  cpu_.window_wanted = 0;
  collect_nmis();

  if (event.exception_injected || event.exception_pending) {
    if (!inject_exception()) return false;
  } else if (event.nmi_injected) {
    event.nmi_injected = false;
    told_ = true;
    stats_.add(vm::VcpuStat::nmi_injections);
    trace_injection("NMI", x86::exception::nmi);
    if (cpu_.deliver_nmi() == Result::exit) return false;
  } else if (event.interrupt_injected) {
    event.interrupt_injected = false;
    told_ = true;
    event.shadow = 0;
    stats_.add(vm::VcpuStat::irq_injections);
    trace_injection("interrupt", event.interrupt_vector);
    if (cpu_.deliver_interrupt(event.interrupt_vector) == Result::exit) return false;
  }

  if (cpu_.guest_debug.control & KVM_GUESTDBG_BLOCKIRQ) return true;
  if (event.nmi_pending != 0) {
    if (!event.nmi_masked && event.shadow == 0) {
      --event.nmi_pending;
      told_ = true;
      stats_.add(vm::VcpuStat::nmi_injections);
      trace_injection("NMI", x86::exception::nmi);
      if (cpu_.deliver_nmi() == Result::exit) return false;
    }
    cpu_.window_wanted |= event.nmi_pending != 0;
  }
  if (has_interrupt()) {
    if (interrupts_allowed()) {
      const int vector = take_interrupt();
      stats_.add(vm::VcpuStat::irq_injections, vector >= 0);
      if (vector >= 0) trace_injection("interrupt", vector);
      if (vector >= 0 && cpu_.deliver_interrupt(static_cast<u8>(vector)) == Result::exit) return false;
      cpu_.window_wanted |= has_interrupt();
    } else {
      cpu_.window_wanted = 1;
    }
  }
  if (wants_interrupt_window()) {
    // An open window ends the entry before its first instruction, as VMX' interrupt-window exiting does.
    if (ready_for_client_interrupt()) return false;
    cpu_.window_wanted = 1;
  }
  return true;
}

bool Vcpu::inject_exception() {
  EventState& event = cpu_.state.event;
  const u8 vector = event.exception_vector;
  cpu_.fault = {.vector = vector,
                .has_error = event.exception_has_error,
                // The flags' image: KVM sets RF only at the first attempt of a fault.
                .trap = event.exception_injected || vector == x86::exception::bp || vector == x86::exception::of,
                .error = event.exception_error};
  if (event.exception_has_payload)
    cpu_.fault.payload = event.exception_payload;
  else if (vector == x86::exception::pf)
    cpu_.fault.payload = cpu_.state.cr2;
  else if (vector == x86::exception::db)
    cpu_.fault.payload = cpu_.state.dr6 & 0xe00f;
  event.exception_injected = event.exception_pending = event.exception_has_payload = false;
  return cpu_.deliver_fault() != Result::exit;
}

// --- the client's interrupts ------------------------------------------------------------------------------------

bool Vcpu::wants_interrupt_window() {
  return __atomic_load_n(&run_->request_interrupt_window, __ATOMIC_RELAXED) && vm_->chips() == nullptr;
}

/// Whether there is a place for a vector of KVM_INTERRUPT.
bool Vcpu::accepts_client_interrupt() {
  if (!apic_) return !cpu_.state.event.interrupt_injected;
  return client_vector_ < 0 && apic_->takes_pic_output();
}

bool Vcpu::ready_for_client_interrupt() {
  return interrupts_allowed() && accepts_client_interrupt() && !needs_reinjection() &&
         !cpu_.state.event.exception_pending;
}

int Vcpu::interrupt(const kvm_interrupt& interrupt) {
  std::lock_guard lock(mutex_);
  if (interrupt.irq >= 256) return -EINVAL;
  if (!apic_) {
    EventState& event = cpu_.state.event;
    event.interrupt_injected = true;
    event.interrupt_soft = false;
    event.interrupt_vector = static_cast<u8>(interrupt.irq);
    return 0;
  }
  if (vm_->chips()) return -ENXIO;
  if (client_vector_ >= 0) return -EEXIST;
  client_vector_ = static_cast<int>(interrupt.irq);
  return 0;
}

int Vcpu::nmi() {
  std::lock_guard lock(mutex_);
  signal_nmi();
  return 0;
}

void Vcpu::interrupt_window_changed() {
  if (cpu_.window_wanted) os::raise_attention(cpu_.attention);
}

}  // namespace anykvm::vcpu
