// Why Vcpu::run() came back, as a type. (KVM API, "The kvm_run structure".)
//
// Spans lie in the vCPU's shared area: they are valid until the next run(). What an exit asks the client for (the bytes
// of a read) is written there, and the next run() completes the instruction with it.
#pragma once

#include <cstdint>
#include <span>
#include <variant>

namespace anykvm {
namespace exits {

using Word = unsigned long long;  ///< as the kernel declares its 64-bit fields

/// KVM_EXIT_IO, IN: `count` elements of `size` bytes (1, 2, 4), for the client to fill in.
struct IoIn {
  std::uint16_t port;
  std::uint8_t size;
  std::uint32_t count;
  std::span<std::uint8_t> data;
};
/// KVM_EXIT_IO, OUT.
struct IoOut {
  std::uint16_t port;
  std::uint8_t size;
  std::uint32_t count;
  std::span<const std::uint8_t> data;
};
/// KVM_EXIT_MMIO, a read of 1 to 8 bytes, for the client to fill in.
struct MmioRead {
  std::uint64_t gpa;
  std::span<std::uint8_t> data;
};
/// KVM_EXIT_MMIO, a write of 1 to 8 bytes.
struct MmioWrite {
  std::uint64_t gpa;
  std::span<const std::uint8_t> data;
};
/// KVM_EXIT_HLT: without an interrupt chip, waiting for an interrupt is the client's.
struct Hlt {};
/// KVM_EXIT_SHUTDOWN: a triple fault.
struct Shutdown {};
/// KVM_EXIT_IRQ_WINDOW_OPEN: kvm_run::request_interrupt_window was set and the guest takes interrupts now.
struct IrqWindowOpen {};
/// KVM_RUN failed with EINTR (a signal, kvm_run::immediate_exit), or KVM_EXIT_INTR.
struct Interrupted {};
/// KVM_RUN failed with EAGAIN: the vCPU was waiting to be started, and has been.
struct NotStarted {};
/// KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state.
struct FailEntry {
  std::uint64_t hardware_reason;
  std::uint32_t cpu;
};
/// KVM_EXIT_INTERNAL_ERROR. `instruction` holds the bytes at RIP when the failure was to emulate them; else it is
/// empty.
struct InternalError {
  std::uint32_t suberror;  ///< KVM_INTERNAL_ERROR_…
  std::span<const Word> data;
  std::span<const std::uint8_t> instruction;
};
/// KVM_EXIT_SYSTEM_EVENT.
struct SystemEvent {
  std::uint32_t type;  ///< KVM_SYSTEM_EVENT_…
  std::span<const Word> data;
};
/// KVM_EXIT_DEBUG: Vcpu's guest debugging met what it was set for.
struct Debug {
  std::uint32_t exception;
  std::uint64_t pc, dr6, dr7;
};
/// KVM_EXIT_IOAPIC_EOI, with the split interrupt chip.
struct IoapicEoi {
  std::uint8_t vector;
};
/// KVM_EXIT_HYPERCALL: `result` is the guest's RAX at the next run().
struct Hypercall {
  std::uint64_t number;
  std::span<const Word, 6> arguments;
  Word& result;
};
/// KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, when enabled by KVM_CAP_X86_USER_SPACE_MSR: `error` other than 0 at the next
/// run() is a #GP in the guest.
struct ReadMsr {
  std::uint32_t index, reason;
  Word& data;
  std::uint8_t& error;
};
struct WriteMsr {
  std::uint32_t index, reason;
  std::uint64_t data;
  std::uint8_t& error;
};
/// Any other KVM_EXIT_…: Vcpu::run_area() has the rest.
struct Other {
  std::uint32_t reason;
};

}  // namespace exits

using Exit = std::variant<exits::IoIn, exits::IoOut, exits::MmioRead, exits::MmioWrite, exits::Hlt, exits::Shutdown,
                          exits::IrqWindowOpen, exits::Interrupted, exits::NotStarted, exits::FailEntry,
                          exits::InternalError, exits::SystemEvent, exits::Debug, exits::IoapicEoi, exits::Hypercall,
                          exits::ReadMsr, exits::WriteMsr, exits::Other>;

/// For std::visit with one lambda per exit that matters and `[](auto&) {}` for the rest.
template <class... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};

}  // namespace anykvm
