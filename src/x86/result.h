// How an attempt to execute an instruction, or a step of one, ends. No C++ exceptions: they allocate, and the run path
// must be safe in another program's signal handlers.
#pragma once

#include "x86/types.h"

namespace anykvm::x86 {

enum class [[nodiscard]] Result : u8{
    ok,     ///< done
    fault,  ///< Cpu::fault says which exception; nothing has changed that the exception must not show
    exit,   ///< Cpu::exit says what the machine must do first; RIP tells whether the instruction starts again
};

/// Exception vectors by their mnemonic.
namespace exception {
inline constexpr u8 de = 0, db = 1, nmi = 2, bp = 3, of = 4, br = 5, ud = 6, nm = 7, df = 8, ts = 10, np = 11, ss = 12,
                    gp = 13, pf = 14, mf = 16, ac = 17, mc = 18, xm = 19, cp = 21;
}

/// The exception that an instruction raised.
struct Fault {
  u8 vector = 0;
  bool has_error = false;
  bool trap = false;  ///< reported after the instruction: RIP already advanced (#BP, #OF, single step)
  u32 error = 0;
  u64 payload = 0;  ///< CR2 for #PF, DR6 bits for #DB
};

/// Why an engine stopped running guest code.
enum class ExitKind : u8 {
  none,
  attention,   ///< somebody set Cpu::attention, or an interrupt window opened
  halt,        ///< HLT, RIP behind it
  pio,         ///< port access that no in-kernel device took
  mmio_read,   ///< instruction starts again when Cpu::mmio.reply(...) has the bytes
  mmio_write,  ///< Cpu::mmio has writes queued; the instruction is complete
  hypercall,   ///< VMCALL/VMMCALL that the machine hands to its client
  msr_read,
  msr_write,
  shutdown,  ///< triple fault
  debug,
  internal_error,  ///< something the engine cannot execute: Exit::reason says what
  engine_error,    ///< the engine has found itself wrong, and goes no further: Exit::reason says how
  memory_error,    ///< the host refused an access to a memory slot: KVM_RUN fails with EFAULT
};

/// Details of the exit; which fields mean something depends on kind.
struct Exit {
  ExitKind kind = ExitKind::none;
  // pio
  bool is_in = false;
  u8 size = 0;  ///< bytes per element: 1, 2, 4
  u16 port = 0;
  u32 count = 0;              ///< elements
  u64 rip = 0, next_rip = 0;  ///< of an OUT and behind it; 0 for string operations and IN
  // msr_read, msr_write
  u32 msr_index = 0;
  u64 msr_value = 0;
  // debug: struct kvm_debug_exit_arch
  u8 debug_vector = 0;  ///< 1: #DB, 3: #BP
  bool halts = false;   ///< the instruction behind which the client is told was HLT
  u64 debug_pc = 0;     ///< linear address of the next instruction
  u64 dr6 = 0, dr7 = 0;
  // internal_error
  const char* reason = nullptr;  ///< static string
  u8 bytes[15] = {};
  u8 byte_count = 0;
};

}  // namespace anykvm::x86
