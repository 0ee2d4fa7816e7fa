#include "engine/lockstep/difference.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "engine/interpret/handlers.h"

namespace anykvm::engine::lockstep {

using x86::CpuState;
using x86::FpuState;

namespace {

/// Code bytes at a guest address; returns how many.
unsigned fetch(x86::Cpu& cpu, Gva rip, u8 (&bytes)[15]) {
  if (cpu.state.code_bits != 64) rip = u32(rip + cpu.state.segment[x86::cs].base);
  unsigned have = 0;
  const x86::Fault fault = cpu.fault;
  const x86::Exit exit = cpu.exit;
  while (have < sizeof bytes) {
    x86::Mmu::Translation page;
    if (cpu.mmu.translate(cpu, rip + have, x86::Access::fetch, cpu.fetch_privilege(), page) != x86::Result::ok ||
        !page.host)
      break;
    const unsigned room = unsigned(page_size - ((rip + have) & ~page_mask));
    const unsigned length = std::min<unsigned>(room, sizeof bytes - have);
    std::memcpy(bytes + have, page.host, length);
    have += length;
  }
  cpu.fault = fault;
  cpu.exit = exit;
  return have;
}

bool decode(x86::Cpu& cpu, Gva rip, Decoded& d, u8 (&bytes)[15]) {
  const unsigned have = fetch(cpu, rip, bytes);
  return have && ZYAN_SUCCESS(decode_instruction(bytes, have, cpu.state.code_bits, d));
}

/// Follows the code for a few instructions, both ways at a branch.
u64 live_flags(x86::Cpu& cpu, Gva rip, u64 open, unsigned depth, unsigned& budget) {
  u64 live = 0;
  while (open) {
    Decoded d;
    u8 bytes[15];
    if (!budget || !decode(cpu, rip, d, bytes)) return live | open;
    --budget;
    const ZydisAccessedFlags* flags = d.instruction.cpu_flags;
    const auto category = d.instruction.meta.category;
    const Gva next = rip + d.instruction.length;
    if (flags) {
      live |= open & (flags->tested | flags->undefined);
      bool conditional = d.instruction.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPNE);
      for (unsigned n = 0; n < d.instruction.operand_count; ++n)
        if (d.is_register(n) && d.register_class(n) == ZYDIS_REGCLASS_FLAGS &&
            d.operands[n].actions & ZYDIS_OPERAND_ACTION_CONDWRITE)
          conditional = true;
      if (!conditional) open &= ~u64(flags->modified | flags->set_0 | flags->set_1 | flags->tested);
      open &= ~live;
    }
    if (category == ZYDIS_CATEGORY_COND_BR || category == ZYDIS_CATEGORY_UNCOND_BR) {
      if (!d.is_immediate(0) || !depth) return live | open;
      const Gva target = next + u64(d.operands[0].imm.value.s);
      if (category == ZYDIS_CATEGORY_COND_BR) live |= live_flags(cpu, target, open, depth - 1, budget);
      rip = category == ZYDIS_CATEGORY_COND_BR ? next : target;
      continue;
    }
    if (category == ZYDIS_CATEGORY_CALL || category == ZYDIS_CATEGORY_RET || category == ZYDIS_CATEGORY_SYSCALL ||
        category == ZYDIS_CATEGORY_SYSTEM || category == ZYDIS_CATEGORY_INTERRUPT || category == ZYDIS_CATEGORY_SYSRET)
      return live | open;
    rip = next;
  }
  return live;
}

/// Calls f(name, left, right, bytes) for what a guest can see beside general registers, RIP and flags.
template <class F>
void each_field(const CpuState& a, const CpuState& b, F f) {
  const auto field = [&](const char* name, const auto& left, const auto& right) {
    f(name, &left, &right, sizeof left);
  };
  field("cpl", a.cpl, b.cpl);
  field("code_bits", a.code_bits, b.code_bits);
  static const char* const segments[] = {"es", "cs", "ss", "ds", "fs", "gs"};
  for (unsigned n = 0; n < 6; ++n) {
    static_assert(sizeof(x86::Segment) == 24);  // no holes: may be compared as bytes
    field(segments[n], a.segment[n], b.segment[n]);
  }
  field("ldtr", a.ldtr, b.ldtr);
  field("tr", a.tr, b.tr);
  field("gdtr.base", a.gdtr.base, b.gdtr.base);
  field("idtr.base", a.idtr.base, b.idtr.base);
  field("cr0", a.cr0, b.cr0);
  field("cr2", a.cr2, b.cr2);
  field("cr3", a.cr3, b.cr3);
  field("cr4", a.cr4, b.cr4);
  field("xcr0", a.xcr0, b.xcr0);
  field("dr", a.dr, b.dr);
  field("dr6", a.dr6, b.dr6);
  field("dr7", a.dr7, b.dr7);
  field("kernel_gs_base", a.msr.kernel_gs_base, b.msr.kernel_gs_base);
  field("msr", a.msr, b.msr);
  // STI's is not kept by translated code where nothing waits for it to end.
  const u8 shadows[] = {u8(a.event.shadow & ~KVM_X86_SHADOW_INT_STI), u8(b.event.shadow & ~KVM_X86_SHADOW_INT_STI)};
  if (shadows[0] != shadows[1]) field("event.shadow", a.event.shadow, b.event.shadow);
  field("event.nmi_masked", a.event.nmi_masked, b.event.nmi_masked);
  field("mxcsr", a.fpu.mxcsr, b.fpu.mxcsr);
  field("pkru", a.fpu.pkru, b.fpu.pkru);
  field("opmask", a.fpu.opmask, b.fpu.opmask);
  // FXSAVE's control words and pointers, then ST0-7 without what lies between and behind.
  f("x87 control", a.fpu.x87, b.fpu.x87, std::size_t(24));
  for (unsigned n = 0; n < 8; ++n) {
    static const char* const st[] = {"st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7"};
    f(st[n], a.fpu.x87 + 32 + 16 * n, b.fpu.x87 + 32 + 16 * n, std::size_t(10));
  }
}

bool same_vectors(const FpuState& a, const FpuState& b) { return !std::memcmp(a.vector, b.vector, sizeof a.vector); }

void add_bytes(Text& text, const void* bytes, std::size_t count) {
  // Little-endian, most significant first, without leading zeros.
  const auto at = static_cast<const u8*>(bytes);
  while (count > 1 && !at[count - 1]) --count;
  for (std::size_t n = count; n-- > 0;) text.add("%02x", at[n]);
}

}  // namespace

