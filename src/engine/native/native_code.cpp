// Emission of native code for single instructions; see native_code.h.
#include "engine/native/native_code.h"

#include <cstddef>
#include <cstring>

#include "engine/native/decoded.h"
#include "x86/cpuid.h"

namespace anykvm::engine {

using x86::CpuState;

namespace {

constexpr u32 arithmetic_flags =
    ZYDIS_CPUFLAG_CF | ZYDIS_CPUFLAG_PF | ZYDIS_CPUFLAG_AF | ZYDIS_CPUFLAG_ZF | ZYDIS_CPUFLAG_SF | ZYDIS_CPUFLAG_OF;

/// Appends machine code; remembers an overflow instead of writing past the end.
class Emitter {
 public:
  explicit Emitter(std::span<u8> out) : at_(out.data()), end_(out.data() + out.size()) {}
  bool overflowed() const { return overflowed_; }
  const u8* at() const { return at_; }

  void byte(unsigned value) {
    if (at_ == end_) {
      overflowed_ = true;
      return;
    }
    *at_++ = u8(value);
  }
  template <class... T>
  void bytes(T... values) {
    (byte(unsigned(values)), ...);
  }
  void dword(u32 value) {
    for (unsigned shift = 0; shift < 32; shift += 8) byte(value >> shift & 0xff);
  }

  /// ModRM for `reg, [base + displacement]`; base is none of rsp and r12.
  void memory(unsigned reg, unsigned base, u32 displacement) {
    byte(0x80 | (reg & 7) << 3 | (base & 7));
    dword(displacement);
  }
  void move(unsigned to, unsigned from) {
    bytes(0x48 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | (to & 7));
  }
  void load(unsigned reg, unsigned base, u32 displacement) {
    bytes(0x48 | (reg >> 3) << 2 | base >> 3, 0x8b);
    memory(reg, base, displacement);
  }
  void store(unsigned reg, unsigned base, u32 displacement) {
    bytes(0x48 | (reg >> 3) << 2 | base >> 3, 0x89);
    memory(reg, base, displacement);
  }
  void push(unsigned reg) {
    if (reg >= 8) byte(0x41);
    byte(0x50 | (reg & 7));
  }
  void pop(unsigned reg) {
    if (reg >= 8) byte(0x41);
    byte(0x58 | (reg & 7));
  }
  /// movups xmm: opcode 0x10 loads, 0x11 stores.
  void move_xmm(unsigned opcode, unsigned reg, unsigned base, u32 displacement) {
    const unsigned rex = 0x40 | (reg >> 3) << 2 | base >> 3;
    if (rex != 0x40) byte(rex);
    bytes(0x0f, opcode);
    memory(reg, base, displacement);
  }
  void move_ymm(unsigned opcode, unsigned reg, unsigned base, u32 displacement) {
    bytes(0xc4, (~reg >> 3 & 1) << 7 | 0x40 | (~base >> 3 & 1) << 5 | 0x01, 0x7c, opcode);
    memory(reg, base, displacement);
  }
  void move_zmm(unsigned opcode, unsigned reg, unsigned base, u32 displacement) {
    bytes(0x62, (~reg >> 3 & 1) << 7 | 0x40 | (~base >> 3 & 1) << 5 | (~reg >> 4 & 1) << 4 | 0x01, 0x7c, 0x48, opcode);
    memory(reg, base, displacement);
  }
  /// kmovq: opcode 0x90 loads, 0x91 stores.
  void move_opmask(unsigned opcode, unsigned reg, unsigned base, u32 displacement) {
    bytes(0xc4, 0x80 | 0x40 | (~base >> 3 & 1) << 5 | 0x01, 0xf8, opcode);
    memory(reg, base, displacement);
  }
  /// 0F AE /extension [base + displacement]: fxsave 0, fxrstor 1, ldmxcsr 2, stmxcsr 3.
  void state_transfer(unsigned extension, bool wide, unsigned base, u32 displacement) {
    const unsigned rex = 0x40 | (wide ? 8 : 0) | base >> 3;
    if (rex != 0x40) byte(rex);
    bytes(0x0f, 0xae);
    memory(extension, base, displacement);
  }

