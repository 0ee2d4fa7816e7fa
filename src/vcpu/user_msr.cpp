// The guest's RDMSR and WRMSR where the client has a say: what its filter denies is as if it were not there, and what
// fails may be its to answer. Its answer is kept until the instruction has started again and asks for it.
// Reference: api.rst 7.21 KVM_CAP_X86_USER_SPACE_MSR, 4.97 KVM_X86_SET_MSR_FILTER.
#include <algorithm>

#include "vcpu/vcpu.h"
#include "vm/msr_filter.h"
#include "vm/vm.h"
#include "x86/msr.h"

namespace anykvm::vcpu {

using x86::ExitKind;

namespace {

bool is_allowed(vm::Vm& vm, u32 index, u32 access) {
  const vm::MsrFilter* filter = vm.msr_filter();
  return !filter || filter->allows(index, access);
}

}  // namespace

/// The access has failed for this reason (KVM_MSR_EXIT_REASON_*): #GP, or the client is asked.
Vcpu::MsrResult Vcpu::fail_msr(ExitKind kind, u32 index, u64 value, u32 reason) {
  if (!(vm_->user_space_msrs() & reason)) return MsrResult::gp;
  cpu_.exit.kind = kind;
  cpu_.exit.msr_index = index;
  cpu_.exit.msr_value = value;
  msr_reason_ = reason;
  return MsrResult::exit;
}

Vcpu::MsrResult Vcpu::read_filtered_msr(u32 index, u64& value) {
  if (msr_answered_) {
    msr_answered_ = false;
    value = run_->msr.data;
    return run_->msr.error ? MsrResult::gp : MsrResult::ok;
  }
  if (!is_allowed(*vm_, index, KVM_MSR_FILTER_READ))
    return fail_msr(ExitKind::msr_read, index, 0, KVM_MSR_EXIT_REASON_FILTER);
  MsrResult result = read_own_msr(index, value);
  if (result == MsrResult::not_mine)
    result = x86::get_msr(cpu_, index, value, x86::Initiator::guest) ? MsrResult::ok : MsrResult::not_mine;
  if (result == MsrResult::ok || result == MsrResult::exit) return result;
  const bool unknown = result == MsrResult::not_mine && !x86::is_known_msr(cpu_, index);
  return fail_msr(ExitKind::msr_read, index, 0, unknown ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}

Vcpu::MsrResult Vcpu::write_filtered_msr(u32 index, u64 value) {
  if (msr_answered_) {
    msr_answered_ = false;
    return run_->msr.error ? MsrResult::gp : MsrResult::ok;
  }
  if (!is_allowed(*vm_, index, KVM_MSR_FILTER_WRITE))
    return fail_msr(ExitKind::msr_write, index, value, KVM_MSR_EXIT_REASON_FILTER);
  MsrResult result = write_own_msr(index, value);
  if (result == MsrResult::not_mine)
    result = x86::set_msr(cpu_, index, value, x86::Initiator::guest) ? MsrResult::ok : MsrResult::not_mine;
  if (result == MsrResult::ok || result == MsrResult::exit) return result;
  const bool unknown = result == MsrResult::not_mine && !x86::is_known_msr(cpu_, index);
  return fail_msr(ExitKind::msr_write, index, value, unknown ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}

int Vcpu::exit_msr() {
  run_->msr.error = 0;
  std::ranges::fill(run_->msr.pad, 0);
  run_->msr.reason = msr_reason_;
  run_->msr.index = cpu_.exit.msr_index;
  run_->msr.data = cpu_.exit.msr_value;
  pending_ = Pending::msr;
  pending_rip_ = cpu_.state.rip;
  return exit_to_client(cpu_.exit.kind == ExitKind::msr_read ? KVM_EXIT_X86_RDMSR : KVM_EXIT_X86_WRMSR);
}

}  // namespace anykvm::vcpu
