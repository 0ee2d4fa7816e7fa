// How a run of a guest ended; the first reason wins.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>

namespace anykvm::vmm {

struct Outcome {
  enum class Kind {
    power_off,       ///< the guest switched itself off
    reset,           ///< the guest pulled a reset line
    triple_fault,    ///< KVM_EXIT_SHUTDOWN
    internal_error,  ///< KVM could not go on
    timed_out,
    left,        ///< the user left by Ctrl-A x
    terminated,  ///< a signal asked this program to end
  };
  Kind kind;
  std::string detail;  ///< one line, without a full stop
  int signal = 0;
};

/// The process's exit code for it.
int exit_code(const Outcome& outcome);

/// Told from any thread, waited for by one.
class OutcomeBox {
 public:
  void set(Outcome outcome);
  bool is_set() const;
  /// Waits, at most `limit` if there is one: then the outcome is timed_out.
  Outcome wait(std::optional<std::chrono::nanoseconds> limit);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Outcome> outcome_;
};

}  // namespace anykvm::vmm
