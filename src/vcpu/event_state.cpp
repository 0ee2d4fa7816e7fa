// What is waiting and what state the vCPU is in, as ioctls.
// Reference: api.rst 4.31 KVM_GET/SET_VCPU_EVENTS, 4.38 KVM_GET/SET_MP_STATE, 4.57 KVM_GET/SET_LAPIC.
#include <cerrno>

#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::vcpu {

using x86::EventState;

void Vcpu::store_events(kvm_vcpu_events& events) {
  collect_nmis();
  const EventState& event = cpu_.state.event;
  const bool payload = vm_->exception_payload_enabled();
  events = {};
  // Software exceptions come again by themselves, since RIP still is at their instruction.
  if (event.exception_vector != x86::exception::bp && event.exception_vector != x86::exception::of) {
    events.exception.injected = event.exception_injected || (!payload && event.exception_pending);
    events.exception.pending = event.exception_pending;
  }
  events.exception.nr = event.exception_vector;
  events.exception.has_error_code = event.exception_has_error;
  events.exception.error_code = event.exception_error;
  events.exception_has_payload = event.exception_has_payload;
  events.exception_payload = event.exception_payload;
  events.interrupt.injected = event.interrupt_injected && !event.interrupt_soft;
  events.interrupt.nr = event.interrupt_vector;
  events.interrupt.shadow = event.shadow;
  events.nmi.injected = event.nmi_injected;
  events.nmi.pending = event.nmi_pending;
  events.nmi.masked = event.nmi_masked;
  events.smi.latched_init = (init_sipi_.load(std::memory_order_relaxed) & init_request) != 0;
  events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
  if (payload) events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
  if (vm_->triple_fault_event_enabled()) {
    events.triple_fault.pending = event.triple_fault_pending;
    events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
  }
}

int Vcpu::load_events(const kvm_vcpu_events& events) {
  constexpr u32 known = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW |
                        KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
  if (events.flags & ~known) return -EINVAL;
  if (events.flags & KVM_VCPUEVENT_VALID_PAYLOAD && !vm_->exception_payload_enabled()) return -EINVAL;
  if (events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT && !vm_->triple_fault_event_enabled()) return -EINVAL;
  const bool pending = events.flags & KVM_VCPUEVENT_VALID_PAYLOAD && events.exception.pending;
  const bool injected = events.exception.injected && !pending;
  if ((injected || pending) && (events.exception.nr > 31 || events.exception.nr == x86::exception::nmi)) return -EINVAL;
  // There is no system management mode to be in.
  if (events.flags & KVM_VCPUEVENT_VALID_SMM && (events.smi.smm || events.smi.pending || events.smi.smm_inside_nmi))
    return -EINVAL;

  collect_nmis();
  EventState& event = cpu_.state.event;
  event.exception_injected = injected;
  event.exception_pending = pending;
  event.exception_vector = events.exception.nr;
  event.exception_has_error = events.exception.has_error_code;
  event.exception_error = events.exception.error_code;
  event.exception_has_payload = pending && events.exception_has_payload;
  event.exception_payload = events.exception_payload;
  event.interrupt_injected = events.interrupt.injected;
  event.interrupt_vector = events.interrupt.nr;
  event.interrupt_soft = events.interrupt.soft;
  if (events.flags & KVM_VCPUEVENT_VALID_SHADOW)
    event.shadow = events.interrupt.shadow & (KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI);
  event.nmi_injected = events.nmi.injected;
  if (events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING) {
    event.nmi_pending = 0;
    nmis_queued_.store(events.nmi.pending, std::memory_order_relaxed);
  }
  event.nmi_masked = events.nmi.masked;
  if (events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR && apic_)
    sipi_vector_.store(events.sipi_vector, std::memory_order_relaxed);
  if (events.flags & KVM_VCPUEVENT_VALID_SMM && apic_) {
    if (events.smi.latched_init)
      init_sipi_.fetch_or(init_request, std::memory_order_relaxed);
    else
      init_sipi_.fetch_and(~init_request, std::memory_order_relaxed);
  }
  if (events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) event.triple_fault_pending = events.triple_fault.pending;
  return 0;
}

int Vcpu::get_vcpu_events(kvm_vcpu_events& events) {
  std::lock_guard lock(mutex_);
  store_events(events);
  return 0;
}

int Vcpu::set_vcpu_events(const kvm_vcpu_events& events) {
  std::lock_guard lock(mutex_);
  return load_events(events);
}

int Vcpu::get_mp_state(kvm_mp_state& state) {
  std::lock_guard lock(mutex_);
  accept_init_sipi();
  const bool halted = mp_state_ == KVM_MP_STATE_HALTED || mp_state_ == KVM_MP_STATE_AP_RESET_HOLD;
  state.mp_state = halted && unhalted_.load(std::memory_order_relaxed) ? KVM_MP_STATE_RUNNABLE : mp_state_;
  return 0;
}

int Vcpu::set_mp_state(const kvm_mp_state& state) {
  std::lock_guard lock(mutex_);
  switch (state.mp_state) {
    case KVM_MP_STATE_RUNNABLE: break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_HALTED:
    case KVM_MP_STATE_AP_RESET_HOLD:
    case KVM_MP_STATE_INIT_RECEIVED:
    case KVM_MP_STATE_SIPI_RECEIVED:
      if (!apic_) return -EINVAL;
      break;
    default: return -EINVAL;
  }
  if (state.mp_state == KVM_MP_STATE_SIPI_RECEIVED) {
    mp_state_ = KVM_MP_STATE_INIT_RECEIVED;
    init_sipi_.fetch_or(sipi_request, std::memory_order_relaxed);
  } else {
    mp_state_ = state.mp_state;
  }
  return 0;
}

int Vcpu::get_lapic(kvm_lapic_state& lapic) {
  std::lock_guard lock(mutex_);
  if (!apic_) return -EINVAL;
  enter_guest_mode();
  (void)guarded([&] { apic_->get_state(lapic); });
  leave_guest_mode();
  return 0;
}

int Vcpu::set_lapic(const kvm_lapic_state& lapic) {
  std::lock_guard lock(mutex_);
  if (!apic_) return -EINVAL;
  int result = 0;
  enter_guest_mode();
  (void)guarded([&] { result = apic_->set_state(lapic); });
  leave_guest_mode();
  return result;
}

}  // namespace anykvm::vcpu
