// One run. The order of construction is the order of life: the terminal's mode outlives everything that may fail.
#include "vmm/boot.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sysexits.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "vmm/console.h"

namespace anykvm::vmm {

namespace {

/// The signals that ask a program to end become an outcome, so that the terminal is given back and disks are closed.
class EndSignals {
 public:
  EndSignals(EventLoop& loop, OutcomeBox& outcome) {
    sigset_t wanted;
    sigemptyset(&wanted);
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) sigaddset(&wanted, number);
    pthread_sigmask(SIG_BLOCK, &wanted, &before_);
    ignore_broken_pipes();
    fd_ = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "signalfd");
    loop.add(fd_, POLLIN, [this, &outcome](short) {
      signalfd_siginfo info;
      if (read(fd_, &info, sizeof info) != sizeof info) return;
      const int number = int(info.ssi_signo);
      outcome.set(
          {Outcome::Kind::terminated, fmt::format("ended by signal {} ({})", number, strsignal(number)), number});
    });
  }
  ~EndSignals() {
    close(fd_);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  static void ignore_broken_pipes() {
    struct sigaction action {};
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, nullptr);
  }
  int fd_ = -1;
  sigset_t before_;
};

std::string message_of(const Outcome& outcome, const BootOptions& options) {
  switch (outcome.kind) {
    case Outcome::Kind::power_off: return "the guest powered off";
    case Outcome::Kind::reset: return "the guest reset the machine, which ends the run";
    case Outcome::Kind::left: return "left by Ctrl-A x";
    case Outcome::Kind::timed_out:
      return fmt::format("the guest did not power off within {} s (--timeout)",
                         std::chrono::duration<double>(*options.timeout).count());
    default: return outcome.detail;
  }
}

bool is_failure(const Outcome& outcome) {
  using Kind = Outcome::Kind;
  return outcome.kind == Kind::triple_fault || outcome.kind == Kind::internal_error || outcome.kind == Kind::timed_out;
}

using Deadline = std::optional<std::chrono::steady_clock::time_point>;

/// One life of the machine, from power-on or reset to the next reset or the end.
Outcome run(const std::shared_ptr<KvmDevice>& device, const BootOptions& options, Deadline deadline, bool announce) {
  const std::string engine = device->name();
  OutcomeBox outcome;
  EventLoop loop;
  EndSignals signals(loop, outcome);
  const Kvm kvm(device);

  // The console before the machine: its handler for fatal signals has to be below the one of a software KVM.
  Console console(loop, [&] { outcome.set({Outcome::Kind::left, {}}); });
  Machine machine(kvm, options.machine, loop, outcome, [&](u8 byte) { console.put(byte); });
  console.connect(machine.serial());
  // What software mode is and how to get out is for a person; whoever reads a pipe wants the outcome alone.
  if (announce && isatty(STDERR_FILENO))
    fmt::print(stderr, "anykvm: {} CPU{}, {} MiB, engine {}{}{}", options.machine.cpus,
               options.machine.cpus == 1 ? "" : "s", options.machine.memory_bytes >> 20, engine,
               console.interactive() ? "; Ctrl-A x leaves, Ctrl-A h helps" : "", console.interactive() ? "\r\n" : "\n");
  // Also when something throws: devices may go only when the loop no longer calls them.
  const std::unique_ptr<EventLoop, decltype([](EventLoop* running) { running->stop(); })> stop_before_devices_go(&loop);
  loop.start();
  machine.start();
  std::optional<std::chrono::nanoseconds> left;
  if (deadline) left = std::max(*deadline - std::chrono::steady_clock::now(), std::chrono::nanoseconds(0));
  const Outcome result = outcome.wait(left);
  machine.stop();
  loop.stop();
  console.finish();
  return result;
}

}  // namespace

int boot(const std::shared_ptr<KvmDevice>& device, const BootOptions& options) try {
  Deadline deadline;
  if (options.timeout) deadline = std::chrono::steady_clock::now() + *options.timeout;
  Outcome outcome = run(device, options, deadline, !options.quiet);
  // Firmware starts again; a kernel that was loaded by us is no longer there to be started.
  while (options.machine.firmware && outcome.kind == Outcome::Kind::reset)
    outcome = run(device, options, deadline, false);
  if (is_failure(outcome) || !options.quiet) fmt::print(stderr, "anykvm: {}\n", message_of(outcome, options));
  return exit_code(outcome);
} catch (const BadInput& error) {
  fmt::print(stderr, "anykvm: {}\n", error.what());
  return EX_DATAERR;
} catch (const std::exception& error) {
  fmt::print(stderr, "anykvm: {}\n", error.what());
  return EX_SOFTWARE;
}

}  // namespace anykvm::vmm
