// The host CPU as an oracle: runs one instruction natively on a given register state and reports what became of it.
#pragma once

#include "x86/types.h"

namespace anykvm::isa {

/// The registers of one run, in and out. Lives at a fixed low address so that code can reach it without a register.
struct HostState {
  u64 gpr[16];
  u64 rflags;
  u64 entry, host_rsp, return_to;
  u64 trap;  ///< out: exception vector, or no_trap
  u64 fault_address;
  alignas(64) u8 vector[16][32];
  alignas(64) u8 fx[512];  ///< FXSAVE64 image: x87 and MXCSR
};
inline constexpr u64 no_trap = ~0ull;

/// The addresses that code, data and HostState have in this process and in the guest alike.
inline constexpr u64 code_address = 0x20000000, data_address = 0x21000000, data_bytes = 16 * page_size,
                     state_address = 0x22000000;

class HostCpu {
 public:
  HostCpu();
  ~HostCpu();
  HostState& state() { return *reinterpret_cast<HostState*>(state_address); }
  u8* data() { return reinterpret_cast<u8*>(data_address); }
  /// Runs `length` bytes of code at code_address on state() and data().
  void run(const u8* code, unsigned length);

 private:
  void* signal_stack_;
};

}  // namespace anykvm::isa
