#include "vcpu/internal_error.h"

#include <Zydis/Zydis.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace anykvm::vcpu {

using x86::CpuState;

const char* mode_name(const x86::Cpu& cpu) {
  const CpuState& state = cpu.state;
  if (!(state.cr0 & x86::cr0::pe)) return "real mode";
  if (state.long_mode()) return state.code_bits == 64 ? "64-bit mode" : "compatibility mode";
  if (state.other_flags & x86::flag::vm) return "virtual-8086 mode";
  return state.cr0 & x86::cr0::pg ? "protected mode with paging" : "protected mode";
}

namespace {

/// The instruction's text; empty when the bytes are none.
void disassemble(const x86::Cpu& cpu, std::span<char> out) {
  out[0] = '\0';
  const unsigned bits = cpu.state.code_bits;
  ZydisDecoder decoder;
  ZydisFormatter formatter;
  ZydisDecodedInstruction instruction;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
  ZydisDecoderInit(&decoder,
                   bits == 64   ? ZYDIS_MACHINE_MODE_LONG_64
                   : bits == 32 ? ZYDIS_MACHINE_MODE_LEGACY_32
                                : ZYDIS_MACHINE_MODE_LEGACY_16,
                   bits == 64   ? ZYDIS_STACK_WIDTH_64
                   : bits == 32 ? ZYDIS_STACK_WIDTH_32
                                : ZYDIS_STACK_WIDTH_16);
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, cpu.exit.bytes, cpu.exit.byte_count, &instruction, operands)))
    ZydisFormatterFormatInstruction(&formatter, &instruction, operands, instruction.operand_count_visible, out.data(),
                                    out.size(), cpu.state.rip, ZYAN_NULL);
}

}  // namespace

std::size_t describe_internal_error(const x86::Cpu& cpu, u32 vcpu, std::span<char> out) {
  char bytes[3 * sizeof cpu.exit.bytes + 1] = "", text[128];
  for (unsigned i = 0; i < cpu.exit.byte_count; ++i) std::snprintf(bytes + 3 * i, 4, " %02x", cpu.exit.bytes[i]);
  disassemble(cpu, text);
  const int length = std::snprintf(
      out.data(), out.size(),
      "anykvm: internal error on vcpu-%u: %s; RIP %#llx, CS base %#llx, %s, CPL %u, bytes%s%s%s%s\n", vcpu,
      cpu.exit.reason ? cpu.exit.reason : "an instruction that is not emulated",
      static_cast<unsigned long long>(cpu.state.rip), static_cast<unsigned long long>(cpu.state.segment[x86::cs].base),
      mode_name(cpu), unsigned{cpu.state.cpl}, cpu.exit.byte_count ? bytes : " unknown", *text ? " (" : "", text,
      *text ? ")" : "");
  return std::min(static_cast<std::size_t>(std::max(length, 0)), out.size() - 1);
}

void tell_internal_error(const x86::Cpu& cpu, u32 vcpu) {
  static const bool wanted = std::getenv("ANYKVM_ERRORS") || isatty(STDERR_FILENO);
  if (!wanted) return;
  char line[512];
  const std::size_t length = describe_internal_error(cpu, vcpu, line);
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line, length);
}

}  // namespace anykvm::vcpu
