// One x86 CPU: its state, its MMU, its machine, and the architecture's operations on them. Engines execute with these;
// each operation is defined in the file of its subject.
#pragma once

#include <atomic>

#include "anykvm/kvm.h"
#include "x86/cpuid.h"
#include "x86/machine.h"
#include "x86/mmu.h"
#include "x86/result.h"
#include "x86/state.h"

namespace anykvm::x86 {

/// A memory access that left RAM. Reads are answered by the client one fragment (<= 8 bytes) an exit; the instruction
/// then starts again and finds the bytes it already has, in the order in which it asks. Writes are queued, and the
/// instruction is complete: the vCPU hands the queue to the client one exit at a time before the guest goes on.
class MmioPort {
 public:
  struct Fragment {
    Gpa gpa;
    u8 length;  ///< 1..8
    u8 data[8];
  };
  static constexpr unsigned max_read_bytes = 4096, max_writes = 520;

  /// Engine side.
  void begin_instruction() { read_position_ = 0; }                ///< (re)start: reads are replayed from the first
  void retire_instruction() { read_size_ = read_position_ = 0; }  ///< reads are consumed
  bool replies_pending() const { return read_size_ != 0; }
  bool touched() const { return (read_size_ | write_count_) != 0; }  ///< the instruction left RAM
  /// While barred, an access that leaves RAM ends in ExitKind::internal_error instead: the instruction in flight is not
  /// one that KVM's emulator knows.
  bool barred() const { return barred_; }
  void bar(bool barred) { barred_ = barred; }
  /// The reply to the next read, or false with `wanted` set to what the client must answer.
  bool take_read(Gpa gpa, void* data, unsigned length);
  bool queue_write(Gpa gpa, const void* data, unsigned length);

  /// vCPU side.
  const Fragment& wanted() const { return wanted_; }
  void reply(const void* data);  ///< answers wanted()
  bool has_writes() const { return write_next_ != write_count_; }
  const Fragment& next_write() const { return writes_[write_next_]; }
  void pop_write() {
    if (++write_next_ == write_count_) write_next_ = write_count_ = 0;
  }
  void reset() {
    read_size_ = read_position_ = write_next_ = write_count_ = 0;
    barred_ = false;
  }

 private:
  Fragment wanted_{};
  bool barred_ = false;
  u32 read_size_ = 0, read_position_ = 0, write_next_ = 0, write_count_ = 0;
  u8 read_data_[max_read_bytes];
  Fragment writes_[max_writes];
};

/// A memory operand that an instruction is run against: guest RAM itself, or a bounce buffer when the operand crosses
/// a page or lies in MMIO. See Cpu::open_operand.
struct Operand {
  u8* host = nullptr;  ///< run the instruction on this
  Gva gva = 0;
  unsigned size = 0;
  bool bounced = false;
  struct Part {
    u8* host;  ///< nullptr: MMIO
    Gpa gpa;
    unsigned size;
  } parts[2];  ///< where a bounced operand goes
  alignas(64) u8 buffer[64];
};

/// KVM_SET_GUEST_DEBUG, as the client gave it; see x86/debug.cpp.
struct GuestDebug {
  u32 control = 0;              ///< KVM_GUESTDBG_*
  u64 dr[4] = {}, dr7 = 0x400;  ///< with KVM_GUESTDBG_USE_HW_BP: in force instead of the guest's own
};

/// What makes an engine look closer at each instruction.
enum DebugWatch : u8 {
  watch_code = 1,   ///< an instruction breakpoint is enabled
  watch_data = 2,   ///< a data breakpoint is enabled: its page is kept out of the TLB
  watch_ports = 4,  ///< an I/O breakpoint is enabled
  watch_steps = 8,  ///< the client steps
};

/// The instructions that ask about a selector without loading it; see Cpu::probe_selector.
enum class SelectorProbe : u8 {
  lar,   ///< value: access rights, as LAR leaves them in a 32-bit register
  lsl,   ///< value: limit in bytes
  verr,  ///< readable from here
  verw,  ///< writable from here
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // of the cases that a caller's size rules out
#pragma GCC diagnostic ignored "-Warray-bounds"
/// Copies guest data to or from host memory. 1, 2, 4, 8 and 16 bytes are one host access each, so that naturally
/// aligned guest accesses stay atomic between vCPUs.
inline void copy_host(void* to, const void* from, unsigned size) {
  switch (size) {
    case 1: __builtin_memcpy(to, from, 1); break;
    case 2: __builtin_memcpy(to, from, 2); break;
    case 4: __builtin_memcpy(to, from, 4); break;
    case 8: __builtin_memcpy(to, from, 8); break;
    case 16: __builtin_memcpy(to, from, 16); break;
    default: __builtin_memcpy(to, from, size);
  }
}
#pragma GCC diagnostic pop

/// Bits 63:47 all alike: an address that 4-level paging can translate. Cpu::canonical() knows of 5 levels.
inline bool canonical(u64 address) { return u64(s64(address << 16) >> 16) == address; }
inline bool canonical57(u64 address) { return u64(s64(address << 7) >> 7) == address; }

/// How an engine that keeps translations of guest code learns that a page may be written: called when the TLB is about
/// to let stores to the page at `host` through. An engine that has just translated from a page flushes the TLB.
struct CodeWatch {
  void (*written)(void* engine, const u8* host) = nullptr;
  void* engine = nullptr;
};

/// An engine that executes instructions only to take them back (engine/lockstep) is told of every store to RAM before
/// it is made; the TLB lets none through unseen, and an access that leaves RAM ends in ExitKind::attention before
/// anything has happened.
struct Rehearsal {
  void (*store)(void* engine, u8* host, unsigned size, Gva gva) = nullptr;
  void* engine = nullptr;
  /// An accessed or dirty bit is set in the page table entry at `host`.
  void (*marked)(void* engine, const u8* host) = nullptr;