 private:
  u8* at_;
  u8* end_;
  bool overflowed_ = false;
};

/// Which registers an instruction reads or writes.
struct Uses {
  u32 gpr = 0, gpr_written = 0;
  u32 vector = 0, vector_written = 0;
  u32 opmask = 0, opmask_written = 0;
  bool x87 = false, wide_vector = false, reads_mxcsr = false;
  bool memory = false;         ///< there is a memory operand ...
  bool memory_in_rdi = false;  ///< ... which only RDI can name
  bool conditional_flags = false;
};

bool is_floating_point(const ZydisDecodedOperand& operand) {
  return operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT16 || operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT32 ||
         operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT64;
}

/// Instructions on floating-point data whose operands Zydis' tables call integers.
bool rounds(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_ROUNDPD:
    case ZYDIS_MNEMONIC_ROUNDPS:
    case ZYDIS_MNEMONIC_ROUNDSD:
    case ZYDIS_MNEMONIC_ROUNDSS:
    case ZYDIS_MNEMONIC_VROUNDPD:
    case ZYDIS_MNEMONIC_VROUNDPS:
    case ZYDIS_MNEMONIC_VROUNDSD:
    case ZYDIS_MNEMONIC_VROUNDSS: return true;
    default: return false;
  }
}

/// false: an operand that cannot be handed to the host.
bool collect(const ZydisDecodedInstruction& instruction, std::span<const ZydisDecodedOperand> operands, Uses& uses) {
  uses.reads_mxcsr = rounds(instruction.mnemonic);
  const bool is_x87 = is_x87_instruction(instruction);
  for (const ZydisDecodedOperand& operand : operands) {
    if (!is_x87 && is_floating_point(operand)) uses.reads_mxcsr = true;
    const bool written = operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    switch (operand.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER: {
        const ZydisRegister reg = operand.reg.value;
        switch (ZydisRegisterGetClass(reg)) {
          case ZYDIS_REGCLASS_GPR8:
          case ZYDIS_REGCLASS_GPR16:
          case ZYDIS_REGCLASS_GPR32:
          case ZYDIS_REGCLASS_GPR64: {
            const u32 bit = 1u << ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg));
            uses.gpr |= bit;
            if (written) uses.gpr_written |= bit;
            break;
          }
          case ZYDIS_REGCLASS_ZMM:
          case ZYDIS_REGCLASS_YMM:
          case ZYDIS_REGCLASS_XMM:
            uses.vector |= 1u << ZydisRegisterGetId(reg);
            if (written) uses.vector_written |= 1u << ZydisRegisterGetId(reg);
            if (operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT32 ||
                operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT64 ||
                operand.element_type == ZYDIS_ELEMENT_TYPE_FLOAT16)
              uses.reads_mxcsr = true;
            break;
          case ZYDIS_REGCLASS_MASK: {
            const unsigned number = unsigned(ZydisRegisterGetId(reg));
            const bool pair = written && (instruction.mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTD ||
                                          instruction.mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTQ);
            const u32 bits = pair ? 3u << (number & ~1u) : 1u << number;
            uses.opmask |= bits;
            if (written) uses.opmask_written |= bits;
            break;
          }
          case ZYDIS_REGCLASS_X87:
          case ZYDIS_REGCLASS_MMX: uses.x87 = true; break;
          case ZYDIS_REGCLASS_FLAGS:
            if (operand.actions & ZYDIS_OPERAND_ACTION_CONDWRITE) uses.conditional_flags = true;
            break;
          default:
            if (reg == ZYDIS_REGISTER_X87STATUS || reg == ZYDIS_REGISTER_X87CONTROL || reg == ZYDIS_REGISTER_X87TAG) {
              uses.x87 = true;
              break;
            }
            return false;
        }
        break;
      }
      case ZYDIS_OPERAND_TYPE_MEMORY:
        if (operand.mem.type != ZYDIS_MEMOP_TYPE_MEM || uses.memory) return false;
        uses.memory_in_rdi = is_mask_move(instruction.mnemonic);
        if (operand.encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM && !uses.memory_in_rdi) return false;
        uses.memory = true;
        break;
      case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        if (operand.imm.is_relative) return false;
        break;
      default: return false;
    }
  }
  if (is_x87 || instruction.meta.isa_ext == ZYDIS_ISA_EXT_MMX) uses.x87 = true;  // EMMS has no operands
  uses.wide_vector = instruction.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY;
  return true;
}

