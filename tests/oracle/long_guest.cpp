#include "oracle/long_guest.h"

#include <cstdio>
#include <cstring>

#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

namespace {

constexpr Field log_fields[] = {
    {"rax", 0x08, 8},
    {"rcx", 0x10, 8},
    {"rdx", 0x18, 8},
    {"rbx", 0x20, 8},
    {"rbp", 0x28, 8},
    {"rsi", 0x30, 8},
    {"rdi", 0x38, 8},
    {"r8-r15", 0x40, 8, 8},
    {"vector", LONG_LOG_VECTOR, 8},
    {"frame", LONG_LOG_FRAME, 8, 8},
    {"rsp", LONG_LOG_RSP, 8},
    {"cr0", 0xd0, 8},
    {"cr2", 0xd8, 8},
    {"cr3", 0xe0, 8},
    {"cr4", 0xe8, 8},
    {"cr8", 0xf0, 8},
    {"dr7", 0xf8, 8},
    {"dr6", 0x100, 8},
    {"dr", 0x108, 8, 4},
    {"efer", LONG_LOG_MSRS, 8},
    {"fs.base", LONG_LOG_MSRS + 8, 8},
    {"gs.base", LONG_LOG_MSRS + 0x10, 8},
    {"kernel_gs", LONG_LOG_MSRS + 0x18, 8},
    {"star", LONG_LOG_MSRS + 0x20, 8},
    {"lstar", LONG_LOG_MSRS + 0x28, 8},
    {"sfmask", LONG_LOG_MSRS + 0x30, 8},
    {"sysenter", LONG_LOG_MSRS + 0x38, 8, 3},
    {"ds", LONG_LOG_SEGMENTS, 8},
    {"es", LONG_LOG_SEGMENTS + 0x8, 8},
    {"fs", LONG_LOG_SEGMENTS + 0x10, 8},
    {"gs", LONG_LOG_SEGMENTS + 0x18, 8},
    {"tr", LONG_LOG_SEGMENTS + 0x20, 8},
    {"ldtr", LONG_LOG_SEGMENTS + 0x28, 8},
    {"gdtr", LONG_LOG_SEGMENTS + 0x30, 8, 2},
    {"idtr", LONG_LOG_SEGMENTS + 0x40, 8, 2},
    {"pkru", LONG_LOG_SEGMENTS + 0x50, 8},
    {"gdt", LONG_LOG_COPIES, 4, 96},
    {"ldt", LONG_LOG_COPIES + 0x180, 4, 8},
    {"pml5", LONG_LOG_COPIES + 0x1a0, 8, 2},
    {"pml4", LONG_LOG_COPIES + 0x1b0, 8, 2},
    {"pdpte", LONG_LOG_COPIES + 0x1c0, 8, 4},
    {"pde", LONG_LOG_COPIES + 0x1e0, 8, 4},
    {"pte", LONG_LOG_COPIES + 0x200, 8, 12},
    {"low pte", LONG_LOG_COPIES + 0x260, 8, 10},
    {"page", LONG_LOG_COPIES + 0x2b0, 8, 8},
    {"user stack", LONG_LOG_COPIES + 0x2f0, 8, 16},
    {"rsp0 stack", LONG_LOG_COPIES + 0x370, 8, 8},
    {"ist3 stack", LONG_LOG_COPIES + 0x3b0, 8, 8},
};

/// The CPUID of QEMU's "max" as far as our CPU looks at it.
std::vector<kvm_cpuid_entry2> like_qemus(bool intel) {
  std::vector<kvm_cpuid_entry2> entries(x86::supported_cpuid().begin(), x86::supported_cpuid().end());
  for (kvm_cpuid_entry2& e : entries) {
    if (e.function == 0 || e.function == 0x80000000) {
      const char* name = intel ? "GenuntelineI" : "AuthcAMDenti";  // EBX, ECX, EDX
      std::memcpy(&e.ebx, name, 4), std::memcpy(&e.ecx, name + 4, 4), std::memcpy(&e.edx, name + 8, 4);
    }
    if (e.function == 7 && e.index == 0) e.ecx |= 1u << 3 | 1u << 16;  // PKU, LA57
    if (e.function == 0x80000008) e.eax = (e.eax & ~0xffffu) | 57 << 8 | 40;
  }
  return entries;
}

}  // namespace

