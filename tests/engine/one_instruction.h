// Single instructions in the reference engine, in 64-bit mode, on memory that is there, missing, read-only or a device.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <memory>

#include "engine/engine.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"

namespace anykvm::engine {

class OneInstruction : public testing::Test, protected x86::LongMode {
 protected:
  static constexpr Gva data = 0x400000, missing = data + page_size, device = 0x500000, read_only = 0x600000;
  static constexpr Gpa data_gpa = 0x200000, device_gpa = 0x10000000;
  static constexpr u8 no_fault = 255;

  OneInstruction() {
    cpu.state.cr4 |= x86::cr4::osxsave | x86::cr4::osxmmexcpt;
    cpu.state.xcr0 = x86::supported_xcr0();
    stop_at_exceptions();
    map(data, data_gpa, x86::pte::p | x86::pte::w);
    map(device, device_gpa, x86::pte::p | x86::pte::w);
    map(read_only, data_gpa, x86::pte::p);
    for (unsigned n = 0; n < page_size; ++n) machine.base[data_gpa + n] = u8(n ^ n >> 8);
  }

  /// Executes one instruction; the vector of the exception that it raised, or no_fault.
  u8 execute(std::initializer_list<u8> bytes) {
    cpu.state.rip = 0x5000;
    std::memcpy(machine.base + 0x5000, bytes.begin(), bytes.size());
    engine->step(cpu);
    if (cpu.state.rip == 0x5000 + bytes.size()) return no_fault;
    return u8((cpu.state.rip - handlers) / 16);
  }
  u8* vector(unsigned n) { return cpu.state.fpu.vector[n]; }
  u32 element(unsigned n, unsigned index) {
    u32 value;
    std::memcpy(&value, vector(n) + index * 4, 4);
    return value;
  }
  void set_element(unsigned n, unsigned index, u32 value) { std::memcpy(vector(n) + index * 4, &value, 4); }
  u64& opmask(unsigned n) { return cpu.state.fpu.opmask[n]; }
  u64& rax() { return cpu.state.gpr[x86::rax]; }
  u8 at(Gva gva) { return machine.base[data_gpa + (gva - data)]; }

  std::unique_ptr<Engine> engine = make_interpreter();
};

}  // namespace anykvm::engine