/// The first of the candidates that the instruction does not use.
int pick(std::initializer_list<int> candidates, u32 used) {
  for (int reg : candidates)
    if (!(used >> reg & 1)) return reg;
  return -1;
}

/// Emits the instruction itself: same opcode, memory operand [memory_register], guest RSP renamed, and the operand size
/// and the ignored bits of 16- and 32-bit code expressed the way 64-bit mode wants them. other_size is for those
/// instructions whose operand size is not what their mode and prefixes say.
bool emit_instruction(Emitter& e, const ZydisDecodedInstruction& instruction,
                      std::span<const ZydisDecodedOperand> operands, const u8* bytes, unsigned code_bits,
                      const Uses& uses, int memory_register, int rsp_register, bool other_size) {
  unsigned at = 0;
  bool seen_66 = false, mandatory_66 = false;
  u8 rex = 0;
  for (;; ++at) {
    if (code_bits == 64 && (bytes[at] & 0xf0) == 0x40) {
      rex = bytes[at];
      continue;
    }
    if (!is_legacy_prefix(bytes[at])) break;
    rex = 0;  // counts only right before the opcode
    if (bytes[at] == 0x66) {
      seen_66 = true;
      if (instruction.raw.prefixes[at].type == ZYDIS_PREFIX_TYPE_MANDATORY) mandatory_66 = true;
    }
  }
  const bool integer = !uses.vector && !uses.x87 && !uses.opmask;
  bool want_66 = seen_66;
  if (code_bits != 64 && integer && !mandatory_66) want_66 = instruction.operand_width == 16;
  if (instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && want_66 != other_size) e.byte(0x66);
  for (unsigned i = 0; i < at; ++i)
    if (bytes[i] == 0xf0 || bytes[i] == 0xf2 || bytes[i] == 0xf3) e.byte(bytes[i]);

  const bool has_modrm = instruction.attributes & ZYDIS_ATTRIB_HAS_MODRM;
  const bool memory_form = uses.memory && !uses.memory_in_rdi;
  const unsigned modrm_at = has_modrm ? instruction.raw.modrm.offset : 0;

  // Where guest RSP is named.
  bool rename_reg = false, rename_rm = false, rename_opcode = false, rename_vvvv = false;
  for (const ZydisDecodedOperand& operand : operands) {
    if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
    const ZydisRegister r = operand.reg.value;
    if (r != ZYDIS_REGISTER_RSP && r != ZYDIS_REGISTER_ESP && r != ZYDIS_REGISTER_SP && r != ZYDIS_REGISTER_SPL)
      continue;
    switch (operand.encoding) {
      case ZYDIS_OPERAND_ENCODING_MODRM_REG: rename_reg = true; break;
      case ZYDIS_OPERAND_ENCODING_MODRM_RM: rename_rm = true; break;
      case ZYDIS_OPERAND_ENCODING_OPCODE: rename_opcode = true; break;
      case ZYDIS_OPERAND_ENCODING_NDSNDD: rename_vvvv = true; break;
      default: return false;
    }
  }

  const unsigned opcode_end = has_modrm ? modrm_at : instruction.length;
  const bool wide_registers = code_bits == 64;  // else the register numbers' upper bits are ignored, here inverted
  // VEX.W, where 32-bit code ignores it; it would make the lengths of VPCMPESTRx 64 bits wide.
  const bool string_lengths =
      instruction.mnemonic == ZYDIS_MNEMONIC_VPCMPESTRI || instruction.mnemonic == ZYDIS_MNEMONIC_VPCMPESTRM;
  const unsigned w = other_size || (code_bits != 64 && string_lengths) ? 0x80 : 0;
  switch (instruction.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
      if (rex) e.byte(memory_form ? rex & ~3u : rex);
      break;
    case ZYDIS_INSTRUCTION_ENCODING_VEX: {
      const unsigned rename_xor = rename_vvvv ? unsigned(4 ^ rsp_register) << 3 : 0;
      if (bytes[at] == 0xc5) {
        e.bytes(0xc5, (bytes[at + 1] | (wide_registers ? 0u : 0x40u)) ^ rename_xor);
        at += 2;
      } else {
        e.bytes(0xc4, bytes[at + 1] | (memory_form ? 0x60u : 0u) | (wide_registers ? 0u : 0x20u),
                ((bytes[at + 2] & ~w) | (wide_registers ? 0u : 0x40u)) ^ rename_xor);
        at += 3;
      }
      rename_vvvv = false;
      break;
    }
    case ZYDIS_INSTRUCTION_ENCODING_EVEX:
      e.bytes(0x62, bytes[at + 1] | (memory_form ? 0x60u : 0u) | (wide_registers ? 0u : 0x30u),
              (bytes[at + 2] & ~w) | (wide_registers ? 0u : 0x40u), bytes[at + 3] | (wide_registers ? 0u : 0x08u));
      at += 4;
      break;
    default: return false;
  }
  if (rename_vvvv) return false;

  if (!has_modrm) {
    if (code_bits != 64 && bytes[at] >= 0x40 && bytes[at] <= 0x4f) {  // INC/DEC r: REX prefixes in 64-bit mode
      const unsigned reg = rename_opcode ? unsigned(rsp_register) : bytes[at] & 7u;
      e.bytes(0xff, 0xc0 | (bytes[at] & 8) | reg);
      return true;
    }
    if (rename_opcode) {
      // The opcode's last byte names the register: BSWAP, XCHG rAX, MOV of an immediate.
      const unsigned immediate = instruction.raw.imm[0].size / 8;
      for (; at + immediate + 1 < opcode_end; ++at) e.byte(bytes[at]);
      e.byte((bytes[at++] & ~7u) | unsigned(rsp_register));
      for (; at < opcode_end; ++at) e.byte(bytes[at]);
      return true;
    }
    for (; at < opcode_end; ++at) e.byte(bytes[at]);
    return true;
  }
  for (; at < opcode_end; ++at) {
    // 82 is another 80 that 64-bit mode does not have.
    const bool alias = bytes[at] == 0x82 && instruction.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
                       instruction.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
    e.byte(alias ? 0x80 : bytes[at]);
  }

  unsigned modrm = bytes[modrm_at];
  if (memory_form) modrm = (modrm & 0x38) | unsigned(memory_register);
  if (rename_reg) modrm = (modrm & ~0x38u) | unsigned(rsp_register) << 3;
  if (rename_rm) modrm = (modrm & ~7u) | unsigned(rsp_register);
  e.byte(modrm);
  unsigned tail = modrm_at + 1;
  if (instruction.attributes & ZYDIS_ATTRIB_HAS_SIB) ++tail;
  tail += instruction.raw.disp.size / 8;
  bool register_in_immediate = false;
  for (const ZydisDecodedOperand& operand : operands)
    register_in_immediate |= operand.encoding == ZYDIS_OPERAND_ENCODING_IS4;
  for (; tail < instruction.length; ++tail)
    e.byte(register_in_immediate && !wide_registers ? bytes[tail] & 0x7fu : bytes[tail]);
  return true;
}

