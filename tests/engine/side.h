// An engine with a machine to itself, to be compared with another that does the same.
#pragma once

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"
#include "x86/xsave_parts.h"

namespace anykvm::engine {

using namespace x86;

inline constexpr Gva code = 0x5000, data_at = 0x400000;
inline constexpr Gpa data_gpa = 0x200000;

inline std::string hex(const void* bytes, std::size_t size) {
  std::string text;
  for (std::size_t n = 0; n < size; ++n) {
    char byte[3];
    std::snprintf(byte, sizeof byte, "%02x", static_cast<const u8*>(bytes)[n]);
    text += byte;
  }
  return text;
}

/// An engine with a machine to itself.
class Side : LongMode {
 public:
  explicit Side(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    cpu.state.cr4 |= cr4::osxsave | cr4::osxmmexcpt;
    cpu.state.xcr0 = supported_xcr0();
    stop_at_exceptions();
    map(data_at, data_gpa, pte::p | pte::w);
    start = cpu.state;
  }

  void execute(const u8* bytes, unsigned length, u64 seed) {
    std::mt19937_64 random(seed);
    cpu.state = start;
    cpu.update_mode();
    for (auto& vector : cpu.state.fpu.vector)
      for (u8& byte : vector) byte = u8(random() % 3 ? random() : 0x3f);
    for (u64& mask : cpu.state.fpu.opmask) mask = random() % 2 ? random() : random() & random() & random();
    for (u64& gpr : cpu.state.gpr)
      gpr = data_at + (random() % 4 ? 1024 + 64 * (random() % 16) : page_size - 80 + random() % 90);
    cpu.state.gpr[rsp] = 0x7000;
    set_x87(random);
    for (unsigned n = 0; n < page_size; n += 8) machine.put<u64>(data_gpa + n, random());
    std::memcpy(machine.base + code, bytes, length);
    machine.base[code + length] = 0xf4;  // hlt
    cpu.state.rip = code;
    engine->run(cpu);
  }

  /// What there is to compare, and what it is called.
  std::vector<std::pair<const char*, std::string>> outcome() const {
    std::vector<std::pair<const char*, std::string>> parts;
    const auto add = [&parts](const char* name, const void* bytes, unsigned size) {
      parts.emplace_back(name, std::string(static_cast<const char*>(bytes), size));
    };
    const CpuState& s = cpu.state;
    add("exit", &cpu.exit.kind, sizeof cpu.exit.kind);
    add("rip", &s.rip, sizeof s.rip);
    const u64 flags = s.rflags();
    add("flags", &flags, sizeof flags);
    add("gpr", s.gpr, sizeof s.gpr);
    for (const auto& vector : s.fpu.vector) add("vector", vector, sizeof vector);
    add("masks", s.fpu.opmask, sizeof s.fpu.opmask);
    add("mxcsr", &s.fpu.mxcsr, sizeof s.fpu.mxcsr);
    add("x87 words", s.fpu.x87, 6);
    add("FOP", s.fpu.x87 + 6, 2);
    add("FIP", s.fpu.x87 + 8, 8);
    add("FDP", s.fpu.x87 + 16, 8);
    add("FCS", &s.fpu.x87_code_selector, 2);
    add("FDS", &s.fpu.x87_data_selector, 2);
    add("x87 registers", s.fpu.x87 + x87_stack_offset, x87_stack_size);
    add("frame of an exception", machine.base + 0x6fd0, 48);
    add("memory", machine.base + data_gpa, page_size);
    return parts;
  }

  void set_xcr0(u64 value) { start.xcr0 = value; }
  void set_cr0(u64 value) { start.cr0 = value; }
  u64 cr0() const { return start.cr0; }
  u64 rip() const { return cpu.state.rip; }

  std::unique_ptr<Engine> engine;

 private:
  /// Numbers of all kinds, some registers empty; in a third of all cases exceptions are unmasked, and some wait.
  void set_x87(std::mt19937_64& random) {
    FpuState& fpu = cpu.state.fpu;
    init_x87(fpu);
    for (unsigned n = 0; n < 8; ++n) {
      static constexpr u16 exponents[] = {0, 1, 0x3ffe, 0x3fff, 0x4000, 0x4010, 0x403e, 0x7ffe, 0x7fff};
      const u64 significand = random() % 4 ? random() | 1ull << 63 : random() % 2 ? 1ull << 63 : random() % 2;
      const u16 exponent = u16((random() & 0x8000) | (random() % 4 ? exponents[random() % 9] : random() & 0x7fff));
      u8* reg = fpu.x87 + x87_stack_offset + 16 * n;
      std::memcpy(reg, &significand, 8);
      std::memcpy(reg + 8, &exponent, 2);
    }
    fpu.x87[4] = u8(random() % 2 ? random() : random() % 2 ? 0xff : 0x0f);
    const u16 status = u16(random() & (random() % 3 ? 0x7f00 : 0x7f7f));
    std::memcpy(fpu.x87 + 2, &status, 2);
    if (random() % 3 == 0) {
      const u16 control = u16(random());
      std::memcpy(fpu.x87, &control, 2);
    }
    settle_x87_words(fpu);
  }

  CpuState start;
};

}  // namespace anykvm::engine
