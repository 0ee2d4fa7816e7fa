#include "x86/x87_environment.h"

#include <cpuid.h>

#include <cstring>

#include "x86/xsave_parts.h"

namespace anykvm::x86 {

namespace {

template <class T>
T get(const u8* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
template <class T>
void put(u8* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

// In FpuState::x87.
constexpr unsigned control_at = 0, status_at = 2, tags_at = 4, opcode_at = 6, instruction_at = 8, operand_at = 16;

enum Tag : u16 { valid, zero, special, empty };

Tag tag_of(const u8* reg) {
  const u64 significand = get<u64>(reg);
  const unsigned exponent = get<u16>(reg + 8) & 0x7fff;
  if (exponent == 0) return significand ? special : zero;
  return exponent == 0x7fff || !(significand >> 63) ? special : valid;
}

u16 tag_word(const FpuState& fpu) {
  const unsigned top = fpu.x87[status_at + 1] >> 3 & 7;
  u16 word = 0;
  for (unsigned n = 0; n < 8; ++n) {
    const u8* reg = fpu.x87 + x87_stack_offset + 16 * ((n - top) & 7);
    word |= u16((fpu.x87[tags_at] >> n & 1 ? tag_of(reg) : empty) << 2 * n);
  }
  return word;
}

/// A pointer as real mode has it: 32 or 20 bits in two fields, the upper one above 12 other bits.
u32 linear(u16 selector, u64 offset) { return u32(selector) * 16 + u32(offset); }

/// How many bits of FDP the host keeps.
u8 host_pointer_bits() {
  alignas(16) u8 before[512], image[512];
  __asm__ volatile("fxsave64 %0" : "=m"(before));
  u8 bits = 64;
  for (const u8 tried : {57, 48}) {
    std::memcpy(image, before, sizeof image);
    put<u16>(image + control_at, 0x37e);
    put<u16>(image + status_at, 0x8081);  // an exception waits, without which AMD's drop the pointers
    put<u64>(image + operand_at, 1ull << (tried - 1));
    __asm__ volatile("fxrstor64 %0\n\tfxsave64 %0\n\tfxrstor64 %1" : "+m"(image) : "m"(before));
    if (get<u64>(image + operand_at) == -(1ull << (tried - 1))) bits = tried;
  }
  return bits;
}

}  // namespace

const X87Behaviour& x87_behaviour() {
  static const X87Behaviour behaviour = [] {
    u32 a, b = 0, c, d;
    const bool amd = __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) b = 0;
    return X87Behaviour{.drops_pointers = amd,
                        .keeps_selectors = !(b >> 13 & 1),
                        .operand_if_fault = (b >> 6 & 1) != 0,
                        .opcode_if_fault = !amd,
                        .pointer_bits = host_pointer_bits()};
  }();
  return behaviour;
}

void note_x87_instruction(FpuState& fpu, const X87Instruction& last, bool fault) {
  const X87Behaviour& behaviour = x87_behaviour();
  put(fpu.x87 + instruction_at, last.rip);
  if (fault || !behaviour.opcode_if_fault) put(fpu.x87 + opcode_at, last.opcode);
  if (behaviour.keeps_selectors) fpu.x87_code_selector = last.code_selector;
  if (!last.has_operand || (!fault && behaviour.operand_if_fault)) return;
  put(fpu.x87 + operand_at, last.offset);
  if (behaviour.keeps_selectors) fpu.x87_data_selector = last.data_selector;
}

void store_x87_environment(const FpuState& fpu, X87Format format, u8* out) {
  const u16 words[] = {get<u16>(fpu.x87 + control_at), get<u16>(fpu.x87 + status_at), tag_word(fpu)};
  const u16 opcode = get<u16>(fpu.x87 + opcode_at) & 0x7ff;
  const u64 instruction = get<u64>(fpu.x87 + instruction_at), operand = get<u64>(fpu.x87 + operand_at);
  const u16 cs = fpu.x87_code_selector, ds = fpu.x87_data_selector;
  const u32 code = linear(cs, instruction), data = linear(ds, operand);
  if (!format.wide) {
    for (unsigned n = 0; n < 3; ++n) put(out + 2 * n, words[n]);
    const u16 pointers[] = {u16(format.protected_mode ? instruction : code),
                            u16(format.protected_mode ? cs : (code >> 16 & 15) << 12 | opcode),
                            u16(format.protected_mode ? operand : data),
                            u16(format.protected_mode ? ds : (data >> 16 & 15) << 12)};
    std::memcpy(out + 6, pointers, sizeof pointers);
    return;
  }
  for (unsigned n = 0; n < 3; ++n) put(out + 4 * n, 0xffff0000 | words[n]);
  u32 pointers[] = {u32(instruction), u32(opcode) << 16 | cs, u32(operand), 0xffff0000 | ds};
  if (!format.protected_mode) {
    pointers[0] = 0xffff0000 | (code & 0xffff), pointers[1] = code >> 16 << 12 | opcode;
    pointers[2] = 0xffff0000 | (data & 0xffff), pointers[3] = data >> 16 << 12;
  }
  std::memcpy(out + 12, pointers, sizeof pointers);
}

void load_x87_environment(FpuState& fpu, X87Format format, const u8* in) {
  const unsigned step = format.wide ? 4 : 2;
  put(fpu.x87 + control_at, get<u16>(in));
  put(fpu.x87 + status_at, get<u16>(in + step));
  const u16 tags = get<u16>(in + 2 * step);
  u8 used = 0;
  for (unsigned n = 0; n < 8; ++n) used |= u8(((tags >> 2 * n & 3) != empty) << n);
  fpu.x87[tags_at] = used;
  const auto field = [&](unsigned n) { return format.wide ? get<u32>(in + 12 + 4 * n) : get<u16>(in + 6 + 2 * n); };
  u16 opcode = 0, cs = 0, ds = 0;
  u32 instruction = field(0), operand = field(2);
  if (!format.protected_mode) {
    opcode = u16(field(1) & 0x7ff);
    instruction = (instruction & 0xffff) | field(1) >> 12 << 16;
    operand = (operand & 0xffff) | field(3) >> 12 << 16;
  } else {
    cs = u16(field(1)), ds = u16(field(3));
    if (format.wide) opcode = u16(field(1) >> 16 & 0x7ff);
  }
  const bool selectors = x87_behaviour().keeps_selectors;
  fpu.x87_code_selector = selectors ? cs : 0;
  fpu.x87_data_selector = selectors ? ds : 0;
  put(fpu.x87 + opcode_at, opcode);
  put(fpu.x87 + instruction_at, u64(instruction));
  put(fpu.x87 + operand_at, u64(operand));
  settle_x87_words(fpu);
}

void store_x87_registers(const FpuState& fpu, u8* out) {
  for (unsigned n = 0; n < 8; ++n) std::memcpy(out + 10 * n, fpu.x87 + x87_stack_offset + 16 * n, 10);
}

void load_x87_registers(FpuState& fpu, const u8* in) {
  for (unsigned n = 0; n < 8; ++n) std::memcpy(fpu.x87 + x87_stack_offset + 16 * n, in + 10 * n, 10);
}

}  // namespace anykvm::x86
