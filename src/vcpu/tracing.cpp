// What of a vCPU's life goes into its trace. Nothing here is called without one.
#include <utility>

#include "os/clock.h"
#include "vcpu/internal_error.h"
#include "vcpu/vcpu.h"

namespace anykvm::vcpu {

using x86::ExitKind;

namespace {

const char* name_of_client_exit(u32 reason) {
  switch (reason) {
    case KVM_EXIT_IO: return "client: port I/O";
    case KVM_EXIT_MMIO: return "client: MMIO";
    case KVM_EXIT_HLT: return "client: HLT";
    case KVM_EXIT_INTR: return "client: signal";
    case KVM_EXIT_IRQ_WINDOW_OPEN: return "client: interrupt window";
    case KVM_EXIT_DEBUG: return "client: debug";
    case KVM_EXIT_SHUTDOWN: return "client: shutdown";
    case KVM_EXIT_INTERNAL_ERROR: return "client: internal error";
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR: return "client: MSR";
    default: return "client";
  }
}

/// The exit's name and what belongs to it.
const char* name_of_exit(const x86::Cpu& cpu, u64& value) {
  const x86::Exit& exit = cpu.exit;
  value = 0;
  switch (exit.kind) {
    case ExitKind::halt: return "HLT";
    case ExitKind::pio: value = exit.port; return exit.is_in ? "IN" : "OUT";
    case ExitKind::mmio_read: value = cpu.mmio.wanted().gpa; return "MMIO read";
    case ExitKind::mmio_write: return "MMIO write";
    case ExitKind::hypercall: value = cpu.state.gpr[x86::rax]; return "hypercall";
    case ExitKind::msr_read: value = exit.msr_index; return "RDMSR";
    case ExitKind::msr_write: value = exit.msr_index; return "WRMSR";
    case ExitKind::shutdown: return "triple fault";
    case ExitKind::debug: return "debug";
    case ExitKind::internal_error:
    case ExitKind::engine_error: return "internal error";
    case ExitKind::memory_error: return "memory error";
    default: return "attention";
  }
}

}  // namespace

void Vcpu::trace_guest(u64 began_ns) {
  const u64 now = os::monotonic_ns(), rip = cpu_.state.rip;
  u64 value;
  const char* const what = name_of_exit(cpu_, value);
  trace_->add({began_ns, now, "guest", what, value, rip});
  const char* const mode = mode_name(cpu_);
  if (mode != std::exchange(traced_mode_, mode)) trace_->add({now, now, mode, nullptr, 0, rip});
}

void Vcpu::trace_entry() {
  if (left_ns_ != 0)
    trace_->add({left_ns_, os::monotonic_ns(), name_of_client_exit(left_reason_), nullptr, 0, cpu_.state.rip});
}

void Vcpu::trace_return() {
  left_ns_ = os::monotonic_ns();
  left_reason_ = run_->exit_reason;
}

void Vcpu::trace_halt(u64 began_ns) {
  trace_->add({began_ns, os::monotonic_ns(), "halted", nullptr, 0, cpu_.state.rip});
}

void Vcpu::trace_injection(const char* name, int vector) {
  if (!trace_) [[likely]]
    return;
  const u64 now = os::monotonic_ns();
  trace_->add({now, now, name, "vector", static_cast<u64>(vector), cpu_.state.rip});
}

}  // namespace anykvm::vcpu
