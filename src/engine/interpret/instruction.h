// One decoded instruction, as the interpreter's cache keeps it.
#pragma once

#include "anykvm/kvm.h"
#include "engine/native/native_code.h"
#include "x86/cpu.h"

namespace anykvm::engine {

/// What an instruction in flight knows besides the CPU.
struct Context {
  x86::Cpu& cpu;
  u64 next_rip;              ///< behind the instruction; a branch changes it
  bool x87_touched = false;  ///< the host's x87 unit holds guest values
};

struct Instruction;
/// Executes one instruction. ok: RIP moves to next_rip. fault, exit: RIP stays.
using Handler = x86::Result (*)(Context&, const Instruction&);

enum class Repeat : u8 { none, while_equal, while_not_equal };  ///< REP/REPE, REPNE

/// Which unit an instruction needs, hence which of CR0, CR4 and XCR0 must allow it.
enum class Unit : u8 { integer, x87, mmx, sse, avx, avx512 };

/// A general register as an operand names it.
struct RegisterOperand {
  u8 index = 0;
  u8 shift = 0;  ///< 8 for AH, CH, DH, BH
};

struct Instruction {
  static constexpr s8 no_register = -1, rip_relative = 16;

  Handler handler = nullptr;
  NativeCode native = nullptr;  ///< for the handlers that let the host CPU execute it
  alignas(16) u8 bytes[16] = {};
  s64 immediate = 0;  ///< sign-extended; the branch displacement; a 64-bit absolute address
  s32 displacement = 0;

  u8 length = 0;
  u8 code_bits = 0;  ///< the mode that it was decoded for
  u8 operand_bytes = 0;
  u8 address_bytes = 0;
  s8 base = no_register, index = no_register;
  u8 scale_shift = 0;
  x86::SegmentName segment = x86::ds;
  u8 memory_bytes = 0;
  x86::Cpu::Use use = x86::Cpu::Use::read;
  u8 alignment = 0;  ///< the memory operand must be aligned to this, else #GP; 0: any
  Unit unit = Unit::integer;
  Repeat repeat = Repeat::none;
  bool has_memory = false;
  bool has_lock = false;
  bool waits_for_x87 = false;       ///< a pending x87 exception is reported before it
  bool moves_x87_pointers = false;  ///< sets FIP, FDP and FOP; immediate holds FOP
  bool uses_mxcsr = false;
  u8 condition = 0;        ///< low nibble of Jcc/SETcc/CMOVcc
  RegisterOperand reg[2];  ///< the first two register operands, in the order written
  u16 selector = 0;        ///< of a far pointer
};

}  // namespace anykvm::engine