  explicit operator bool() const { return store; }
};

class Cpu {
 public:
  explicit Cpu(Machine& machine);
  Cpu(const Cpu&) = delete;
  Cpu& operator=(const Cpu&) = delete;

  /// Not 0: an engine must return with ExitKind::attention at the next instruction boundary. See os/attention.h.
  std::atomic<u32> attention{0};
  /// An event waits for the interrupt window to open: Machine::interrupt_window_changed() is to be called when it may
  /// have. The vCPU sets it before an engine runs.
  u32 window_wanted = 0;
  /// struct kvm_run's immediate_exit; an engine looks at it at least once per taken branch. Never null.
  const volatile u8* immediate_exit;

  /// KVM_X86_QUIRK_* that the client has turned off. Any thread may set it.
  std::atomic<u64> disabled_quirks{0};

  CpuState state;
  Cpuid cpuid;  ///< what KVM_SET_CPUID2 gave it; feature checks ask this
  Mmu mmu;
  Machine& machine;
  CodeWatch code_watch;
  Rehearsal rehearsal;  ///< flush the TLB before one begins
  Fault fault;
  Exit exit;
  MmioPort mmio;
  /// The client's answer to a port read: `pio_reply_bytes` bytes at `pio_reply`, consumed by the restarted instruction.
  const u8* pio_reply = nullptr;
  u32 pio_reply_bytes = 0;
  /// Where OUT and OUTS put their bytes before ExitKind::pio (4096 bytes; set by the vCPU, never null while running).
  u8* pio_data = nullptr;
  u64 instructions = 0;  ///< retired

  // --- debugging (x86/debug.cpp) ----------------------------------------------------------------------------------
  GuestDebug guest_debug;           ///< the client's; update_debug() after a change
  u8 debug_watch = 0;               ///< DebugWatch bits: what state.dr7 and guest_debug arm; kept by update_debug()
  u8 debug_hits = 0;                ///< data and I/O breakpoints that the instruction in flight has met, as in DR6
  bool debug_exit_pending = false;  ///< ExitKind::debug is due when the exit before it has been served ...
  u64 debug_exit_dr6 = 0;           ///< ... with these bits
  /// Recomputes debug_watch. Call after a change of DR0-3, DR7, CR4.DE or guest_debug.
  void update_debug();
  /// DR7 and DR0-3 in force.
  u64 effective_dr7() const;
  const u64* effective_dr() const;
  /// fault: an instruction breakpoint at RIP (RF has been looked at); exit: it is the client's.
  Result check_code_breakpoint();
  void note_data_access(Gva gva, unsigned size, Access access);
  void note_port_access(u16 port, unsigned size);
  /// What is due behind an instruction, RIP already there: DR6 bits of the guest's #DB, `step` for the client's step.
  void debug_trap(u64 dr6_bits, bool step);
  /// Whether the client takes every #DB, or the #BP of INT3, in the guest's place.
  bool client_takes_debug() const;
  bool client_takes_breakpoints() const;
  /// Fills `exit` for ExitKind::debug.
  Result debug_exit(u8 vector, u64 dr6_bits);

