// The user's terminal in raw mode, and given back as it was whatever ends the program.
#pragma once

namespace anykvm::vmm {

/// Raw mode for as long as it lives, when `fd` is a terminal of which this program is in the foreground; otherwise
/// nothing. The old mode comes back on destruction, at exit(), and on a signal that kills the program. One at a time.
class RawTerminal {
 public:
  explicit RawTerminal(int fd);
  ~RawTerminal();
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;

  bool active() const { return active_; }

 private:
  bool active_ = false;
};

}  // namespace anykvm::vmm
