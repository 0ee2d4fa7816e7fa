// Which event is delivered: raising, double and triple faults, and what CR2, DR6 and the NMI mask see of it.
// Reference: Intel SDM volume 3 chapter 6.5-6.15 (table 6-5); AMD64 manual volume 2 chapter 8.2.
#include "x86/debug.h"
#include "x86/delivery.h"
#include "x86/descriptors.h"

namespace anykvm::x86 {

namespace {

enum class Severity : u8 { benign, contributory, page_fault, double_fault };

Severity severity(u8 vector) {
  switch (vector) {
    case exception::de:
    case exception::ts:
    case exception::np:
    case exception::ss:
    case exception::gp:
    case exception::cp: return Severity::contributory;
    case exception::pf: return Severity::page_fault;
    case exception::df: return Severity::double_fault;
    default: return Severity::benign;
  }
}

/// CR2 and DR6 show the exception from the start of its delivery.
void record_payload(CpuState& s, const Fault& fault) {
  if (fault.vector == exception::pf) s.cr2 = fault.payload;
  if (fault.vector == exception::db) {
    s.dr6 = (s.dr6 & ~0xfull) | dr6_fixed | (fault.payload & dr6_writable);
    s.dr7 &= ~dr7_gd;
    s.msr.debugctl &= ~debugctl_btf;
  }
}

Result shut_down(Cpu& cpu) {
  cpu.exit.kind = ExitKind::shutdown;
  return Result::exit;
}

}  // namespace

Result Cpu::raise(u8 vector) {
  fault = {.vector = vector};
  return Result::fault;
}

Result Cpu::raise(u8 vector, u32 error) {
  fault = {.vector = vector, .has_error = true, .error = error};
  return Result::fault;
}

Result Cpu::raise_page_fault(Gva gva, u32 error) {
  fault = {.vector = exception::pf, .has_error = true, .error = error, .payload = gva};
  return Result::fault;
}

Result Cpu::deliver_fault() {
  for (;;) {
    debug_hits = 0;
    const Fault first = fault;
    record_payload(state, first);
    const Delivery event = {.vector = first.vector,
                            .has_error = first.has_error,
                            .error = first.error,
                            // Not behind an instruction breakpoint: its handler says whether it is to be met again.
                            .resume_flag = !first.trap && (first.vector != exception::db || first.payload == dr6_bd),
                            .return_rip = state.rip};
    const Result result = deliver(*this, event);
    if (result == Result::ok) return result;
    if (result == Result::exit) {
      // A device lies under the stack or the tables. The event waits, as one whose delivery was begun.
      EventState& waiting = state.event;
      waiting.exception_injected = true;
      waiting.exception_vector = first.vector;
      waiting.exception_has_error = first.has_error;
      waiting.exception_error = first.error;
      return result;
    }
    const Severity before = severity(first.vector), now = severity(fault.vector);
    if (before == Severity::double_fault) return shut_down(*this);
    if ((before == Severity::contributory && now == Severity::contributory) ||
        (before == Severity::page_fault && (now == Severity::contributory || now == Severity::page_fault))) {
      // The page fault that was not delivered is visible in CR2 all the same.
      record_payload(state, fault);
      fault = {.vector = exception::df, .has_error = true};
    }
  }
}

Result Cpu::deliver_interrupt(u8 vector) {
  const Result result = deliver(*this, {.vector = vector, .return_rip = state.rip});
  if (result == Result::exit) {
    state.event.interrupt_injected = true;
    state.event.interrupt_soft = false;
    state.event.interrupt_vector = vector;
  }
  return result == Result::fault ? deliver_fault() : result;
}

Result Cpu::deliver_nmi() {
  const Result result = deliver(*this, {.vector = exception::nmi, .return_rip = state.rip});
  if (result == Result::exit) {
    state.event.nmi_injected = true;
    return result;
  }
  state.event.nmi_masked = true;
  return result == Result::fault ? deliver_fault() : result;
}

Result Cpu::debug_interrupt(u64 next_rip) {
  if (client_takes_debug()) {
    state.rip = next_rip;
    return debug_exit(exception::db, 0);
  }
  return deliver(*this, {.vector = exception::db, .return_rip = next_rip});
}

Result Cpu::software_interrupt(u8 vector, u64 next_rip, SoftwareInterrupt form) {
  if (form == SoftwareInterrupt::int3 && client_takes_breakpoints()) return debug_exit(exception::bp, 0);
  if (state.v86() && form == SoftwareInterrupt::int_n) {
    // It belongs to the program's own handler where the monitor has said so, else to the monitor unless IOPL is 3.
    bool redirected = false;
    if (state.cr4 & cr4::vme) ANYKVM_TRY(redirect_v86_interrupt(*this, vector, next_rip, redirected));
    if (redirected) return Result::ok;
    if ((state.other_flags & flag::iopl) != flag::iopl) return gp();
  }
  return deliver(*this, {.vector = vector, .software = true, .return_rip = next_rip});
}

}  // namespace anykvm::x86
