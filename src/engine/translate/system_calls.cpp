// SYSCALL and SYSRET while the guest's registers stay in the host's: what the quick step did at the last one, as long
// as nothing has happened that it depends on (MSRs, control registers, CPUID, a client's debugging): no KVM_RUN has
// begun and no other instruction has been executed that ends a block and is not quick.
//
// This file is compiled for general registers only.
#include "engine/translate/translator.h"

namespace anykvm::engine::translate {

using x86::rcx, x86::cs, x86::ss;
namespace flag = x86::flag;

namespace {
constexpr u64 returned_flags = 0x3c7fd7 & ~flag::rf;  ///< SYSRET takes them from R11
}  // namespace

bool system_call_function(Context* context, SavedRegisters* registers, u32 request) {
  return static_cast<Translator*>(context->translator)->system_call(*registers, request);
}

void Translator::learn_system_call(u32 request) {
  const x86::CpuState& s = cpu_->state;
  const bool is_return = StepRequest::mnemonic(request) == ZYDIS_MNEMONIC_SYSRET;
  // Where user code has vector registers, next_mode() has to be asked; flags that would be looked at must be cleared.
  if (supervision_ || mode_.vectors || user_vectors_ || tries_without_) return;
  if (!is_return && ~s.msr.sfmask & (flag::tf | flag::ac)) return;
  system_calls_[is_return] = {.known = true,
                              .privilege = mode_.privilege,
                              .code = s.segment[cs],
                              .stack = s.segment[ss],
                              .time_is_refused = context_->time_is_refused};
}

bool Translator::system_call(SavedRegisters& registers, u32 request) {
  const bool is_return = StepRequest::mnemonic(request) == ZYDIS_MNEMONIC_SYSRET;
  const SystemCall& known = system_calls_[is_return];
  if (!known.known || context_->attention->load(std::memory_order_relaxed) || !context_->x87_missing) return false;
  if (is_return && direct_) {
    direct_->entered_user();
    if (!direct_->does_not_care(*cpu_)) return false;
  }
  x86::CpuState& s = cpu_->state;
  const u64 rip = is_return ? registers.rcx : s.msr.lstar;
  const Mode mode{known.privilege, no_vectors};
  const Jump& jump = context_->jumps[mode.number()][jump_slot(rip)];
  if (jump.minus_rip + rip != 0) return false;
  if (is_return) {
    const u64 opens_window = registers.r11 & ~s.other_flags & flag::if_;
    if (registers.r11 & (flag::tf | flag::ac) || (opens_window && *context_->window_wanted)) return false;
    s.set_rflags((s.other_flags & ~returned_flags) | (registers.r11 & returned_flags));
  } else {
    s.arithmetic = registers.flags;
    const u64 flags = s.rflags() & ~flag::rf;
    registers.rcx = context_->page_base + StepRequest::next(request);
    registers.r11 = flags;
    s.set_rflags(flags & ~s.msr.sfmask);
  }
  registers.flags = s.arithmetic;
  s.segment[cs] = known.code;
  s.segment[ss] = known.stack;
  s.cpl = known.stack.dpl;
  cpu_->data_privilege = known.privilege;
  mode_ = mode;
  context_->time_is_refused = known.time_is_refused;
  context_->page_base = jump.page_base;
  context_->enter_at = jump.code;
  return true;
}

}  // namespace anykvm::engine::translate
