// The guest's serial console on standard input and output, with the keys that are for the VMM itself.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "vmm/event_loop.h"
#include "vmm/serial.h"
#include "vmm/terminal.h"

namespace anykvm::vmm {

/// Ctrl-A is the escape key when input is a terminal: x leaves, h helps, Ctrl-A sends Ctrl-A. Pure, for tests.
class EscapeKeys {
 public:
  enum class Command { none, leave, help };
  /// Appends what is for the guest to `to_guest`; returns the command that `byte` completed.
  Command feed(u8 byte, std::vector<u8>& to_guest);

 private:
  bool escaped_ = false;
};

class Console {
 public:
  /// `leave` is called on the loop's thread when the user wants out.
  Console(EventLoop& loop, std::function<void()> leave);
  ~Console();

  /// From now on input goes to `serial`, which must outlive the loop's thread. Call it before the loop starts.
  void connect(Serial16550& serial);
  /// A byte the guest sent. Any thread.
  void put(u8 byte);
  /// Whether the user types into a terminal that is in raw mode now.
  bool interactive() const { return terminal_.active(); }
  /// Writes what is buffered, and stops reading: the end of the run.
  void finish();

 private:
  void on_input(short revents);
  void flush_locked();
  void show_help();

  EventLoop& loop_;
  std::function<void()> leave_;
  RawTerminal terminal_;
  Serial16550* serial_ = nullptr;
  EscapeKeys keys_;

  std::mutex mutex_;
  std::string buffer_;
  bool flush_planned_ = false;
  bool line_ended_ = true;
};

}  // namespace anykvm::vmm
