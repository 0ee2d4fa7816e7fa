// Debugging: breakpoints in DR0-3, single steps, and the client that debugs its guest with KVM_SET_GUEST_DEBUG.
// Reference: Intel SDM volume 3 chapter 18.2 (debug registers), 18.3 (debug exceptions); api.rst 4.87.
//
// An engine tests one byte, debug_watch, per instruction. Pages that a data breakpoint lies on are kept out of the TLB,
// so that accesses to them meet note_data_access() on the slow path and others cost nothing.
#include "x86/debug.h"
#include "x86/cpu.h"

namespace anykvm::x86 {

namespace {

enum class Kind : u8 { execute, write, port, read_write };

bool enabled(u64 dr7, unsigned n) { return dr7 >> (2 * n) & 3; }
Kind kind(u64 dr7, unsigned n) { return Kind(dr7 >> (16 + 4 * n) & 3); }
unsigned length(u64 dr7, unsigned n) {
  constexpr u8 lengths[4] = {1, 2, 8, 4};
  return lengths[dr7 >> (18 + 4 * n) & 3];
}

/// Whether [start, start + size) touches breakpoint n, which is aligned to its length whatever its low bits are.
bool overlaps(u64 breakpoint, unsigned breakpoint_length, u64 start, unsigned size) {
  breakpoint &= ~u64(breakpoint_length - 1);
  return start < breakpoint + breakpoint_length && breakpoint < start + size;
}

u64 linear_rip(const CpuState& s) { return s.code_bits == 64 ? s.rip : u32(s.segment[cs].base + s.rip); }

}  // namespace

bool Cpu::client_takes_debug() const {
  return guest_debug.control & KVM_GUESTDBG_ENABLE &&
         guest_debug.control & (KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP);
}
bool Cpu::client_takes_breakpoints() const {
  return guest_debug.control & KVM_GUESTDBG_ENABLE && guest_debug.control & KVM_GUESTDBG_USE_SW_BP;
}

namespace {
bool client_has_registers(const Cpu& cpu) {
  return cpu.guest_debug.control & KVM_GUESTDBG_ENABLE && cpu.guest_debug.control & KVM_GUESTDBG_USE_HW_BP;
}
}  // namespace

u64 Cpu::effective_dr7() const { return client_has_registers(*this) ? guest_debug.dr7 : state.dr7; }
const u64* Cpu::effective_dr() const { return client_has_registers(*this) ? guest_debug.dr : state.dr; }

void Cpu::update_debug() {
  const u8 before = debug_watch;
  const u64 dr7 = effective_dr7();
  debug_watch = 0;
  for (unsigned n = 0; n < 4; ++n) {
    if (!enabled(dr7, n)) continue;
    switch (kind(dr7, n)) {
      case Kind::execute: debug_watch |= watch_code; break;
      case Kind::port:
        if (state.cr4 & cr4::de) debug_watch |= watch_ports;
        break;
      default: debug_watch |= watch_data; break;
    }
  }
  if (guest_debug.control & KVM_GUESTDBG_ENABLE && guest_debug.control & KVM_GUESTDBG_SINGLESTEP)
    debug_watch |= watch_steps;
  if ((before | debug_watch) & watch_data) mmu.flush_all();
}

bool page_is_watched(const Cpu& cpu, Gva gva) {
  const u64 dr7 = cpu.effective_dr7();
  for (unsigned n = 0; n < 4; ++n) {
    if (enabled(dr7, n) && (u8(kind(dr7, n)) & 1) && ((cpu.effective_dr()[n] ^ gva) & page_mask) == 0) return true;
  }
  return false;
}

Result Cpu::check_code_breakpoint() {
  const u64 dr7 = effective_dr7(), at = linear_rip(state);
  u64 hits = 0;
  for (unsigned n = 0; n < 4; ++n) {
    if (enabled(dr7, n) && kind(dr7, n) == Kind::execute && effective_dr()[n] == at) hits |= 1u << n;
  }
  if (!hits) return Result::ok;
  if (client_takes_debug()) return debug_exit(exception::db, hits);
  const Result result = raise(exception::db);
  fault.payload = hits;
  return result;
}

void Cpu::note_data_access(Gva gva, unsigned size, Access access) {
  const u64 dr7 = effective_dr7();
  for (unsigned n = 0; n < 4; ++n) {
    if (enabled(dr7, n) &&
        (kind(dr7, n) == Kind::read_write || (kind(dr7, n) == Kind::write && access == Access::write)) &&
        overlaps(effective_dr()[n], length(dr7, n), gva, size)) {
      debug_hits |= u8(1u << n);
    }
  }
}

void Cpu::note_port_access(u16 at, unsigned size) {
  const u64 dr7 = effective_dr7();
  for (unsigned n = 0; n < 4; ++n) {
    if (enabled(dr7, n) && kind(dr7, n) == Kind::port && overlaps(effective_dr()[n], length(dr7, n), at, size))
      debug_hits |= u8(1u << n);
  }
}

Result Cpu::debug_exit(u8 vector, u64 dr6_bits) {
  exit.kind = ExitKind::debug;
  exit.debug_vector = vector;
  exit.debug_pc = linear_rip(state);
  exit.dr6 = dr6_fixed | dr6_bits;
  exit.dr7 = effective_dr7();
  return Result::exit;
}

void Cpu::debug_trap(u64 dr6_bits, bool step) {
  if (step) dr6_bits |= dr6_bs;
  if (!dr6_bits) return;
  if (client_takes_debug()) {
    const bool halts = exit.kind == ExitKind::halt;
    if ((exit.kind == ExitKind::none || halts) && !mmio.has_writes()) {
      (void)debug_exit(exception::db, dr6_bits);
      exit.halts = halts;
    } else {
      debug_exit_pending = true;
      debug_exit_dr6 = dr6_bits;
    }
    return;
  }
  fault = {.vector = exception::db, .trap = true, .payload = dr6_bits};
  if (exit.kind == ExitKind::none || exit.kind == ExitKind::halt) {  // the handler runs instead of the halt
    exit.kind = ExitKind::none;
    (void)deliver_fault();
    return;
  }
  // The exit is served first; then the event is delivered like one that a client has set.
  state.event.exception_pending = true;
  state.event.exception_vector = exception::db;
  state.event.exception_has_error = false;
  state.event.exception_has_payload = true;
  state.event.exception_payload = dr6_bits;
}

}  // namespace anykvm::x86