/// Whether the code is what it was meant to be: the same instruction on the same operands, but for the memory operand's
/// address and the register in RSP's place. What a byte means depends on the mode, and nothing that the guest made up
/// may run as something else.
bool is_same_instruction(const ZydisDecodedInstruction& instruction, std::span<const ZydisDecodedOperand> operands,
                         std::span<const u8> code, int memory_register, int rsp_register) {
  Decoded again;
  if (!ZYAN_SUCCESS(decode_instruction(code.data(), unsigned(code.size()), 64, again))) return false;
  const ZydisDecodedInstruction& emitted = again.instruction;
  constexpr ZydisInstructionAttributes same = ZYDIS_ATTRIB_HAS_LOCK;
  if (emitted.length != code.size() || emitted.mnemonic != instruction.mnemonic ||
      emitted.operand_count_visible != instruction.operand_count_visible ||
      (emitted.attributes & same) != (instruction.attributes & same))
    return false;
  for (unsigned n = 0; n < emitted.operand_count_visible; ++n) {
    const ZydisDecodedOperand &ours = again.operands[n], &guests = operands[n];
    if (ours.type != guests.type || ours.size != guests.size) return false;
    switch (ours.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER: {
        if (ours.reg.value == guests.reg.value) break;
        const auto whole = [](ZydisRegister reg) {
          return ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
        };
        if (whole(guests.reg.value) != ZYDIS_REGISTER_RSP || ZydisRegisterGetId(whole(ours.reg.value)) != rsp_register)
          return false;
        break;
      }
      case ZYDIS_OPERAND_TYPE_MEMORY:
        if (ours.mem.base != ZYDIS_REGISTER_RAX + memory_register || ours.mem.index != ZYDIS_REGISTER_NONE ||
            ours.mem.disp.value != 0 || ours.mem.segment == ZYDIS_REGISTER_FS || ours.mem.segment == ZYDIS_REGISTER_GS)
          return false;
        break;
      case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        if (ours.imm.value.u != guests.imm.value.u) return false;
        break;
      default: return false;
    }
  }
  return true;
}

}  // namespace

