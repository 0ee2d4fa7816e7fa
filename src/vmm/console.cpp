// Output is written by the line, or after two milliseconds: a system call per character would be most of the cost of a
// talkative guest. Input stops while the guest does not read.
#include "vmm/console.h"

#include <unistd.h>

#include <cerrno>

namespace anykvm::vmm {

namespace {
constexpr u8 ctrl_a = 1;
constexpr size_t buffer_limit = 4096;
constexpr size_t backlog_limit = 4096;
constexpr u64 flush_after_ns = 2'000'000;
}  // namespace

EscapeKeys::Command EscapeKeys::feed(u8 byte, std::vector<u8>& to_guest) {
  if (!escaped_) {
    if (byte == ctrl_a)
      escaped_ = true;
    else
      to_guest.push_back(byte);
    return Command::none;
  }
  escaped_ = false;
  switch (byte) {
    case 'x':
    case 'X': return Command::leave;
    case 'h':
    case 'H':
    case '?': return Command::help;
    case ctrl_a: to_guest.push_back(ctrl_a); return Command::none;
    default:  // not a command: the guest gets both
      to_guest.push_back(ctrl_a);
      to_guest.push_back(byte);
      return Command::none;
  }
}

Console::Console(EventLoop& loop, std::function<void()> leave)
    : loop_(loop), leave_(std::move(leave)), terminal_(STDIN_FILENO) {}

Console::~Console() { finish(); }

void Console::connect(Serial16550& serial) {
  serial_ = &serial;
  serial.on_drained([this] { loop_.modify(STDIN_FILENO, POLLIN); });
  // A background job that reads its terminal would be stopped.
  if (isatty(STDIN_FILENO) && !terminal_.active()) return;
  loop_.add(STDIN_FILENO, POLLIN, [this](short revents) { on_input(revents); });
}

void Console::on_input(short revents) {
  if (!(revents & POLLIN)) return loop_.remove(STDIN_FILENO);
  u8 bytes[512];
  const ssize_t got = read(STDIN_FILENO, bytes, sizeof bytes);
  if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (got <= 0) return loop_.remove(STDIN_FILENO);
  std::vector<u8> to_guest;
  for (const u8 byte : std::span(bytes, size_t(got))) {
    if (!terminal_.active()) {
      to_guest.push_back(byte);
      continue;
    }
    switch (keys_.feed(byte, to_guest)) {
      case EscapeKeys::Command::leave: leave_(); break;
      case EscapeKeys::Command::help: show_help(); break;
      case EscapeKeys::Command::none: break;
    }
  }
  if (to_guest.empty()) return;
  // The order matters: when the guest drains the queue in between, its modify() comes after this one.
  if (!terminal_.active() && serial_->backlog() + to_guest.size() > backlog_limit) loop_.modify(STDIN_FILENO, 0);
  serial_->receive(to_guest);
}

void Console::show_help() {
  const std::scoped_lock lock(mutex_);
  buffer_ += "\r\nCtrl-A x  end the guest\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";
  flush_locked();
}

void Console::put(u8 byte) {
  const std::scoped_lock lock(mutex_);
  buffer_.push_back(char(byte));
  if (byte == '\n' || buffer_.size() >= buffer_limit) return flush_locked();
  if (flush_planned_) return;
  flush_planned_ = true;
  loop_.at(EventLoop::now_ns() + flush_after_ns, [this] {
    const std::scoped_lock lock(mutex_);
    flush_planned_ = false;
    flush_locked();
  });
}

void Console::flush_locked() {
  if (!buffer_.empty()) line_ended_ = buffer_.back() == '\n';
  const char* at = buffer_.data();
  size_t left = buffer_.size();
  while (left > 0) {
    const ssize_t done = ::write(STDOUT_FILENO, at, left);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0 && errno == EAGAIN) {  // standard output shares a non-blocking file with another program
      pollfd wait{STDOUT_FILENO, POLLOUT, 0};
      poll(&wait, 1, 100);
      continue;
    }
    if (done < 0) break;  // nobody reads any more: the guest runs on
    at += done;
    left -= size_t(done);
  }
  buffer_.clear();
}

void Console::finish() {
  loop_.remove(STDIN_FILENO);
  const std::scoped_lock lock(mutex_);
  flush_locked();
  if (isatty(STDOUT_FILENO) && !line_ended_) {
    buffer_ = "\r\n";
    flush_locked();
  }
}

}  // namespace anykvm::vmm
