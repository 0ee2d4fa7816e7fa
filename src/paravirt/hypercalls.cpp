// VMCALL and VMMCALL.
// Reference: Documentation/virt/kvm/x86/hypercalls.rst.
#include <asm/kvm_para.h>
#include <linux/kvm_para.h>

#include <ctime>
#include <initializer_list>

#include "irqchip/apic_bus.h"
#include "os/tsc.h"
#include "paravirt/paravirt.h"

namespace anykvm::paravirt {
namespace {

constexpr u64 error(int number) { return u64(-s64(number)); }

/// KVM_HC_MAP_GPA_RANGE: whole pages, at least one, not beyond the end of the address space.
bool is_gpa_range(Gpa gpa, u64 pages) { return !(gpa & ~page_mask) && pages && (gpa >> 12) + pages > (gpa >> 12); }

constexpr u64 icr_logical = 1 << 11, icr_assert = 1 << 14, icr_level_triggered = 1 << 15, icr_shorthand = 3 << 18;

}  // namespace

x86::Result Paravirt::hypercall(u64 exits_enabled) {
  u64* const gpr = cpu_.state.gpr;
  const bool long_mode = cpu_.state.code_bits == 64;
  const u64 mask = long_mode ? ~0ull : 0xffffffffull;
  const u64 number = gpr[x86::rax] & mask;
  const u64 arguments[4] = {gpr[x86::rbx] & mask, gpr[x86::rcx] & mask, gpr[x86::rdx] & mask, gpr[x86::rsi] & mask};

  u64 result;
  if (cpu_.state.cpl != 0) {
    result = error(KVM_EPERM);
  } else if (number == KVM_HC_MAP_GPA_RANGE && exits_enabled >> KVM_HC_MAP_GPA_RANGE & 1) {
    if (is_gpa_range(arguments[0], arguments[1])) {
      cpu_.exit = {.kind = x86::ExitKind::hypercall};
      return x86::Result::exit;
    }
    result = error(KVM_EINVAL);
  } else {
    result = run_hypercall(number, arguments, long_mode);
  }
  gpr[x86::rax] = long_mode ? result : u32(result);
  return x86::Result::ok;
}

u64 Paravirt::run_hypercall(u64 number, const u64 (&arguments)[4], bool long_mode) {
  switch (number) {
    case KVM_HC_VAPIC_POLL_IRQ: return 0;
    case KVM_HC_KICK_CPU:
      if (!has(KVM_FEATURE_PV_UNHALT)) break;
      if (bus_) bus_->send({.destination = u32(arguments[1]), .mode = irqchip::DeliveryMode::remote_read});
      return 0;
    case KVM_HC_CLOCK_PAIRING: return pair_clocks(arguments[0], arguments[1]);
    case KVM_HC_SEND_IPI:
      if (!has(KVM_FEATURE_PV_SEND_IPI)) break;
      return send_ipis(arguments, long_mode ? 64 : 32);
    case KVM_HC_SCHED_YIELD:
      if (!has(KVM_FEATURE_PV_SCHED_YIELD)) break;
      return 0;  // a hint; see features.h
  }
  return error(KVM_ENOSYS);
}

u64 Paravirt::send_ipis(const u64 (&arguments)[4], unsigned bitmap_bits) {
  if (!bus_) return error(KVM_EOPNOTSUPP);
  const u64 icr = arguments[3];
  if (icr & (icr_logical | icr_shorthand)) return error(KVM_EINVAL);
  u32 first = u32(arguments[2]);
  u64 taken = 0;
  for (const u64 bitmap : {arguments[0], arguments[1]}) {
    for (u64 left = bitmap; left; left &= left - 1) {
      const int count = bus_->send({.destination = first + u32(__builtin_ctzll(left)),
                                    .vector = u8(icr),
                                    .mode = irqchip::DeliveryMode(icr >> 8 & 7),
                                    .level_triggered = bool(icr & icr_level_triggered),
                                    .assert = bool(icr & icr_assert)});
      if (count > 0) taken += unsigned(count);
    }
    first += bitmap_bits;
  }
  return taken;
}

u64 Paravirt::pair_clocks(Gpa gpa, u64 type) {
  if (type != KVM_CLOCK_PAIRING_WALLCLOCK || clock_.drifts()) return error(KVM_EOPNOTSUPP);
  const os::ClockPair pair = os::read_tsc_and_clock(CLOCK_REALTIME);
  kvm_clock_pairing out{};
  out.sec = s64(pair.ns / 1'000'000'000);
  out.nsec = s64(pair.ns % 1'000'000'000);
  out.tsc = x86::guest_tsc(cpu_.state, pair.tsc);
  return write_guest(gpa, &out, sizeof out) ? 0 : error(KVM_EFAULT);
}

}  // namespace anykvm::paravirt
