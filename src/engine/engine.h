// What runs guest mode, behind one small interface.
#pragma once

#include <memory>
#include <string_view>

#include "x86/cpu.h"

namespace anykvm::engine {

class CodeMemory;

/// One engine per vCPU. It runs on the thread that calls run(), allocates nothing there and takes no lock.
class Engine {
 public:
  virtual ~Engine() = default;

  /// Executes guest instructions from cpu.state until cpu.exit.kind is not none, delivering the exceptions that they
  /// raise. Pending interrupts are the caller's: it sets Cpu::attention to be returned to. State is precise on return.
  virtual void run(x86::Cpu& cpu) = 0;

  /// Before run(), which else assumes the opposite: since it returned last, nobody but the guest's CPUs has written to
  /// the guest's memory and told the guest so.
  virtual void keep_code() {}

  /// Executes one instruction (one iteration of a REP), whatever attention and immediate_exit say; exit.kind is none
  /// when it is done. The vCPU finishes an instruction with it that waited for the client's I/O before it lets a
  /// signal or an interrupt in, as KVM does.
  virtual void step(x86::Cpu& cpu) = 0;

  /// A host fault has unwound run() or step(), which can put nothing back in order themselves then: do it now, on the
  /// same thread.
  virtual void abandon() {}

  virtual const char* name() const = 0;

  /// How many blocks of guest code it has translated.
  virtual u64 translations() const { return 0; }

  /// How often guest code has gone on running on the host CPU itself.
  virtual u64 native_stretches() const { return 0; }

  /// Calls f(arg, mnemonic, count) for each instruction that the reference engine has executed in a faster engine's
  /// place, and how often; "" stands for those that it was given without a look at them. Any thread; the counts may be
  /// a little old.
  virtual void for_each_step(void (*)(void* arg, const char* mnemonic, u64 count), void*) const {}
};

std::unique_ptr<Engine> make_interpreter();
/// exact: arithmetic flags that are overwritten before anything reads them are kept all the same, so that exceptions
/// and exits show them; slower.
/// memory: for translations, shared by the vCPUs of a virtual machine, and outlives the engine; nullptr: its own.
std::unique_ptr<Engine> make_translator(bool exact = false, CodeMemory* memory = nullptr);
/// The translator; and where guest RAM is shared memory of files, user code that runs for long runs on the host CPU
/// itself, in processes of its own.
std::unique_ptr<Engine> make_direct(CodeMemory* memory = nullptr);
/// Why such an engine of this process has nothing run on the host CPU; nullptr: nothing is known to be in the way.
const char* direct_obstacle();
std::unique_ptr<Engine> make_lockstep();

enum class Kind : u8 { interpret, translate, translate_exact, direct, lockstep };
inline constexpr Kind every_kind[] = {Kind::interpret, Kind::translate, Kind::translate_exact, Kind::direct,
                                      Kind::lockstep};
/// Whether this processor has what the engine emits: the translator needs BMI2.
bool runs_here(Kind kind);
/// A kind's name, or "auto" (or nothing) for the fastest that runs here. false: no such engine, or it does not run
/// here.
bool parse_kind(std::string_view name, Kind& kind);
const char* name_of(Kind kind);

/// The engine of the vCPUs that are created from now on, in the whole process. Before set_default_kind() it is what the
/// environment variable ANYKVM_ENGINE names; false: it names none (the variable's value is in `invalid`).
bool default_kind(Kind& kind, const char** invalid = nullptr);
void set_default_kind(Kind kind);
std::unique_ptr<Engine> make(Kind kind, CodeMemory* memory = nullptr);

}  // namespace anykvm::engine
