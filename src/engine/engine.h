// What runs guest mode, behind one small interface.
#pragma once

#include <memory>

#include "x86/cpu.h"

namespace anykvm::engine {

/// One engine per vCPU. It runs on the thread that calls run(), allocates nothing there and takes no lock.
class Engine {
 public:
  virtual ~Engine() = default;

  /// Executes guest instructions from cpu.state until cpu.exit.kind is not none, delivering the exceptions that they
  /// raise. Pending interrupts are the caller's: it sets Cpu::attention to be returned to. State is precise on return.
  virtual void run(x86::Cpu& cpu) = 0;

  /// Executes one instruction (one iteration of a REP), whatever attention and immediate_exit say; exit.kind is none
  /// when it is done. The vCPU finishes an instruction with it that waited for the client's I/O before it lets a
  /// signal or an interrupt in, as KVM does.
  virtual void step(x86::Cpu& cpu) = 0;

  virtual const char* name() const = 0;

  /// Whether this is the host's address of guest code that the engine lets the host CPU execute. Async-signal-safe.
  virtual bool is_native_code(const void*) const { return false; }
};

std::unique_ptr<Engine> make_interpreter();

}  // namespace anykvm::engine
