// Moving the floating-point and vector state as a whole: FXSAVE, XSAVE and their kin, MXCSR, XCR0, VZEROUPPER, FWAIT.
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"
#include "x86/xsave.h"

namespace anykvm::engine {
namespace {

using x86::rax, x86::rcx, x86::rdx;
using Form = Cpu::Xsave;
namespace cr0 = x86::cr0;
namespace cr4 = x86::cr4;

constexpr unsigned fxsave_size = 512, least_xsave_size = 576;

/// The image's address, aligned as the instruction demands. size: that of the parts that are always there; how much
/// more there is differs, and the move itself checks the rights.
Result image_address(Context& c, const Instruction& i, unsigned alignment, unsigned size, Access access, Gva& gva) {
  gva = 0;
  const Result located = memory_address(c, i, c.cpu.state.code_bits == 64 ? 1 : size, access, gva);
  return gva & (alignment - 1) ? c.cpu.gp() : located;  // alignment comes first
}

template <bool wide>
Result fxsave(Context& c, const Instruction& i) {
  Gva gva;
  if (c.cpu.state.cr0 & (cr0::em | cr0::ts)) return c.cpu.raise(x86::exception::nm);
  ANYKVM_TRY(image_address(c, i, 16, fxsave_size, Access::write, gva));
  return c.cpu.fxsave(gva, wide);
}
template <bool wide>
Result fxrstor(Context& c, const Instruction& i) {
  Gva gva;
  if (c.cpu.state.cr0 & (cr0::em | cr0::ts)) return c.cpu.raise(x86::exception::nm);
  ANYKVM_TRY(image_address(c, i, 16, fxsave_size, Access::read, gva));
  return c.cpu.fxrstor(gva, wide);
}

u64 edx_eax(const Context& c) { return c.cpu.state.gpr[rdx] << 32 | u32(c.cpu.state.gpr[rax]); }

Result xsave_allowed(Context& c) {
  if (!(c.cpu.state.cr4 & cr4::osxsave)) return c.cpu.ud();
  return c.cpu.state.cr0 & cr0::ts ? c.cpu.raise(x86::exception::nm) : Result::ok;
}

template <Form form, bool wide>
Result xsave(Context& c, const Instruction& i) {
  ANYKVM_TRY(xsave_allowed(c));
  if (form == Form::xsaveopt && !c.cpu.cpuid.has(x86::Feature::xsaveopt)) return c.cpu.ud();
  if (form == Form::xsavec && !c.cpu.cpuid.has(x86::Feature::xsavec)) return c.cpu.ud();
  if (form == Form::xsaves) {
    if (!c.cpu.cpuid.has(x86::Feature::xsaves)) return c.cpu.ud();
    if (c.cpu.state.cpl) return c.cpu.gp();
  }
  Gva gva;
  ANYKVM_TRY(image_address(c, i, 64, least_xsave_size, Access::write, gva));
  return c.cpu.xsave(gva, edx_eax(c), form, wide);
}
template <bool supervisor, bool wide>
Result xrstor(Context& c, const Instruction& i) {
  ANYKVM_TRY(xsave_allowed(c));
  if (supervisor) {
    if (!c.cpu.cpuid.has(x86::Feature::xsaves)) return c.cpu.ud();
    if (c.cpu.state.cpl) return c.cpu.gp();
  }
  Gva gva;
  ANYKVM_TRY(image_address(c, i, 64, least_xsave_size, Access::read, gva));
  return c.cpu.xrstor(gva, edx_eax(c), supervisor, wide);
}

Result get_extended_control(Context& c, const Instruction&) {
  if (!(c.cpu.state.cr4 & cr4::osxsave)) return c.cpu.ud();
  const u32 index = u32(c.cpu.state.gpr[rcx]);
  if (index > 1 || (index == 1 && !c.cpu.cpuid.has(x86::Feature::xgetbv1))) return c.cpu.gp();
  const u64 value = index ? c.cpu.state.xcr0 & x86::xsave_in_use(c.cpu.state.fpu) : c.cpu.state.xcr0;
  c.cpu.state.gpr[rax] = u32(value);
  c.cpu.state.gpr[rdx] = value >> 32;
  return Result::ok;
}
Result set_extended_control(Context& c, const Instruction&) {
  if (!(c.cpu.state.cr4 & cr4::osxsave)) return c.cpu.ud();
  if (c.cpu.state.cpl) return c.cpu.gp();
  return c.cpu.write_xcr(u32(c.cpu.state.gpr[rcx]), edx_eax(c));
}

Result load_mxcsr(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  u64 value;
  ANYKVM_TRY(read_memory(c, i, 4, value));
  if (value & ~u64(x86::xsave_layout().mxcsr_mask)) return c.cpu.gp();
  c.cpu.state.fpu.mxcsr = u32(value);
  return Result::ok;
}
Result store_mxcsr(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  return write_memory(c, i, 4, c.cpu.state.fpu.mxcsr);
}

/// VZEROUPPER keeps the xmm part, VZEROALL nothing; only the registers that the mode can name.
template <unsigned kept>
Result zero_vectors(Context& c, const Instruction& i) {
  ANYKVM_TRY(check_unit(c, i));
  const unsigned count = c.cpu.state.code_bits == 64 ? 16 : 8;
  for (unsigned n = 0; n < count; ++n) std::memset(c.cpu.state.fpu.vector[n] + kept, 0, 64 - kept);
  return Result::ok;
}

Result wait_for_x87(Context& c, const Instruction&) {
  const x86::CpuState& s = c.cpu.state;
  if ((s.cr0 & (cr0::mp | cr0::ts)) == (cr0::mp | cr0::ts)) return c.cpu.raise(x86::exception::nm);
  return s.fpu.x87[2] & 0x80 ? c.cpu.raise(x86::exception::mf) : Result::ok;
}

}  // namespace

Handler select_state(const Decoded& d, Instruction& out) {
  switch (d.mnemonic()) {
    case ZYDIS_MNEMONIC_FXSAVE: return fxsave<false>;
    case ZYDIS_MNEMONIC_FXSAVE64: return fxsave<true>;
    case ZYDIS_MNEMONIC_FXRSTOR: return fxrstor<false>;
    case ZYDIS_MNEMONIC_FXRSTOR64: return fxrstor<true>;
    case ZYDIS_MNEMONIC_XSAVE: return xsave<Form::xsave, false>;
    case ZYDIS_MNEMONIC_XSAVE64: return xsave<Form::xsave, true>;
    case ZYDIS_MNEMONIC_XSAVEOPT: return xsave<Form::xsaveopt, false>;
    case ZYDIS_MNEMONIC_XSAVEOPT64: return xsave<Form::xsaveopt, true>;
    case ZYDIS_MNEMONIC_XSAVEC: return xsave<Form::xsavec, false>;
    case ZYDIS_MNEMONIC_XSAVEC64: return xsave<Form::xsavec, true>;
    case ZYDIS_MNEMONIC_XSAVES: return xsave<Form::xsaves, false>;
    case ZYDIS_MNEMONIC_XSAVES64: return xsave<Form::xsaves, true>;
    case ZYDIS_MNEMONIC_XRSTOR: return xrstor<false, false>;
    case ZYDIS_MNEMONIC_XRSTOR64: return xrstor<false, true>;
    case ZYDIS_MNEMONIC_XRSTORS: return xrstor<true, false>;
    case ZYDIS_MNEMONIC_XRSTORS64: return xrstor<true, true>;
    case ZYDIS_MNEMONIC_XGETBV: return get_extended_control;
    case ZYDIS_MNEMONIC_XSETBV: return set_extended_control;
    case ZYDIS_MNEMONIC_LDMXCSR: out.unit = Unit::sse; return load_mxcsr;
    case ZYDIS_MNEMONIC_STMXCSR: out.unit = Unit::sse; return store_mxcsr;
    case ZYDIS_MNEMONIC_VLDMXCSR: out.unit = Unit::avx; return load_mxcsr;
    case ZYDIS_MNEMONIC_VSTMXCSR: out.unit = Unit::avx; return store_mxcsr;
    case ZYDIS_MNEMONIC_VZEROUPPER: out.unit = Unit::avx; return zero_vectors<16>;
    case ZYDIS_MNEMONIC_VZEROALL: out.unit = Unit::avx; return zero_vectors<0>;
    case ZYDIS_MNEMONIC_FWAIT: return wait_for_x87;
    default: return nullptr;
  }
}

}  // namespace anykvm::engine