LongGuest::LongGuest(u64 seed, unsigned count, Subject subject)
    : Guest({.tests = LONG_TESTS,
             .test_size = LONG_TEST_SIZE,
             .code = LONG_TEST_CODE,
             .code_size = LONG_TEST_CODE_SIZE,
             .counts = {LONG_TEST_PATCHES, LONG_TEST_MSRS},
             .vector = LONG_LOG_VECTOR,
             .frame = LONG_LOG_FRAME,
             .word = 8}) {
  const bool five_levels = seed & 1, intel = seed & 2;
  LongGenerator generator(seed, subject, five_levels, intel);
  for (unsigned i = 0; i < count; ++i) generator.add_test(i);
  image = generator.take();
  tests = count;
  log = LONG_LOG;
  log_size = LONG_LOG_SIZE;
  fields = log_fields;
  cpuid = like_qemus(intel);
  if (intel) qemu_cpu = "max,vendor=GenuineIntel";
}

u64 LongGuest::offset_in_code(u64 cs, u64 rip) const {
  if ((cs & ~7ull) == (code16_r3 & ~7)) rip += 0x10000;
  return rip - (rip >= LONG_SUPER_CODE ? LONG_SUPER_CODE : LONG_USER_CODE);
}

u64 LongGuest::descriptor(const Memory& memory, unsigned test, u64 selector) const {
  const bool local = selector & 4;
  if (selector > (local ? 0x1fu : unsigned(LONG_GDT_LIMIT))) return 0;
  return get<u64>(memory, log + u64(test) * log_size + LONG_LOG_COPIES + (local ? 0x180 : 0) + (selector & ~7ull));
}

std::string LongGuest::describe(unsigned test) const {
  const u64 at = LONG_TESTS + test * LONG_TEST_SIZE;
  const auto word = [&](u32 offset) { return (unsigned long long)get<u64>(image, at + offset); };
  char line[200];
  std::snprintf(line, sizeof line, "  cs %llx rip %llx rflags %llx ss %llx rsp %llx cr0 %llx cr4 %llx pkru %llx\n",
                word(LONG_TEST_FRAME + 8), word(LONG_TEST_FRAME), word(LONG_TEST_FRAME + 16),
                word(LONG_TEST_FRAME + 32), word(LONG_TEST_FRAME + 24), word(LONG_TEST_CR0), word(LONG_TEST_CR4),
                word(LONG_TEST_PKRU));
  std::string text = line;
  std::snprintf(line, sizeof line, "  ds %llx es %llx fs %llx gs %llx dr7 %llx dr0-3 %llx %llx %llx %llx, %s\n",
                word(LONG_TEST_SEGMENTS), word(LONG_TEST_SEGMENTS + 8), word(LONG_TEST_SEGMENTS + 16),
                word(LONG_TEST_SEGMENTS + 24), word(LONG_TEST_DR7), word(LONG_TEST_DR), word(LONG_TEST_DR + 8),
                word(LONG_TEST_DR + 16), word(LONG_TEST_DR + 24), qemu_cpu.c_str());
  text += line;
  const u64 cs = word(LONG_TEST_FRAME + 8);
  const unsigned bits = cs == code16_r3 ? 16 : cs == code32_r3 || cs == code32_r0 ? 32 : 64;
  text += disassemble(std::span(image).subspan(at + LONG_TEST_CODE, 0x80), word(LONG_TEST_FRAME), bits);
  text += "  data behind the code:";
  for (unsigned i = 0; i < 10; ++i) {
    std::snprintf(line, sizeof line, " %llx", word(LONG_TEST_CODE + 0xb0 + 8 * i));
    text += line;
  }
  text += "\n";
  for (unsigned i = 0; i < word(LONG_TEST_MSRS); ++i) {
    std::snprintf(line, sizeof line, "  msr %llx: %llx\n", word(LONG_TEST_MSRS + 8 + 16 * i),
                  word(LONG_TEST_MSRS + 16 + 16 * i));
    text += line;
  }
  for (unsigned i = 0; i < word(LONG_TEST_PATCHES); ++i) {
    std::snprintf(line, sizeof line, "  patch %llx: %016llx\n", word(LONG_TEST_PATCHES + 8 + 16 * i),
                  word(LONG_TEST_PATCHES + 16 + 16 * i));
    text += line;
  }
  return text;
}

}  // namespace anykvm::oracle