  // --- rights of data accesses; kept by update_mode() -----------------------------------------------------------
  Privilege data_privilege = Privilege::supervisor_ac;    ///< explicit accesses at the current CPL and AC
  Privilege system_privilege = Privilege::supervisor_ac;  ///< implicit supervisor accesses
  /// Instruction fetches, which AC does not change.
  Privilege fetch_privilege() const { return state.cpl == 3 ? Privilege::user : system_privilege; }
  /// An address that the paging mode can translate.
  bool canonical(u64 address) const {
    return x86::canonical(address) || (state.cr4 & cr4::la57 && x86::canonical57(address));
  }
  /// A base or MSR that holds an address: what the CPU's widest paging mode could translate.
  bool canonical_base(u64 address) const {
    return x86::canonical(address) || (cpuid.has(Feature::la57) && x86::canonical57(address));
  }
  /// The address space or PKRU has changed: what of the TLB is in force follows. `flush`: as MOV CR3 does.
  void enter_address_space(bool flush);
  /// Recomputes code_bits, cpl-derived rights and whatever else follows from CR0, CR4, EFER, CS, SS and RFLAGS.AC/VM.
  /// Call after any change of those.
  void update_mode();

  // --- memory (x86/access.cpp) ----------------------------------------------------------------------------------
  /// Linear addresses; segmentation is applied before (linear()). Little-endian, any alignment, crossing pages, MMIO.
  /// A store has either happened whole or not at all when it faults.
  Result read(Gva gva, void* data, unsigned size) { return read_as(gva, data, size, data_privilege); }
  Result write(Gva gva, const void* data, unsigned size) { return write_as(gva, data, size, data_privilege); }
  Result read_as(Gva gva, void* data, unsigned size, Privilege privilege) {
    if (const u8* host = mmu.lookup(gva, size, Access::read, privilege)) {
      copy_host(data, host, size);
      return Result::ok;
    }
    return read_slow(gva, data, size, privilege);
  }
  Result write_as(Gva gva, const void* data, unsigned size, Privilege privilege) {
    if (u8* host = mmu.lookup(gva, size, Access::write, privilege)) {
      copy_host(host, data, size);
      return Result::ok;
    }
    return write_slow(gva, data, size, privilege);
  }
  template <class T>
  Result read(Gva gva, T& value) {
    return read(gva, &value, sizeof value);
  }
  template <class T>
  Result write(Gva gva, const T& value) {
    return write(gva, &value, sizeof value);
  }

  /// Opens [gva, gva + size), size <= 64, for an instruction that runs on host memory. access says what it does;
  /// read_write checks for write and preloads a bounce buffer. After the instruction, close_operand() commits a
  /// bounce buffer that was written (it cannot fault: open checked every page).
  enum class Use : u8 { read, write, read_write };
  Result open_operand(Gva gva, unsigned size, Use use, Operand& operand) {
    operand.gva = gva, operand.size = size;
    operand.bounced = false;
    operand.host = mmu.lookup(gva, size, use == Use::read ? Access::read : Access::write, data_privilege);
    return operand.host ? Result::ok : open_operand_slow(use, operand);
  }
  void close_operand(Operand& operand, Use use) {
    if (operand.bounced && use != Use::read) commit_operand(operand);
  }

  /// Linear address of offset in a segment: adds the base, checks limit, type and presence outside 64-bit mode and
  /// canonical form inside. fault: #GP(0), or #SS(0) for the stack segment.
  Result linear(SegmentName segment, u64 offset, unsigned size, Access access, Gva& out) {
    if (state.code_bits == 64) {
      if (segment >= fs) offset += state.segment[segment].base;
      out = offset;
      if (canonical(offset)) return Result::ok;  // an operand that grows out of the hole is caught by its second page
      return raise(segment == ss ? exception::ss : exception::gp, 0);
    }
    return linear_legacy(segment, offset, size, access, out);
  }

