// Runs cases on the host CPU, in a child process of its own: what a case breaks is the child's, which is then made
// anew.
#pragma once

#include <memory>
#include <span>

#include "isa/state.h"

namespace anykvm::isa {

class Worker {
 public:
  static constexpr unsigned batch = 64;

  /// `features`: the XCR0 components that take part. `pattern`: what the data pages hold before a case's pokes.
  Worker(u64 features, std::span<const u8, data_total> pattern);
  ~Worker();

  /// Where cases are written before run().
  std::span<Case, batch> cases();
  std::span<Outcome, batch> outcomes();
  /// Runs the first `count` cases. A case that ends the worker has the outcome `lost`, one that does not end `endless`.
  void run(unsigned count);

  /// Whether 16- and 32-bit code can be run.
  bool has_local_segments() const;
  /// The limit of the GDT's segment that tells which CPU a process runs on; the worker stays there.
  unsigned cpu_limit() const;
  unsigned restarts() const { return restarts_; }

 private:
  struct Shared;
  void start();
  void stop();

  Shared* shared_;
  u64 features_;
  int process_ = -1;
  int host_cpu_;
  int to_child_ = -1, from_child_ = -1;
  unsigned restarts_ = 0;
};

}  // namespace anykvm::isa
