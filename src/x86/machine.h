// What a CPU asks of the machine around it. Implemented above (vcpu/), faked in tests.
#pragma once

#include "x86/result.h"
#include "x86/types.h"

namespace anykvm::x86 {

/// Where a guest-physical page lives in this process.
struct HostPage {
  u8* host = nullptr;  ///< first byte of the page; nullptr: no RAM there (MMIO)
  bool writable =
      false;  ///< false: a store is MMIO (read-only slot), or is not allowed before page(gpa, true) was asked
};

/// Guest RAM in this process' memory.
struct RamRange {
  u8* host;
  u64 size;  ///< in bytes
};

class Machine {
 public:
  /// The RAM page that holds gpa. for_write announces a store: the page becomes dirty in the log, tracked pages are
  /// told. The pointer stays good until the CPU is asked to flush (Cpu::request_tlb_flush).
  virtual HostPage page(Gpa gpa, bool for_write) = 0;

  /// The ranges of RAM, the first `most` of them; a number that changes whenever they may have. Same condition.
  virtual unsigned ram(RamRange*, unsigned /*most*/) { return 0; }
  virtual u64 ram_version() { return 0; }

  /// In-kernel devices and ioeventfds at a physical address; length 1, 2, 4 or 8.
  /// false: nobody here; the access goes to the client as KVM_EXIT_MMIO.
  virtual bool mmio_read(Gpa gpa, void* data, unsigned length) = 0;
  virtual bool mmio_write(Gpa gpa, const void* data, unsigned length) = 0;

  /// The same for ports; size 1, 2 or 4. false: KVM_EXIT_IO.
  virtual bool pio_in(u16 port, void* data, unsigned size) = 0;
  virtual bool pio_out(u16 port, const void* data, unsigned size) = 0;

  /// MSRs that are not plain CPU state: local APIC, TSC deadline, paravirtual clocks, MSR filters and user-space MSRs.
  /// Result::fault: the caller raises #GP(0). Result::exit: Cpu::exit is filled in (KVM_EXIT_X86_RDMSR/WRMSR).
  /// not_mine: x86/msr decides.
  enum class MsrResult : u8 { ok, gp, exit, not_mine };
  virtual MsrResult read_msr(u32 index, u64& value) = 0;
  virtual MsrResult write_msr(u32 index, u64 value) = 0;

  /// CPUID as the client set it (KVM_SET_CPUID2), dynamic bits applied.
  virtual void cpuid(u32 leaf, u32 subleaf, u32 out[4]) = 0;

  /// CR8 is the local APIC's task priority, or struct kvm_run's cr8.
  virtual u64 read_cr8() = 0;
  virtual Result write_cr8(u64 value) = 0;

  /// VMCALL/VMMCALL. Arguments and the result are in the guest's registers. Result::exit: KVM_EXIT_HYPERCALL.
  virtual Result hypercall() = 0;

  /// IF, the shadow, TPR or GIF changed so that a held-back event may now be deliverable.
  virtual void interrupt_window_changed() = 0;

 protected:
  ~Machine() = default;
};

}  // namespace anykvm::x86
