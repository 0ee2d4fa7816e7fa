// A generated guest: the memory that it starts with, and how to read what its tests left behind.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "x86/cpuid.h"

namespace anykvm::oracle {

using Memory = std::vector<u8>;  ///< guest-physical memory from address 0

inline constexpr u64 guest_ram = 8 << 20;

/// `count` values of `bytes` bytes in a log entry.
struct Field {
  const char* name;
  u32 offset;
  u8 bytes;
  u16 count = 1;
};

/// The event that ended a test, as its handler found it.
struct Ending {
  u64 vector = 0, error = 0, rip = 0, cs = 0, flags = 0, rsp = 0, ss = 0;
  bool has_error = false;  ///< the vector is one with an error code
};

inline bool has_error_code(u64 vector) {
  return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

/// Where the parts of a guest's tests and log entries lie.
struct Layout {
  u32 tests, test_size;
  u32 code, code_size;  ///< offsets in a test, from here on
  u32 counts[2];        ///< of its patches, of its MSRs: what a test without effects has none of
  u32 vector, frame;    ///< offsets in a log entry: the event, and its frame from the error code on
  unsigned word;        ///< bytes of their words
};

class Guest {
 public:
  explicit Guest(const Layout& layout) : layout(layout) {}
  virtual ~Guest() = default;

  const Layout layout;

  Memory image;
  std::string qemu_cpu = "max";         ///< QEMU's -cpu
  std::vector<kvm_cpuid_entry2> cpuid;  ///< what our CPU is given
  unsigned tests = 0;
  u32 log = 0, log_size = 0;  ///< entry n lies at log + n * log_size; its first word is 0 until the test has ended
  std::span<const Field> fields;

  /// What the comparison needs of a log entry. Its stack frame is only good where the handler's stack was.
  Ending ending(const Memory& memory, unsigned test) const;
  /// All of the test's code, and what of it begins at an address, if any.
  std::span<const u8> code(unsigned test) const;
  std::span<const u8> code_at(unsigned test, u64 cs, u64 rip) const;
  /// Makes the test do nothing.
  void skip(unsigned test);
  /// How far into a test's code an address is; beyond the code's size where it is elsewhere.
  virtual u64 offset_in_code(u64 cs, u64 rip) const = 0;
  /// The descriptor of a selector when the test ended; 0: there is none, or this guest's log does not show it.
  virtual u64 descriptor(const Memory&, unsigned, u64) const { return 0; }
  /// The test's input, for people.
  virtual std::string describe(unsigned test) const = 0;
};

template <class T>
T get(const Memory& memory, u64 address) {
  T value{};
  if (address + sizeof value <= memory.size()) __builtin_memcpy(&value, &memory[address], sizeof value);
  return value;
}
template <class T>
void put(Memory& memory, u64 address, T value) {
  __builtin_memcpy(&memory.at(address + sizeof value - 1) + 1 - sizeof value, &value, sizeof value);
}

/// How many tests have ended.
unsigned tests_done(const Guest& guest, const Memory& memory);

/// The first test, `from` or later, that ended differently in a way that no mistake of TCG's explains; -1: none.
int next_difference(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned from = 0);

/// The test's input and the fields of both log entries that differ, for people.
std::string report(const Guest& guest, const Memory& ours, const Memory& theirs, unsigned test);

/// How often each of TCG's mistakes has explained a difference so far, one line each.
std::string mistakes_met();

/// Intel syntax, one instruction a line.
std::string disassemble(std::span<const u8> code, u64 address, unsigned code_bits);

}  // namespace anykvm::oracle
