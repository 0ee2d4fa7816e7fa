// termios(3). restore() also runs in signal handlers: tcsetattr is async-signal-safe.
#include "vmm/terminal.h"

#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

namespace anykvm::vmm {

namespace {

termios saved;
std::atomic<int> raw_fd{-1};

void restore() {
  const int fd = raw_fd.exchange(-1);
  if (fd >= 0) tcsetattr(fd, TCSANOW, &saved);
}

// The signals that end the program without its doing. Those that ask it to end are the boot loop's.
constexpr int fatal_signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGTRAP};
struct sigaction previous[NSIG];

void on_fatal(int number) {
  restore();
  sigaction(number, &previous[number], nullptr);
  raise(number);
}

}  // namespace

RawTerminal::RawTerminal(int fd) {
  // A background job must not touch the terminal: it would be stopped.
  if (!isatty(fd) || tcgetpgrp(fd) != getpgrp() || tcgetattr(fd, &saved) != 0) return;
  termios raw = saved;
  cfmakeraw(&raw);
  raw_fd = fd;
  static const int registered = std::atexit(restore);
  static_cast<void>(registered);
  struct sigaction action {};
  action.sa_handler = on_fatal;
  action.sa_flags = SA_ONSTACK;
  for (const int number : fatal_signals) sigaction(number, &action, &previous[number]);
  tcsetattr(fd, TCSANOW, &raw);
  active_ = true;
}

RawTerminal::~RawTerminal() {
  if (!active_) return;
  restore();
  // The handlers stay when something was chained in front of them since; after restore() they only pass the signal on.
}

}  // namespace anykvm::vmm
