// One decoded instruction, as the interpreter's cache keeps it.
#pragma once

#include "anykvm/kvm.h"
#include "engine/interpret/masked_operand.h"
#include "engine/native/native_code.h"
#include "x86/cpu.h"

namespace anykvm::engine {

/// What an instruction in flight knows besides the CPU.
struct Context {
  Context(x86::Cpu& cpu, const ProbePages& probe_pages) : cpu(cpu), probe_pages(probe_pages) {}  // not the image

  x86::Cpu& cpu;
  const ProbePages& probe_pages;
  u64 next_rip = 0;          ///< behind the instruction; a branch changes it
  bool x87_touched = false;  ///< the host's x87 unit holds guest values
  static constexpr u8 no_exception = 0xff;
  u8 host_exception = no_exception;  ///< the vector of what the host raised in the instruction's native code
  u8 x87_at_exception[160];          ///< ... and its FXSAVE image then
  // For instructions that are looked at closely (Interpreter::execute):
  bool one_iteration = false;  ///< REP stops behind each element
  u64 start_rip = 0;           ///< of the instruction
  bool no_step = false;        ///< TF does not trap behind this one: an INT, which clears it, or a SYSCALL
};

struct Instruction;
/// Executes one instruction. ok: RIP moves to next_rip. fault, exit: RIP stays.
using Handler = x86::Result (*)(Context&, const Instruction&);

enum class Repeat : u8 { none, while_equal, while_not_equal };  ///< REP/REPE, REPNE

/// Which unit an instruction needs, hence which of CR0, CR4 and XCR0 must allow it.
enum class Unit : u8 { integer, x87, mmx, sse, avx, avx512 };

/// A general register as an operand names it.
struct RegisterOperand {
  u8 index : 5 = 0;
  u8 is_high_byte : 1 = 0;  ///< AH, CH, DH, BH

  unsigned shift() const { return is_high_byte * 8u; }
};

/// One cache line: the cache of them is what the interpreter misses most.
struct alignas(64) Instruction {
  static constexpr s8 no_register = -1, rip_relative = 16;

  u8 bytes[16] = {};
  Handler handler = nullptr;
  union {
    NativeCode native = nullptr;  ///< for the handlers that let the host CPU execute it
    Handler behind_bar;           ///< for without_devices(): what it calls
  };
  s64 immediate = 0;  ///< sign-extended; the branch displacement; a 64-bit absolute address; FOP
  s32 displacement = 0;

  u16 selector = 0;  ///< of a far pointer
  u8 length = 0;
  u8 code_bits = 0;  ///< the mode that it was decoded for
  u8 operand_bytes = 0;
  u8 address_bytes = 0;
  s8 base = no_register, index = no_register;
  u8 memory_bytes = 0;
  u8 alignment = 0;        ///< the memory operand must be aligned to this, else #GP; 0: any
  RegisterOperand reg[2];  ///< the first two register operands, in the order written
  u8 scale_shift : 2 = 0;
  x86::SegmentName segment : 3 = x86::ds;
  Unit unit : 3 = Unit::integer;
  x86::Cpu::Use use : 2 = x86::Cpu::Use::read;
  Repeat repeat : 2 = Repeat::none;
  bool has_memory : 1 = false;
  bool port_in_dx : 1 = false;          ///< IN and OUT by DX
  bool waits_for_x87 : 1 = false;       ///< a pending x87 exception is reported before it
  bool moves_x87_pointers : 1 = false;  ///< sets FIP, FDP and FOP
  bool uses_mxcsr : 1 = false;
  bool mxcsr_may_misalign : 1 = false;  ///< MXCSR.MM lifts `alignment`
  bool repeatable : 1 = false;          ///< is_repeatable()
  bool bars_devices : 1 = false;        ///< its memory operand must be RAM; for handlers with native code

  /// One bit a byte of the instruction.
  u32 length_mask() const { return (1u << length) - 1; }
};
static_assert(sizeof(Instruction) == 64);

}  // namespace anykvm::engine
