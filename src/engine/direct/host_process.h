// The host's processes in which guest user code runs natively: how they are made, told what to map, and waited for.
//
// A process has nothing in its address space but the area of stub_layout.h and what it is told to map of guest RAM. The
// code that it runs can make no system call and change no mapping; what it writes into the area is taken for
// the registers of a user program, which it may choose anyway.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <span>

#include "engine/direct/stub_layout.h"
#include "os/memory_file.h"

namespace anykvm::engine::direct {

class HostProcess;

/// Forks the processes of one vCPU. Everything is called on that vCPU's thread.
class Zygote {
 public:
  /// Some more than live at a time: one that is being killed can still take a wake-up that is meant for its successor.
  static constexpr unsigned most_processes = 8, areas = 4 * most_processes;

  Zygote() = default;
  ~Zygote() { stop(); }
  Zygote(const Zygote&) = delete;
  Zygote& operator=(const Zygote&) = delete;

  /// Its processes will be able to map these files and have no other descriptor. false: the host does not let us.
  /// Some milliseconds.
  bool start(std::span<const int> files);
  bool running() const { return pid_ > 0; }
  /// Ends the processes, too.
  void stop();

 private:
  friend class HostProcess;
  struct Area {
    Commands commands;
    StubBlock block;
  };
  Area& area(unsigned n) const;

  int memory_fd_ = -1, socket_ = -1, pid_ = 0;
  unsigned next_area_ = 0;
  u32 used_areas_ = 0;  ///< one bit each
  static_assert(areas == 32);
  os::Mapping memory_;  ///< the code, then one area for the zygote and one for each process
};

class HostProcess {
 public:
  HostProcess() = default;
  ~HostProcess() { end(); }
  HostProcess(const HostProcess&) = delete;
  HostProcess& operator=(const HostProcess&) = delete;

  /// Forks it; it is stopped. Some hundred microseconds.
  bool start(Zygote& zygote);
  bool running() const { return pid_ > 0; }
  void end();

  /// Binds its threads to this CPU: what waits for each other is quick only on the same one.
  void bind(int cpu);
  void unbind(const cpu_set_t& cpus);

  /// To be done before the guest's code goes on.
  void map(u64 address, u64 size, int protection, int fd, u64 offset);
  void unmap(u64 address, u64 size);

  /// The guest's code goes on, with the registers that context(), fs_base() and gs_base() have.
  void go();
  enum class Stop : u8 {
    signal,  ///< signal() says which
    gone,    ///< the process has ended; what it held is lost
  };
  /// Until it has stopped, for which a raised `attention` is a reason, or `immediate_exit`, which a signal handler of
  /// this thread may set.
  Stop wait(std::atomic<u32>& attention, const volatile u8* immediate_exit);

  // --- while it is stopped
  unsigned signal() const { return block().signal; }
  /// nullptr: the guest's code has overwritten it.
  ucontext_t* context() const;
  /// The XSAVE image that belongs to it, in the standard format, with the kernel's words in its legacy region's last 48
  /// bytes; empty: as above.
  std::span<u8> xsave_image(const ucontext_t& context) const;
  int cpu() const { return int(block().cpu % CPU_SETSIZE); }  ///< that the guest's code was on
  u64 cpu_ns() const;                                         ///< CPU time that it has had
  u64 call_address() const { return block().call_address; }
  u64& fs_base() const { return block().fs_base; }
  u64& gs_base() const { return block().gs_base; }

  static constexpr int kick_signal = 10;  ///< SIGUSR1
  static bool is_in_area(u64 address) { return address - area_address < STUB_AREA_SIZE; }

 private:
  Commands& commands() const { return area_->commands; }
  StubBlock& block() const { return area_->block; }
  void call(s64 number, u64 a, u64 b, u64 c = 0, u64 d = 0, u64 e = 0, u64 f = 0);
  void send_calls(bool then_go);
  void make_calls();
  bool is_alive() const;

  Zygote* zygote_ = nullptr;
  unsigned number_ = 0;  ///< of its area
  Zygote::Area* area_ = nullptr;
  int pid_ = 0, runner_ = 0;
  u32 stops_seen_ = 0, calls_ = 0, sequence_ = 0;
  int cpu_ = -1;  ///< that both threads are bound to
};

}  // namespace anykvm::engine::direct
