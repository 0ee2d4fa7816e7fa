// Whether two engines have come to the same, and how a person is told that they have not.
#pragma once

#include <span>

#include "engine/interpret/reference.h"
#include "engine/lockstep/store_log.h"

namespace anykvm::engine::lockstep {

/// Arithmetic flags, as RFLAGS bits, that the code at RIP overwrites before it reads any: translated code does not keep
/// them. Reads the code through the TLB.
u64 dead_flags(x86::Cpu& cpu);

/// Compares all that a guest can see of a CPU but `ignored_flags`.
bool same_state(const x86::CpuState& left, const x86::CpuState& right, u64 ignored_flags);

/// Text in a fixed buffer.
class Text {
 public:
  [[gnu::format(printf, 2, 3)]] void add(const char* format, ...);
  const char* c_str() const { return text_; }
  std::size_t size() const { return used_; }
  void clear() { text_[used_ = 0] = 0; }

 private:
  char text_[32768] = {};
  std::size_t used_ = 0;
};

/// The instruction at the guest address, as one line. false: the address has no code.
bool list_instruction(Text& text, x86::Cpu& cpu, Gva rip, const char* mark);
/// Registers before, as the reference engine and as the translator leave them; what differs is marked with a star.
void list_registers(Text& text, const x86::CpuState& before, const x86::CpuState& reference,
                    const x86::CpuState& translator, u64 ignored_flags);

}  // namespace anykvm::engine::lockstep
