// The x87 unit as a whole: FNINIT, and the images of FNSTENV, FLDENV, FNSAVE and FRSTOR, whose layout follows the mode
// (the host's is always 64-bit) and whose pointers are the guest's.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"
#include "x86/x87_environment.h"
#include "x86/xsave_parts.h"

namespace anykvm::engine {
namespace {

constexpr unsigned largest_image = 28 + x86::x87_registers_size;

x86::X87Format format_of(const Context& c, unsigned memory_bytes) {
  const unsigned environment = memory_bytes > 28 ? memory_bytes - x86::x87_registers_size : memory_bytes;
  return {.wide = environment == 28, .protected_mode = c.cpu.state.protected_mode() && !c.cpu.state.v86()};
}

/// The new words are in force in the host's unit when the next instruction loads it.
Result initialise(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  x86::FpuState& fpu = c.cpu.state.fpu;
  u8 registers[x86::x87_registers_size];
  x86::store_x87_registers(fpu, registers);
  // FNINIT empties the registers but does not clear them; the stack turns with its top.
  const unsigned top = fpu.x87[3] >> 3 & 7;
  x86::init_x87(fpu);
  for (unsigned n = 0; n < 8; ++n)
    std::memcpy(fpu.x87 + x86::x87_stack_offset + 16 * ((n + top) & 7), registers + 10 * n, 10);
  return Result::ok;
}

Result store_environment(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  u8 image[largest_image];
  Gva gva;
  x86::FpuState& fpu = c.cpu.state.fpu;
  ANYKVM_TRY(memory_address(c, i, i.memory_bytes, Access::write, gva));
  const x86::X87Format format = format_of(c, i.memory_bytes);
  x86::store_x87_environment(fpu, format, image);
  if (i.memory_bytes == format.size()) {
    ANYKVM_TRY(c.cpu.write(gva, image, i.memory_bytes));
    fpu.x87[0] |= 0x3f;  // all exceptions are masked
    x86::settle_x87_words(fpu);
    return Result::ok;
  }
  x86::store_x87_registers(fpu, image + format.size());
  ANYKVM_TRY(c.cpu.write(gva, image, i.memory_bytes));
  return initialise(c, i);
}

Result load_environment(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  u8 image[largest_image];
  Gva gva;
  ANYKVM_TRY(memory_address(c, i, i.memory_bytes, Access::read, gva));
  ANYKVM_TRY(c.cpu.read(gva, image, i.memory_bytes));
  x86::FpuState& fpu = c.cpu.state.fpu;
  const x86::X87Format format = format_of(c, i.memory_bytes);
  const unsigned old_top = fpu.x87[3] >> 3 & 7;
  x86::load_x87_environment(fpu, format, image);
  if (i.memory_bytes != format.size()) {
    x86::load_x87_registers(fpu, image + format.size());
    return Result::ok;
  }
  // The registers stay where they are; ST(0), the image's first, moves.
  const unsigned top = fpu.x87[3] >> 3 & 7;
  u8 registers[x86::x87_registers_size];
  x86::store_x87_registers(fpu, registers);
  for (unsigned n = 0; n < 8; ++n)
    std::memcpy(fpu.x87 + x86::x87_stack_offset + 16 * ((n + old_top - top) & 7), registers + 10 * n, 10);
  return Result::ok;
}

}  // namespace

bool waits_for_x87(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FNINIT:
    case ZYDIS_MNEMONIC_FNCLEX:
    case ZYDIS_MNEMONIC_FENI8087_NOP:
    case ZYDIS_MNEMONIC_FDISI8087_NOP:
    case ZYDIS_MNEMONIC_FSETPM287_NOP:
    case ZYDIS_MNEMONIC_FNSTCW:
    case ZYDIS_MNEMONIC_FNSTSW:
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FNSAVE: return false;
    default: return true;
  }
}

bool is_x87_control(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FLDCW:
    case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FRSTOR: return true;
    default: return !waits_for_x87(mnemonic);
  }
}

Handler select_x87(const Decoded& d, Instruction& out) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_FNINIT:
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FRSTOR: break;
    default: return nullptr;
  }
  out.waits_for_x87 = waits_for_x87(d.mnemonic());
  if (!out.has_memory) return initialise;
  return out.use == Cpu::Use::write ? store_environment : load_environment;
}

}  // namespace anykvm::engine