u64 dead_flags(x86::Cpu& cpu) {
  unsigned budget = 24;
  return x86::flag::arithmetic & ~live_flags(cpu, cpu.state.rip, x86::flag::arithmetic, 6, budget);
}

bool same_state(const CpuState& left, const CpuState& right, u64 ignored_flags) {
  if (std::memcmp(left.gpr, right.gpr, sizeof left.gpr) || left.rip != right.rip) return false;
  if ((left.rflags() ^ right.rflags()) & ~ignored_flags) return false;
  bool same = same_vectors(left.fpu, right.fpu);
  each_field(left, right, [&](const char*, const void* a, const void* b, std::size_t bytes) {
    same = same && !std::memcmp(a, b, bytes);
  });
  return same;
}

void Text::add(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(text_ + used_, sizeof text_ - used_, format, arguments);
  va_end(arguments);
  if (length > 0) used_ = std::min(used_ + std::size_t(length), sizeof text_ - 1);
}

bool list_instruction(Text& text, x86::Cpu& cpu, Gva rip, const char* mark) {
  Decoded d;
  u8 bytes[15];
  if (!decode(cpu, rip, d, bytes)) {
    text.add("%3s %016llx  ??\n", mark, static_cast<unsigned long long>(rip));
    return false;
  }
  text.add("%3s %016llx  ", mark, static_cast<unsigned long long>(rip));
  for (unsigned n = 0; n < 15; ++n) {
    if (n < d.instruction.length)
      text.add("%02x", bytes[n]);
    else if (n < 10)
      text.add("  ");
  }
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  char words[128];
  if (!ZYAN_SUCCESS(ZydisFormatterFormatInstruction(&formatter, &d.instruction, d.operands,
                                                    d.instruction.operand_count_visible, words, sizeof words, rip,
                                                    ZYAN_NULL)))
    words[0] = 0;
  text.add("  %s\n", words);
  return true;
}

void list_registers(Text& text, const CpuState& before, const CpuState& reference, const CpuState& translator,
                    u64 ignored_flags) {
  static const char* const names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                      "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
  text.add("    %-8s %-16s  %-16s  %s\n", "", "before", "reference", "translator");
  const auto row = [&](const char* name, u64 was, u64 is, u64 translated, bool differs) {
    text.add("  %c %-8s %016llx  %016llx  %016llx\n", differs ? '*' : ' ', name, static_cast<unsigned long long>(was),
             static_cast<unsigned long long>(is), static_cast<unsigned long long>(translated));
  };
  for (unsigned n = 0; n < 16; ++n)
    row(names[n], before.gpr[n], reference.gpr[n], translator.gpr[n], reference.gpr[n] != translator.gpr[n]);
  row("rip", before.rip, reference.rip, translator.rip, reference.rip != translator.rip);
  const u64 flags = (reference.rflags() ^ translator.rflags()) & ~ignored_flags;
  row("rflags", before.rflags(), reference.rflags(), translator.rflags(), flags);
  const auto wide = [&](const char* name, const void* was, const void* is, const void* translated, std::size_t bytes) {
    text.add("  * %s\n      before     ", name);
    add_bytes(text, was, bytes);
    text.add("\n      reference  ");
    add_bytes(text, is, bytes);
    text.add("\n      translator ");
    add_bytes(text, translated, bytes);
    text.add("\n");
  };
  each_field(reference, translator, [&](const char* name, const void* is, const void* translated, std::size_t bytes) {
    if (!std::memcmp(is, translated, bytes)) return;
    const auto offset = static_cast<const u8*>(is) - reinterpret_cast<const u8*>(&reference);
    wide(name, reinterpret_cast<const u8*>(&before) + offset, is, translated, bytes > 64 ? 64 : bytes);
  });
  for (unsigned n = 0; n < 32; ++n) {
    if (!std::memcmp(reference.fpu.vector[n], translator.fpu.vector[n], 64)) continue;
    char name[8];
    std::snprintf(name, sizeof name, "zmm%u", n);
    wide(name, before.fpu.vector[n], reference.fpu.vector[n], translator.fpu.vector[n], 64);
  }
}

}  // namespace anykvm::engine::lockstep
