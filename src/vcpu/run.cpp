// KVM_RUN: the loop that lets the guest run until its client is needed. See docs/vcpu.md.
// Reference: api.rst 4.10 KVM_RUN, chapter 5.
//
// Everything here is on the KVM_RUN path: no allocation, no lock but the vCPU's, no system call unless the guest halts.
#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/engine.h"
#include "os/cancellation.h"
#include "os/clock.h"
#include "vcpu/internal_error.h"
#include "vcpu/signal_mask.h"
#include "vcpu/vcpu.h"
#include "vm/vm.h"

namespace anykvm::vcpu {

using vm::VcpuStat;
using x86::ExitKind;

namespace {
constexpr u64 sync_fields = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
/// hardware_entry_failure_reason: VMX's "VM-entry failure due to invalid guest state".
constexpr u64 invalid_guest_state = 0x80000021;
}  // namespace

int Vcpu::run(void (*leaving)(void*), void* arg) {
  std::unique_lock lock(mutex_);
  interrupted_.store(false, std::memory_order_relaxed);
  runner_.store(pthread_self(), std::memory_order_relaxed);
  os::CancellationHold cancellation(on_cancel, this);
  os::SignalHold hold(on_signal, this, signal_mask_ ? &signal_mask_->blocked() : nullptr);
  if (trace_) [[unlikely]]
    trace_entry();
  const int result = run_locked();
  if (trace_) [[unlikely]]
    trace_return();
  runner_.store({}, std::memory_order_relaxed);
  lock.unlock();
  struct Leaving {
    void (*call)(void*);
    void* arg;
    os::CancellationHold& cancellation;
  } last{leaving, arg, cancellation};
  // Nothing of this library's is held any more when the client's handlers run, or the thread ends.
  hold.release(
      [](void* leave) {
        auto& last = *static_cast<Leaving*>(leave);
        if (last.call) last.call(last.arg);
        last.cancellation.release();
      },
      &last);
  cancellation.release();
  return result;
}

int Vcpu::run_locked() {
  const bool immediate_exit = __atomic_load_n(&run_->immediate_exit, __ATOMIC_RELAXED);
  run_->flags = 0;
  if (mp_state_ == KVM_MP_STATE_UNINITIALIZED) {
    if (immediate_exit) return -EINTR;
    bool signal = false;
    for (;;) {
      const u32 ticket = wake_word_.load(std::memory_order_seq_cst);
      if (init_sipi_.load(std::memory_order_acquire) != 0 || (signal = signal_arrived())) break;
      wait(ticket);
    }
    leave_guest_mode();
    accept_init_sipi();
    if (signal) {
      run_->exit_reason = KVM_EXIT_INTR;
      return -EINTR;
    }
    return -EAGAIN;
  }
  if (run_->kvm_valid_regs & ~sync_fields || run_->kvm_dirty_regs & ~sync_fields) return -EINVAL;
  if (run_->kvm_dirty_regs)
    if (const int error = sync_regs_in()) return error;
  if (!apic_) {
    if (run_->cr8 > 15) return -EINVAL;
    cr8_ = run_->cr8;
  }

  has_run_.store(true, std::memory_order_relaxed);
  told_ = true;
  update_cpuid_quirk();
  enter_guest_mode();
  int result = complete_exit();
  if (result == go_on) {
    if (immediate_exit)
      result = -EINTR;
    else
      result = run_loop();
  }
  // An EOI that the guest has been offered to make in its memory is settled while that may be touched: the client may
  // read the APIC's state or copy the memory next.
  if (apic_ && apic_->has_offered_pv_eoi() && !guarded([this] { apic_->sync_pv_eoi(); })) result = -EFAULT;
  leave_guest_mode();

  if (run_->kvm_valid_regs) sync_regs_out();
  save_run_state();
  return result;
}

int Vcpu::run_loop() {
  run_->exit_reason = KVM_EXIT_UNKNOWN;
  if (check_state_ && !guest_state_is_valid()) {
    run_->fail_entry.hardware_entry_failure_reason = invalid_guest_state;
    run_->fail_entry.cpu = id_;
    return exit_to_client(KVM_EXIT_FAIL_ENTRY);
  }
  check_state_ = false;
  for (;;) {
    const int result = mp_state_ == KVM_MP_STATE_RUNNABLE ? enter_guest() : block();
    if (result != go_on) return result;
    if (wants_interrupt_window() && ready_for_client_interrupt()) return exit_irq_window();
    if (signal_arrived()) {
      stats_.add(VcpuStat::signal_exits);
      run_->exit_reason = KVM_EXIT_INTR;
      return -EINTR;
    }
  }
}

int Vcpu::exit_irq_window() {
  stats_.add(VcpuStat::request_irq_exits);
  return exit_to_client(KVM_EXIT_IRQ_WINDOW_OPEN);
}

/// Serves what is waiting, injects what may be injected, and runs the guest once.
int Vcpu::enter_guest() {
  if (cpu_.attention.load(std::memory_order_relaxed) != 0) cpu_.attention.exchange(0, std::memory_order_seq_cst);
  serve_tlb_flush();
  if (init_sipi_.load(std::memory_order_acquire) != 0) {
    accept_init_sipi();
    if (mp_state_ != KVM_MP_STATE_RUNNABLE) return go_on;
  }
  if (ioapic_eoi_ >= 0) {
    run_->eoi.vector = static_cast<u8>(std::exchange(ioapic_eoi_, -1));
    return exit_to_client(KVM_EXIT_IOAPIC_EOI);
  }
  if (cpu_.state.event.triple_fault_pending) {
    cpu_.state.event.triple_fault_pending = false;
    return exit_to_client(KVM_EXIT_SHUTDOWN);
  }
  if (interrupted_.load(std::memory_order_relaxed)) return go_on;
  if (tsc_offset_seen_ != cpu_.state.tsc_offset) tsc_moved();

  cpu_.exit.kind = ExitKind::none;
  const u64 began = trace_ ? os::monotonic_ns() : 0;
  if (!guarded([this] { enter_guarded(); })) return run_refused();
  count_engine();
  if (trace_) [[unlikely]]
    trace_guest(began);
  return handle_exit();
}

void Vcpu::count_engine() {
  stats_.add(VcpuStat::exits);
  stats_.set(VcpuStat::insn_emulation, cpu_.instructions);
  stats_.set(VcpuStat::page_walks, cpu_.mmu.walks);
  stats_.set(VcpuStat::translations, engine_->translations());
  stats_.set(VcpuStat::native_stretches, engine_->native_stretches());
}

/// The host did not let the guest's memory be accessed.
int Vcpu::run_refused() {
  engine_->abandon();
  cpu_.mmio.reset();
  // struct kvm_run's memory_fault, which the build's header may not have: flags, gpa, size.
  const u64 memory_fault[] = {0, refused_gpa_ & page_mask, page_size};
  std::memcpy(run_->padding, memory_fault, sizeof memory_fault);
  run_->exit_reason = KVM_EXIT_MEMORY_FAULT;
  return -EFAULT;
}

void Vcpu::enter_guarded() {
  paravirt_.on_enter();
  if (!inject_events()) return;  // the delivery itself needs the client, or ended in a triple fault
  if (vapic_) [[unlikely]]
    sync_vapic(true);
  if (apic_) told_ |= apic_->was_told();
  if (cpu_.window_wanted && cpu_.state.event.shadow) {
    // The shadow lasts one instruction, and what it holds back comes right after.
    engine_->step(cpu_);
  } else {
    if (!std::exchange(told_, false)) engine_->keep_code();
    engine_->run(cpu_);
  }
  if (vapic_) [[unlikely]]
    sync_vapic(false);
}

/// A guest that its client has patched keeps the TPR in a word of memory instead.
void Vcpu::sync_vapic(bool entering) {
  const x86::HostPage where = page(vapic_, entering);
  if (!where.host || (entering && !where.writable)) return;
  u8* const host = where.host + (vapic_ & ~page_mask);
  u32 word;
  if (entering) {
    word = apic_->vapic_word();
    std::memcpy(host, &word, sizeof word);
  } else {
    std::memcpy(&word, host, sizeof word);
    if (word != apic_->vapic_word()) apic_->set_tpr_register(static_cast<u8>(word));
  }
}

int Vcpu::exit_to_client(u32 reason) {
  run_->exit_reason = reason;
  return 0;
}

int Vcpu::handle_exit() {
  // The exit's instruction may have stored to MMIO before; the client gets that first, in program order.
  switch (cpu_.exit.kind) {
    case ExitKind::none:
    case ExitKind::attention:
      if (cpu_.mmio.has_writes()) return next_mmio_write();
      if (std::exchange(tpr_lowered_, false)) return exit_to_client(KVM_EXIT_SET_TPR);
      return go_on;
    case ExitKind::halt: return exit_halt();
    case ExitKind::pio: return exit_pio();
    case ExitKind::mmio_write: return next_mmio_write();
    case ExitKind::mmio_read: {
      const auto& wanted = cpu_.mmio.wanted();
      run_->mmio.phys_addr = wanted.gpa;
      run_->mmio.len = wanted.length;
      run_->mmio.is_write = 0;
      pending_ = Pending::mmio_read;
      stats_.add(VcpuStat::mmio_exits);
      pending_rip_ = cpu_.state.rip;
      return exit_to_client(KVM_EXIT_MMIO);
    }
    case ExitKind::hypercall: return exit_hypercall();
    case ExitKind::shutdown: return exit_to_client(KVM_EXIT_SHUTDOWN);
    case ExitKind::memory_error: return -EFAULT;
    case ExitKind::msr_read:
    case ExitKind::msr_write: return exit_msr();
    case ExitKind::debug: return exit_debug();
    case ExitKind::engine_error:
    case ExitKind::internal_error: return exit_internal_error();
  }
  return exit_internal_error();
}

int Vcpu::next_mmio_write() {
  if (!cpu_.mmio.has_writes()) return go_on;
  const auto& write = cpu_.mmio.next_write();
  run_->mmio.phys_addr = write.gpa;
  run_->mmio.len = write.length;
  run_->mmio.is_write = 1;
  std::memcpy(run_->mmio.data, write.data, write.length);
  pending_ = Pending::mmio_write;
  stats_.add(VcpuStat::mmio_exits);
  return exit_to_client(KVM_EXIT_MMIO);
}

int Vcpu::exit_pio() {
  const x86::Exit& exit = cpu_.exit;
  run_->io.direction = exit.is_in ? KVM_EXIT_IO_IN : KVM_EXIT_IO_OUT;
  run_->io.size = exit.size;
  run_->io.port = exit.port;
  run_->io.count = exit.count;
  run_->io.data_offset = page_size;
  pending_ = exit.is_in ? Pending::pio_in : Pending::none;
  const bool is_plain_out = exit.next_rip != exit.rip;
  if (is_plain_out && cpu_.state.rip == exit.next_rip && !skips_out_at_once()) {
    // OUT stays the current instruction until the client is back.
    pending_ = Pending::pio_out;
    next_rip_ = std::exchange(cpu_.state.rip, exit.rip);
  }
  pending_rip_ = cpu_.state.rip;
  return exit_to_client(KVM_EXIT_IO);
}

/// KVM_X86_QUIRK_OUT_7E_INC_RIP: old clients take the state at a certain firmware's OUT to port 0x7e as final.
bool Vcpu::skips_out_at_once() const {
  return cpu_.exit.port == 0x7e &&
         !(cpu_.disabled_quirks.load(std::memory_order_relaxed) & KVM_X86_QUIRK_OUT_7E_INC_RIP);
}

int Vcpu::exit_halt() {
  stats_.add(VcpuStat::halt_exits);
  if (!apic_ && !vm_->halts_in_guest()) return exit_to_client(KVM_EXIT_HLT);
  mp_state_ = KVM_MP_STATE_HALTED;
  return go_on;
}

int Vcpu::exit_debug() {
  const x86::Exit& exit = cpu_.exit;
  if (exit.halts) {
    // As in KVM, the halt goes first where it is the client's.
    if (const int result = exit_halt(); result != go_on) return result;
  }
  run_->debug.arch.exception = exit.debug_vector;
  run_->debug.arch.pc = exit.debug_pc;
  run_->debug.arch.dr6 = exit.dr6;
  run_->debug.arch.dr7 = exit.dr7;
  return exit_to_client(KVM_EXIT_DEBUG);
}

int Vcpu::exit_hypercall() {
  const u64* gpr = cpu_.state.gpr;
  std::memset(&run_->hypercall, 0, sizeof run_->hypercall);
  run_->hypercall.nr = gpr[x86::rax];
  run_->hypercall.args[0] = gpr[x86::rbx];
  run_->hypercall.args[1] = gpr[x86::rcx];
  run_->hypercall.args[2] = gpr[x86::rdx];
  run_->hypercall.args[3] = gpr[x86::rsi];
  run_->hypercall.longmode = cpu_.state.code_bits == 64;
  pending_ = Pending::hypercall;
  pending_rip_ = cpu_.state.rip;
  return exit_to_client(KVM_EXIT_HYPERCALL);
}

/// An instruction that the engine cannot execute, or KVM's emulator could not. As in KVM, the guest gets #UD unless the
/// client has asked for all of them; when it is its kernel's, the client is told first.
int Vcpu::exit_internal_error() {
  const x86::Exit& exit = cpu_.exit;
  stats_.add(VcpuStat::insn_emulation_fail);
  if (!vm_->exits_on_emulation_failure()) {
    x86::EventState& event = cpu_.state.event;
    event.exception_pending = true;
    event.exception_vector = x86::exception::ud;
    event.exception_has_error = event.exception_has_payload = false;
    if (cpu_.state.cpl != 0) return go_on;
  }
  tell_internal_error(cpu_, id_);
  auto& failure = run_->emulation_failure;
  std::memset(&failure, 0, sizeof failure);
  failure.suberror = KVM_INTERNAL_ERROR_EMULATION;
  if (exit.byte_count != 0) {
    failure.ndata = 3;
    failure.flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
    failure.insn_size = exit.byte_count;
    std::memset(failure.insn_bytes, 0x90, sizeof failure.insn_bytes);
    std::memcpy(failure.insn_bytes, exit.bytes, exit.byte_count);
  }
  return exit_to_client(KVM_EXIT_INTERNAL_ERROR);
}

/// Gives the guest what the client answered to the last exit. KVM does this before it looks at immediate_exit and
/// signals, so that the registers are those of an instruction boundary when KVM_RUN returns EINTR.
int Vcpu::complete_exit() {
  const Pending pending = std::exchange(pending_, Pending::none);
  const bool moved = cpu_.state.rip != pending_rip_;  // the client has set RIP: the instruction is not to be finished
  switch (pending) {
    case Pending::none: return go_on;
    case Pending::pio_out:
      if (!moved) cpu_.state.rip = next_rip_;
      return go_on;
    case Pending::pio_in:
      if (moved) return go_on;
      cpu_.pio_reply = cpu_.pio_data;
      cpu_.pio_reply_bytes = cpu_.exit.size * cpu_.exit.count;  // kvm_run's may have been written since
      return finish_instruction();
    case Pending::mmio_read:
      if (moved) {
        cpu_.mmio.reset();
        return go_on;
      }
      cpu_.mmio.reply(run_->mmio.data);
      return needs_reinjection() ? go_on : finish_instruction();  // else it was an event's delivery that asked
    case Pending::mmio_write: cpu_.mmio.pop_write(); return next_mmio_write();
    case Pending::msr: {
      if (moved) return go_on;
      msr_answered_ = true;
      const int result = finish_instruction();
      msr_answered_ = false;
      return result;
    }
    case Pending::hypercall:
      cpu_.state.gpr[x86::rax] =
          cpu_.state.code_bits == 64 ? run_->hypercall.ret : static_cast<u32>(run_->hypercall.ret);
      return go_on;
  }
  return go_on;
}

int Vcpu::finish_instruction() {
  serve_tlb_flush();
  int result = go_on;
  // INS consumes the batch one element a step.
  for (u32 left = page_size; left != 0 && result == go_on; --left) {
    cpu_.exit.kind = ExitKind::none;
    const u32 reply_bytes = cpu_.pio_reply_bytes;
    if (!guarded([this] { engine_->step(cpu_); })) {
      result = run_refused();
      break;
    }
    result = handle_exit();
    if (cpu_.pio_reply_bytes == 0 || cpu_.pio_reply_bytes == reply_bytes) break;
  }
  // Nothing is left of the answer when the instruction did not want it after all.
  cpu_.pio_reply = nullptr;
  if (pending_ != Pending::pio_in) cpu_.pio_reply_bytes = 0;
  return result;
}

/// What of an entry the hardware would refuse. KVM_SET_SREGS has refused the rest.
bool Vcpu::guest_state_is_valid() const {
  const x86::CpuState& state = cpu_.state;
  if (!state.long_mode()) return true;
  if (state.other_flags & x86::flag::vm) return false;
  const x86::Segment& cs = state.segment[x86::cs];
  if (!cs.l) return state.rip >> 32 == 0;
  return !cs.db && cpu_.canonical(state.rip);
}

void Vcpu::save_run_state() {
  run_->if_flag = (cpu_.state.other_flags & x86::flag::if_) != 0;
  run_->cr8 = read_cr8();
  run_->apic_base = apic_base();
  run_->ready_for_interrupt_injection = vm_->chips() != nullptr || ready_for_client_interrupt();
}

int Vcpu::sync_regs_in() {
  const auto& regs = run_->s.regs;
  if (run_->kvm_dirty_regs & KVM_SYNC_X86_REGS) load_regs(regs.regs);
  if (run_->kvm_dirty_regs & KVM_SYNC_X86_SREGS) {
    kvm_sregs sregs = regs.sregs;
    if (set_sregs_locked(sregs) != 0) return -EINVAL;
  }
  if (run_->kvm_dirty_regs & KVM_SYNC_X86_EVENTS)
    if (load_events(regs.events) != 0) return -EINVAL;
  run_->kvm_dirty_regs = 0;
  return 0;
}

void Vcpu::sync_regs_out() {
  auto& regs = run_->s.regs;
  if (run_->kvm_valid_regs & KVM_SYNC_X86_REGS) store_regs(regs.regs);
  if (run_->kvm_valid_regs & KVM_SYNC_X86_SREGS) get_sregs_locked(regs.sregs);
  if (run_->kvm_valid_regs & KVM_SYNC_X86_EVENTS) store_events(regs.events);
}

}  // namespace anykvm::vcpu
