// What the vCPUs do, as a trace that Perfetto's UI and chrome://tracing open, in the file that the environment variable
// ANYKVM_TRACE names: stays in the guest and in the client, halts, injections, switches of the CPU's mode.
// Format: Trace Event Format, as a JSON array without its end, so that it can be read at any time.
//
// A vCPU writes records into a ring of its own: no allocation, no lock, no system call. A thread of the process makes
// text of them. What the thread cannot keep up with is dropped, and the trace says so.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "x86/types.h"

namespace anykvm::vcpu {

class Trace {
 public:
  /// nullptr: nobody wants a trace, or its file cannot be written.
  static std::shared_ptr<Trace> begin(u32 vcpu);

  /// The names are literals. `what` may be nullptr; value belongs to it: a port, a vector.
  struct Record {
    u64 begin_ns, end_ns;  ///< equal: an instant
    const char* name;
    const char* what;
    u64 value, rip;
  };
  /// The vCPU's thread.
  void add(const Record& record);

 private:
  friend class TraceWriter;
  static constexpr u32 room = 1u << 15;

  explicit Trace(u32 vcpu) : vcpu_(vcpu) {}

  const u32 vcpu_;
  std::atomic<u64> written_{0}, read_{0}, dropped_{0};
  u64 dropped_told_ = 0;
  std::array<Record, room> records_{};
};

}  // namespace anykvm::vcpu