EmitResult emit_native(const ZydisDecodedInstruction& instruction, std::span<const ZydisDecodedOperand> operands,
                       const u8* bytes, unsigned code_bits, std::span<u8> out) {
  Uses uses;
  if (!collect(instruction, operands, uses)) return {};

  const u32 rsp_bit = 1u << x86::rsp;
  const bool uses_rsp = uses.gpr & rsp_bit;
  u32 taken = uses.gpr | rsp_bit | 1u << x86::rax;  // RAX carries the flags
  int rsp_register = -1, memory_register = -1;
  if (uses_rsp) {
    rsp_register = pick({x86::rcx, x86::rdx, x86::rbx, x86::rsi, x86::rdi}, taken);
    if (rsp_register < 0) return {};
    taken |= 1u << rsp_register;
  }
  if (uses.memory) {
    memory_register =
        uses.memory_in_rdi ? int(x86::rdi) : pick({x86::rsi, x86::rdi, x86::rcx, x86::rdx, x86::rbx}, taken);
    if (memory_register < 0) return {};
    taken |= 1u << memory_register;
  }
  const int context = pick({x86::rdi, x86::r11, x86::r10, x86::r9, x86::r8}, taken);
  if (context < 0) return {};
  taken |= 1u << context;

  u32 modified = 0, tested = 0, touched = 0;
  if (const ZydisAccessedFlags* flags = instruction.cpu_flags) {
    modified = (flags->modified | flags->set_0 | flags->set_1) & arithmetic_flags;
    tested = flags->tested & arithmetic_flags;
    touched = modified | (flags->undefined & arithmetic_flags);
  }
  const bool load_flags = tested || (touched && (modified != arithmetic_flags || uses.conditional_flags));
  const bool zmm = x86::supports(x86::Feature::avx512f);
  constexpr u32 gpr_at = offsetof(CpuState, gpr), flags_at = offsetof(CpuState, arithmetic);
  constexpr u32 vector_at = offsetof(CpuState, fpu) + offsetof(x86::FpuState, vector);
  constexpr u32 opmask_at = offsetof(CpuState, fpu) + offsetof(x86::FpuState, opmask);
  constexpr u32 x87_at = offsetof(CpuState, fpu) + offsetof(x86::FpuState, x87);
  constexpr u32 mxcsr_at = offsetof(CpuState, fpu) + offsetof(x86::FpuState, mxcsr);

  Emitter e(out.first(native_code_bytes - 1));
  const u32 callee_saved = (taken & ~(1u << x86::rsp)) & (1u << x86::rbx | 1u << x86::rbp | 0xf000u);
  for (unsigned reg = 0; reg < 16; ++reg)
    if (callee_saved >> reg & 1) e.push(reg);
  const bool mxcsr = uses.reads_mxcsr;
  if (mxcsr) {
    e.push(x86::rax);
    e.bytes(0x0f, 0xae, 0x1c, 0x24);  // stmxcsr [rsp]
  }
  if (context != x86::rdi) e.move(unsigned(context), x86::rdi);
  if (uses.memory && memory_register != x86::rsi) e.move(unsigned(memory_register), x86::rsi);
  if (uses.x87) e.state_transfer(1, true, context, x87_at);
  for (unsigned reg = 0; reg < 32; ++reg) {
    if (!(uses.vector >> reg & 1)) continue;
    const u32 at = vector_at + reg * 64;
    if (!uses.wide_vector)
      e.move_xmm(0x10, reg, context, at);
    else if (zmm)
      e.move_zmm(0x10, reg, context, at);
    else
      e.move_ymm(0x10, reg, context, at);
  }
  for (unsigned reg = 0; reg < 8; ++reg)
    if (uses.opmask >> reg & 1) e.move_opmask(0x90, reg, context, opmask_at + reg * 8);
  if (mxcsr) e.state_transfer(2, false, context, mxcsr_at);
  if (load_flags) {
    // movzx eax, word [context + arithmetic] ; add al, 0x7f ; sahf
    if (context >= 8) e.byte(0x41);
    e.bytes(0x0f, 0xb7);
    e.memory(x86::rax, context, flags_at);
    e.bytes(0x04, 0x7f, 0x9e);
  }
  for (unsigned reg = 0; reg < 16; ++reg)
    if (uses.gpr >> reg & 1) e.load(reg == x86::rsp ? unsigned(rsp_register) : reg, context, gpr_at + reg * 8);

  const Emitter before = e;
  for (const bool other_size : {false, true}) {
    if (!emit_instruction(e, instruction, operands, bytes, code_bits, uses, memory_register, rsp_register, other_size))
      return {};
    if (is_same_instruction(instruction, operands, {before.at(), e.at()}, memory_register, rsp_register)) break;
    if (other_size || code_bits == 64) return {};
    e = before;
  }

  for (unsigned reg = 0; reg < 16; ++reg)
    if (uses.gpr_written >> reg & 1) e.store(reg == x86::rsp ? unsigned(rsp_register) : reg, context, gpr_at + reg * 8);
  if (touched) {
    // lahf ; seto al ; mov [context + arithmetic], ax
    e.bytes(0x9f, 0x0f, 0x90, 0xc0, 0x66);
    if (context >= 8) e.byte(0x41);
    e.byte(0x89);
    e.memory(x86::rax, context, flags_at);
  }
  for (unsigned reg = 0; reg < 32; ++reg) {
    if (!(uses.vector_written >> reg & 1)) continue;
    const u32 at = vector_at + reg * 64;
    if (!uses.wide_vector)
      e.move_xmm(0x11, reg, context, at);
    else if (zmm)
      e.move_zmm(0x11, reg, context, at);
    else
      e.move_ymm(0x11, reg, context, at);
  }
  for (unsigned reg = 0; reg < 8; ++reg)
    if (uses.opmask_written >> reg & 1) e.move_opmask(0x91, reg, context, opmask_at + reg * 8);
  if (mxcsr) e.state_transfer(3, false, context, mxcsr_at);
  // FXSAVE behind it, so that the next FXRSTOR loads the host's MXCSR, too.
  if (uses.x87 && mxcsr) e.bytes(0x0f, 0xae, 0x14, 0x24);  // ldmxcsr [rsp]
  if (uses.x87) e.state_transfer(0, true, context, x87_at);
  out.back() = u8(e.at() - out.data());
  if (mxcsr) {
    e.bytes(0x0f, 0xae, 0x14, 0x24);  // ldmxcsr [rsp]
    e.pop(x86::rax);
  }
  if (uses.wide_vector && uses.vector) e.bytes(0xc5, 0xf8, 0x77);  // vzeroupper
  for (unsigned reg = 16; reg-- > 0;)
    if (callee_saved >> reg & 1) e.pop(reg);
  e.byte(0xc3);
  return {.emitted = !e.overflowed(), .uses_mxcsr = mxcsr};
}

}  // namespace anykvm::engine
