// Guest user code on the host CPU itself, in a process whose address space mirrors the guest's (docs/direct.md). It
// pays where user code runs for long between two entries to the guest's kernel: each costs some microseconds more than
// translated code takes. So it is tried with address spaces that are seen to do that, and given up where it is not so.
#pragma once

#include <memory>

#include "engine/direct/mirror.h"

namespace anykvm::engine::direct {

/// Of one vCPU, on whose thread everything is called.
class Direct {
 public:
  explicit Direct(const KnownCode& known);
  ~Direct();
  Direct(const Direct&) = delete;
  Direct& operator=(const Direct&) = delete;

  /// Whether the user code that comes next is to be run by run().
  bool wants(x86::Cpu& cpu) {
    const u64 space = space_of(cpu);
    if (space != looked_up_) look_up(space);
    if (eager_ && !current_ && !paused_ && works_) take(cpu);
    return current_ && !paused_;
  }

  /// Whether wants() says no without more thought.
  bool does_not_care(const x86::Cpu& cpu) const { return looked_up_ == space_of(cpu) && !current_ && !eager_; }

  enum class Next : u8 {
    decide,     ///< something waits, or the address space is not wanted any more
    step,       ///< the reference engine is to execute the instruction at RIP
    translate,  ///< wants() says no for now: translated code goes on
  };
  /// Runs 64-bit user code from the state on. The host's x87 unit has none of the guest's values.
  Next run(x86::Cpu& cpu);

  /// The guest's kernel has gone back to user code.
  void entered_user() {
    ++entries_;
    paused_ = false;
  }
  /// The vCPU was made to look up while translated user code ran.
  void interrupted(x86::Cpu& cpu);
  /// No store to a page of the host's whose address has these translate::SharedCode::address_bits may go through unseen
  /// any more.
  void forbid_stores(u64 page);
  /// The vCPU's thread may be elsewhere for a while.
  void rest() { unbind(); }
  /// How often the guest's code has gone on natively.
  u64 stretches() const { return stretches_; }
  /// Why a vCPU of this process has no code run natively; nullptr: nothing is known to be in the way.
  static const char* obstacle();
  /// A host fault has unwound run(): the state of the guest's code comes back.
  void abandon(x86::Cpu& cpu);

 private:
  struct Space {
    u64 number = 0;  ///< space_of() its owner; 0: free
    HostProcess process;
    Mirror mirror;
    u64 used = 0;         ///< when it ran last, in runs
    bool placed = false;  ///< the host's scheduler has chosen a CPU for it
    // Since it was judged last whether it pays: CPU time of the process then, and stops.
    u64 judged_at = 0;
    u32 exits = 0, faults = 0;
  };
  /// What is known of an address space that is seen in user code.
  struct Candidate {
    u64 number = 0;
    u32 hits = 0;        ///< in turn
    u64 not_before = 0;  ///< TSC
    u64 rests = 0;       ///< how long it was not wanted last, in TSC ticks
  };
  static u64 space_of(const x86::Cpu& cpu) { return cpu.state.cr3 & ~0xfffull; }

  void look_up(u64 number);
  void take(x86::Cpu& cpu);
  Candidate& candidate(u64 number);
  bool suits(const x86::Cpu& cpu) const;
  bool prepare(x86::Cpu& cpu);
  Space* make_space(x86::Cpu& cpu, u64 number);
  void give_up();
  bool load(const x86::Cpu& cpu) const;
  bool store(x86::Cpu& cpu) const;
  Next lose(x86::Cpu& cpu);
  void rewind(x86::Cpu& cpu, int signal, u64 trap) const;
  void note_stop(Space& space, bool mapped);
  void bind();
  void unbind();

  Zygote zygote_;
  GuestRam ram_;
  CodePages code_;
  const KnownCode known_;
  std::unique_ptr<Space> spaces_[Zygote::most_processes];
  Candidate candidates_[64];
  const bool eager_;
  bool works_ = true;  ///< this host lets us, as far as is known
  bool paused_ = false;
  Space* current_ = nullptr;  ///< of looked_up_; nullptr: it is not wanted
  Space* running_ = nullptr;
  u64 looked_up_ = 0;
  u64 runs_ = 0, stretches_ = 0;
  // interrupted()
  u64 entries_ = 0, entries_seen_ = 0, last_seen_ = 0;
  /// A fault of the guest's.
  struct PendingFault {
    u64 rip = 0, space = 0;
    Gva address = 0;
    x86::Access access{};
  } fault_;
  // The thread's CPU.
  cpu_set_t cpus_;
  int bound_to_ = -1;
  u64 bound_since_ = 0;
};

}  // namespace anykvm::engine::direct
