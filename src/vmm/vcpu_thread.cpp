// The run loop. A kick is immediate_exit and a signal that does nothing: the pair leaves no window in which a vCPU
// enters guest mode and misses it. (KVM API, KVM_RUN, "immediate_exit".)
#include "vmm/vcpu_thread.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>

#include <chrono>

namespace anykvm::vmm {

namespace {

int kick_signal() { return SIGRTMIN; }

void install_kick_handler() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigaction(kick_signal(), &action, nullptr);
}

std::string hex(std::span<const u8> bytes) {
  std::string text;
  for (const u8 byte : bytes) text += fmt::format("{}{:02x}", text.empty() ? "" : " ", byte);
  return text;
}

}  // namespace

void VcpuThread::start() {
  install_kick_handler();
  // Signals for the program are the I/O thread's; only the kick reaches this one.
  sigset_t blocked, before;
  sigfillset(&blocked);
  sigdelset(&blocked, kick_signal());
  for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) sigdelset(&blocked, fault);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  thread_ = std::thread([this] {
    run();
    ended_ = true;
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), fmt::format("vcpu-{}", vcpu_.id()).c_str());
}

void VcpuThread::stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  vcpu_.set_immediate_exit(true);
  while (!ended_) {
    pthread_kill(thread_.native_handle(), kick_signal());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  thread_.join();
}

void VcpuThread::run() try {
  while (!stopping_ && handle(vcpu_.run())) {
  }
} catch (const std::exception& error) {
  report(Outcome::Kind::internal_error, error.what());
}

bool VcpuThread::handle(const Exit& exit) {
  const auto per_element = [](auto data, unsigned size, auto&& each) {
    for (size_t at = 0; at + size <= data.size(); at += size) each(data.subspan(at, size));
  };
  return std::visit(Overloaded{
                        [&](const exits::IoOut& out) {
                          per_element(out.data, out.size,
                                      [&](std::span<const u8> element) { ports_.write(out.port, element); });
                          return true;
                        },
                        [&](const exits::IoIn& in) {
                          per_element(in.data, in.size, [&](std::span<u8> element) { ports_.read(in.port, element); });
                          return true;
                        },
                        [&](const exits::MmioRead& read) {
                          mmio_.read(read.gpa, read.data);
                          return true;
                        },
                        [&](const exits::MmioWrite& write) {
                          mmio_.write(write.gpa, write.data);
                          return true;
                        },
                        [&](const exits::Interrupted&) { return true; },
                        [&](const exits::NotStarted&) { return true; },
                        [&](const exits::Shutdown&) {
                          report(Outcome::Kind::triple_fault, "the guest's processor shut down on a triple fault");
                          return false;
                        },
                        [&](const exits::InternalError& error) {
                          report(Outcome::Kind::internal_error,
                                 fmt::format("KVM met an internal error ({})", error.suberror), error.instruction);
                          return false;
                        },
                        [&](const exits::FailEntry& failure) {
                          report(Outcome::Kind::internal_error,
                                 fmt::format("KVM could not enter the guest (reason {:#x})", failure.hardware_reason));
                          return false;
                        },
                        [&](const exits::SystemEvent& event) {
                          const bool off = event.type == KVM_SYSTEM_EVENT_SHUTDOWN;
                          outcome_.set({off ? Outcome::Kind::power_off : Outcome::Kind::reset, {}});
                          return false;
                        },
                        [&](const exits::Other& other) {
                          report(Outcome::Kind::internal_error,
                                 fmt::format("KVM left the guest for an unknown reason ({})", other.reason));
                          return false;
                        },
                        [&](const auto&) {
                          report(Outcome::Kind::internal_error,
                                 fmt::format("KVM left the guest for a reason that was not asked for ({})",
                                             vcpu_.run_area().exit_reason));
                          return false;
                        },
                    },
                    exit);
}

std::string VcpuThread::instruction_bytes(u64 rip) const {
  const auto translation = vcpu_.translate(rip);
  if (!translation.valid) return {};
  u64 count = std::min<u64>(15, page_size - rip % page_size);
  return hex(memory_.at(translation.physical_address, count));
}

void VcpuThread::report(Outcome::Kind kind, const std::string& what, std::span<const u8> instruction) {
  std::string where;
  try {
    const u64 rip = vcpu_.regs().rip;
    const u64 linear = rip + vcpu_.sregs().cs.base;
    const std::string bytes = instruction.empty() ? instruction_bytes(linear) : hex(instruction);
    where = fmt::format(" at RIP {:#x} of vCPU {}, bytes {}", rip, vcpu_.id(), bytes.empty() ? "not mapped" : bytes);
  } catch (const std::exception&) {
    where = fmt::format(" of vCPU {}, whose registers cannot be read", vcpu_.id());
  }
  outcome_.set({kind, what + where});
}

}  // namespace anykvm::vmm