  // --- faults (x86/exceptions.cpp) --------------------------------------------------------------------------------
  Result raise(u8 vector);             ///< fault without an error code
  Result raise(u8 vector, u32 error);  ///< fault with an error code
  Result raise_page_fault(Gva gva, u32 error);
  Result gp() { return raise(exception::gp, 0); }
  Result ud() { return raise(exception::ud); }
  /// ExitKind::internal_error; reason is a static string.
  Result give_up(const char* reason) {
    exit.kind = ExitKind::internal_error;
    exit.reason = reason;
    return Result::exit;
  }

  /// Delivers Cpu::fault (raised by the instruction at RIP, or a trap behind it) through the IDT or IVT; handles the
  /// double fault. exit: shutdown, or the delivery itself needs the client.
  Result deliver_fault();
  /// Delivers an external interrupt or NMI now; the caller has checked that it may.
  Result deliver_interrupt(u8 vector);
  Result deliver_nmi();
  /// INT n / INT3 / INTO, RIP behind the instruction given.
  enum class SoftwareInterrupt : u8 { int_n, int3, into };
  Result software_interrupt(u8 vector, u64 next_rip, SoftwareInterrupt form = SoftwareInterrupt::int_n);
  Result debug_interrupt(u64 next_rip);  ///< INT1: a #DB that no gate's DPL forbids and that leaves DR6 alone
  Result iret(unsigned operand_bytes, u64 next_rip);  ///< next_rip: what a nested task goes on with when called again

  // --- control transfer and segments (x86/segmentation.cpp) -------------------------------------------------------
  Result load_segment(SegmentName segment, u16 selector);  ///< MOV Sreg, POP Sreg, LDS ...
  Result far_jump(u16 selector, u64 offset, unsigned operand_bytes, u64 next_rip);
  Result far_call(u16 selector, u64 offset, unsigned operand_bytes, u64 next_rip);
  Result far_return(unsigned operand_bytes, u16 pop_bytes);
  Result load_ldtr(u16 selector);
  Result load_tr(u16 selector);
  Result syscall(u64 next_rip);
  Result sysret(unsigned operand_bytes);
  Result sysenter(u64 next_rip);
  Result sysexit(unsigned operand_bytes);
  /// LAR, LSL, VERR, VERW: whether the selector passes; sets nothing but value (LAR and LSL).
  Result probe_selector(u16 selector, SelectorProbe which, bool& ok, u32& value);

  // --- control, debug and model-specific registers (x86/control_registers.cpp, x86/msr.cpp) ----------------------
  Result write_cr(unsigned index, u64 value);
  Result read_cr(unsigned index, u64& value);
  Result write_dr(unsigned index, u64 value);
  Result read_dr(unsigned index, u64& value);
  Result write_xcr(u32 index, u64 value);
  Result read_msr(u32 index, u64& value);  ///< RDMSR after the CPL check
  Result write_msr(u32 index, u64 value);  ///< WRMSR after the CPL check
  u64 tsc() const;                         ///< the guest's

  /// RFLAGS as POPF/IRET-like instructions may change them: bits in mask come from value. Tells the machine when a
  /// held-back interrupt may now be taken.
  void write_rflags(u64 value, u64 mask);

  // --- FPU state (x86/xsave.cpp) ----------------------------------------------------------------------------------
  /// XSAVE-format images in guest memory, rights and alignment checked by the caller.
  Result fxsave(Gva gva, bool rex_w);
  Result fxrstor(Gva gva, bool rex_w);
  enum class Xsave : u8 { xsave, xsaveopt, xsavec, xsaves };
  Result xsave(Gva gva, u64 mask, Xsave form, bool rex_w);
  Result xrstor(Gva gva, u64 mask, bool supervisor, bool rex_w);

  // --- reset and requests -----------------------------------------------------------------------------------------
  void reset();                   ///< power-on state
  void init();                    ///< INIT: what survives it survives
  void start_up(u8 sipi_vector);  ///< SIPI: real mode at vector << 12

 private:
  Result read_slow(Gva gva, void* data, unsigned size, Privilege privilege);
  Result write_slow(Gva gva, const void* data, unsigned size, Privilege privilege);
  Result iret_itself(unsigned operand_bytes, u64 next_rip);
  Result linear_legacy(SegmentName segment, u64 offset, unsigned size, Access access, Gva& out);
  Result open_operand_slow(Use use, Operand& operand);
  void commit_operand(Operand& operand);
};

}  // namespace anykvm::x86
