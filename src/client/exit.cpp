// struct kvm_run to Exit. On the KVM_RUN path: no allocation.
#include "anykvm/exit.h"

#include <algorithm>
#include <cerrno>

#include "anykvm/kvm.h"
#include "anykvm/vcpu.h"

namespace anykvm {

Exit Vcpu::refused(int error) {
  if (error == EINTR) return exits::Interrupted{};
  if (error == EAGAIN) return exits::NotStarted{};
  throw KvmError(error, "KVM_RUN");
}

namespace {

Exit decode_io(kvm_run& run) {
  auto* data = reinterpret_cast<std::uint8_t*>(&run) + run.io.data_offset;
  const std::size_t bytes = std::size_t(run.io.size) * run.io.count;
  if (run.io.direction == KVM_EXIT_IO_IN) return exits::IoIn{run.io.port, run.io.size, run.io.count, {data, bytes}};
  return exits::IoOut{run.io.port, run.io.size, run.io.count, {data, bytes}};
}

Exit decode_mmio(kvm_run& run) {
  const std::size_t bytes = std::min<std::size_t>(run.mmio.len, sizeof run.mmio.data);
  if (run.mmio.is_write) return exits::MmioWrite{run.mmio.phys_addr, {run.mmio.data, bytes}};
  return exits::MmioRead{run.mmio.phys_addr, {run.mmio.data, bytes}};
}

Exit decode_internal_error(const kvm_run& run) {
  exits::InternalError error{.suberror = run.internal.suberror};
  const auto words = std::min<std::size_t>(run.internal.ndata, std::size(run.internal.data));
  error.data = {run.internal.data, words};
  const auto& failure = run.emulation_failure;
  if (error.suberror == KVM_INTERNAL_ERROR_EMULATION && words >= 1 &&
      (failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
    error.instruction = {failure.insn_bytes, std::min<std::size_t>(failure.insn_size, sizeof failure.insn_bytes)};
  return error;
}

}  // namespace

Exit Vcpu::decode_exit() const {
  kvm_run& run = *run_;
  switch (run.exit_reason) {
    case KVM_EXIT_IO: return decode_io(run);
    case KVM_EXIT_MMIO: return decode_mmio(run);
    case KVM_EXIT_HLT: return exits::Hlt{};
    case KVM_EXIT_SHUTDOWN: return exits::Shutdown{};
    case KVM_EXIT_IRQ_WINDOW_OPEN: return exits::IrqWindowOpen{};
    case KVM_EXIT_INTR: return exits::Interrupted{};
    case KVM_EXIT_FAIL_ENTRY: return exits::FailEntry{run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu};
    case KVM_EXIT_INTERNAL_ERROR: return decode_internal_error(run);
    case KVM_EXIT_SYSTEM_EVENT:
      return exits::SystemEvent{
          run.system_event.type,
          {run.system_event.data, std::min<std::size_t>(run.system_event.ndata, std::size(run.system_event.data))}};
    case KVM_EXIT_DEBUG:
      return exits::Debug{run.debug.arch.exception, run.debug.arch.pc, run.debug.arch.dr6, run.debug.arch.dr7};
    case KVM_EXIT_IOAPIC_EOI: return exits::IoapicEoi{run.eoi.vector};
    case KVM_EXIT_HYPERCALL:
      return exits::Hypercall{run.hypercall.nr, std::span<const exits::Word, 6>(run.hypercall.args, 6),
                              run.hypercall.ret};
    case KVM_EXIT_X86_RDMSR: return exits::ReadMsr{run.msr.index, run.msr.reason, run.msr.data, run.msr.error};
    case KVM_EXIT_X86_WRMSR: return exits::WriteMsr{run.msr.index, run.msr.reason, run.msr.data, run.msr.error};
    default: return exits::Other{run.exit_reason};
  }
}

}  // namespace anykvm
