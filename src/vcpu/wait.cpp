// Guest mode and the time outside it: the halt, the wake-up, and the flush that memory slot changes ask for.
//
// in_guest_mode_ says that this vCPU may hold host pointers into guest memory. A flush is a ticket:
// flush_tlb_and_wait() takes the next one, raises attention, and waits until the vCPU has served it or is out of guest
// mode; on its way in the vCPU sets in_guest_mode_ first and looks at the tickets second, so that one of the two sees
// the other.
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>

#include "os/attention.h"
#include "os/clock.h"
#include "vcpu/signal_mask.h"
#include "vcpu/vcpu.h"

namespace anykvm::vcpu {
namespace {

long futex(std::atomic<u32>& word, int operation, u32 value) {
  return syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

void Vcpu::enter_guest_mode() { in_guest_mode_.store(1, std::memory_order_seq_cst); }

void Vcpu::serve_tlb_flush() {
  const u64 wanted = flushes_wanted_.load(std::memory_order_seq_cst);
  if (wanted == flushes_done_.load(std::memory_order_relaxed)) [[likely]]
    return;
  cpu_.mmu.flush_all();
  stats_.add(vm::VcpuStat::tlb_flush);
  flushes_done_.store(wanted, std::memory_order_release);
}

void Vcpu::flush_tlb_and_wait() {
  const u64 ticket = flushes_wanted_.fetch_add(1, std::memory_order_seq_cst) + 1;
  os::raise_attention(cpu_.attention);
  for (unsigned tries = 0;
       in_guest_mode_.load(std::memory_order_seq_cst) != 0 && flushes_done_.load(std::memory_order_acquire) < ticket;
       ++tries) {
    // On the vCPU's own thread (a handler that this library could not hold): it flushes when the handler returns.
    if (pthread_equal(runner_.load(std::memory_order_relaxed), pthread_self())) return;
    if (tries < 200) {
      __builtin_ia32_pause();
    } else {
      const timespec short_time{0, 20'000};
      nanosleep(&short_time, nullptr);
    }
  }
}

void Vcpu::wake() {
  wake_word_.fetch_add(1, std::memory_order_seq_cst);
  os::raise_attention(cpu_.attention);
  if (sleeping_.load(std::memory_order_seq_cst)) {
    futex(wake_word_, FUTEX_WAKE, 1);
    if (const int fd = wake_fd_.load(std::memory_order_acquire); fd >= 0) {
      const u64 one = 1;
      [[maybe_unused]] const ssize_t written = write(fd, &one, sizeof one);
    }
  }
}

/// Sleeps until wake() (one since `ticket` was read counts) or a signal.
void Vcpu::wait(u32 ticket) {
  leave_guest_mode();
  sleeping_.store(true, std::memory_order_seq_cst);
  if (signal_mask_) {
    if (wake_word_.load(std::memory_order_seq_cst) == ticket) signal_mask_->wait();
  } else if (futex(wake_word_, FUTEX_WAIT, ticket) != 0 && errno == EINTR) {
    interrupted_.store(true, std::memory_order_relaxed);  // by a handler that was not installed through sigaction()
  }
  sleeping_.store(false, std::memory_order_relaxed);
  enter_guest_mode();
}

/// The vCPU does not run guest code: it is halted, or waits for a start-up IPI.
int Vcpu::block() {
  if (!guarded([this] { paravirt_.on_block(); })) return -EFAULT;
  for (;;) {
    const u32 ticket = wake_word_.load(std::memory_order_seq_cst);
    bool has_event = false;
    if (!guarded([&] { has_event = has_events(); })) return -EFAULT;
    if (has_event) break;
    if (signal_arrived() || (wants_interrupt_window() && ready_for_client_interrupt())) return go_on;
    stats_.set(vm::VcpuStat::blocking, 1);
    const u64 began = os::monotonic_ns();
    wait(ticket);
    stats_.add(vm::VcpuStat::halt_wait_ns, os::monotonic_ns() - began);
    stats_.set(vm::VcpuStat::blocking, 0);
    if (trace_) [[unlikely]]
      trace_halt(began);
  }
  stats_.add(vm::VcpuStat::halt_wakeup);
  accept_init_sipi();
  if (mp_state_ == KVM_MP_STATE_HALTED || mp_state_ == KVM_MP_STATE_AP_RESET_HOLD) {
    told_ |= unhalted_.exchange(false, std::memory_order_acquire);
    mp_state_ = KVM_MP_STATE_RUNNABLE;
  }
  return go_on;
}

void Vcpu::on_signal(void* vcpu) {
  Vcpu& self = *static_cast<Vcpu*>(vcpu);
  self.interrupted_.store(true, std::memory_order_relaxed);
  os::raise_attention(self.cpu_.attention);
  self.wake_word_.fetch_add(1, std::memory_order_relaxed);  // a futex wait that SA_RESTART would begin again
}

void Vcpu::on_cancel(void* vcpu) {
  Vcpu& self = *static_cast<Vcpu*>(vcpu);
  self.interrupted_.store(true, std::memory_order_seq_cst);
  self.wake();
}

bool Vcpu::signal_arrived() {
  if (signal_mask_ && signal_mask_->pending()) interrupted_.store(true, std::memory_order_relaxed);
  return interrupted_.load(std::memory_order_relaxed) || __atomic_load_n(&run_->immediate_exit, __ATOMIC_RELAXED);
}

}  // namespace anykvm::vcpu
