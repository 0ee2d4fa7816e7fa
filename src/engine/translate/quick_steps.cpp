// Steps that kernels take so often that the way through the reference engine's loop costs more than they do. Each does
// what the reference engine's handler does where nothing faults; where something does, it has done nothing, or some
// elements of a REP, and the reference engine executes the instruction.
#include <algorithm>

#include "engine/translate/translator.h"

namespace anykvm::engine::translate {

using x86::Access, x86::Result;
using x86::rcx, x86::rdi, x86::rsi, x86::rax;

/// STOS or MOVS, upwards: a stretch for each page with the host's own REP.
template <unsigned bytes, bool moves>
bool Translator::store_string(u64 next, bool repeats) {
  x86::CpuState& s = cpu_->state;
  if (s.other_flags & x86::flag::df) return false;
  u64* const gpr = s.gpr;
  const auto elements_in_page = [](Gva address) { return (page_size - (address & ~page_mask)) / bytes; };
  u64 left = repeats ? gpr[rcx] : 1;
  while (left) {
    u64 count = std::min<u64>(left, elements_in_page(gpr[rdi]));
    if (moves) count = std::min<u64>(count, elements_in_page(gpr[rsi]));
    if (!count) return false;  // an element lies in two pages
    const auto length = unsigned(count * bytes);
    u8* to = cpu_->mmu.find(gpr[rdi], length, Access::write, cpu_->data_privilege);
    const u8* from = moves && to ? cpu_->mmu.find(gpr[rsi], length, Access::read, cpu_->data_privilege) : nullptr;
    if (moves ? !from : !to) return false;
    u64 n = count;
    if constexpr (moves) {
      switch (bytes) {
        case 1: __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(n)::"memory"); break;
        case 2: __asm__ volatile("rep movsw" : "+S"(from), "+D"(to), "+c"(n)::"memory"); break;
        case 4: __asm__ volatile("rep movsl" : "+S"(from), "+D"(to), "+c"(n)::"memory"); break;
        default: __asm__ volatile("rep movsq" : "+S"(from), "+D"(to), "+c"(n)::"memory"); break;
      }
      gpr[rsi] += length;
    } else {
      switch (bytes) {
        case 1: __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(gpr[rax]) : "memory"); break;
        case 2: __asm__ volatile("rep stosw" : "+D"(to), "+c"(n) : "a"(gpr[rax]) : "memory"); break;
        case 4: __asm__ volatile("rep stosl" : "+D"(to), "+c"(n) : "a"(gpr[rax]) : "memory"); break;
        default: __asm__ volatile("rep stosq" : "+D"(to), "+c"(n) : "a"(gpr[rax]) : "memory"); break;
      }
    }
    gpr[rdi] += length;
    if (mode_.narrow) gpr[rsi] = u32(gpr[rsi]), gpr[rdi] = u32(gpr[rdi]);
    left -= count;
    if (repeats) gpr[rcx] = left;
    if (left && (context_->attention->load(std::memory_order_relaxed) ||
                 __atomic_load_n(cpu_->immediate_exit, __ATOMIC_RELAXED)))
      return true;  // RIP stays
  }
  s.rip = next;
  return true;
}

bool Translator::quick_step(u64 request) {
  u64 next = context_->page_base + StepRequest::next(request);
  if (mode_.narrow) next = u32(next);
  const bool repeats = StepRequest::repeats(request);
  bool done = false;
  switch (StepRequest::mnemonic(request)) {
    case ZYDIS_MNEMONIC_SYSCALL: done = cpu_->syscall(next) == Result::ok; break;
    case ZYDIS_MNEMONIC_SYSRET: done = cpu_->sysret(8) == Result::ok; break;
    case ZYDIS_MNEMONIC_IRETD: done = cpu_->iret(4, next) == Result::ok; break;
    case ZYDIS_MNEMONIC_IRETQ: done = cpu_->iret(8, next) == Result::ok; break;
    case ZYDIS_MNEMONIC_MOVSB: done = store_string<1, true>(next, repeats); break;
    case ZYDIS_MNEMONIC_MOVSW: done = store_string<2, true>(next, repeats); break;
    case ZYDIS_MNEMONIC_MOVSD: done = store_string<4, true>(next, repeats); break;
    case ZYDIS_MNEMONIC_MOVSQ: done = store_string<8, true>(next, repeats); break;
    case ZYDIS_MNEMONIC_STOSB: done = store_string<1, false>(next, repeats); break;
    case ZYDIS_MNEMONIC_STOSW: done = store_string<2, false>(next, repeats); break;
    case ZYDIS_MNEMONIC_STOSD: done = store_string<4, false>(next, repeats); break;
    case ZYDIS_MNEMONIC_STOSQ: done = store_string<8, false>(next, repeats); break;
    default: break;
  }
  if (!done) return false;
  ++cpu_->instructions;
  return true;
}

}  // namespace anykvm::engine::translate
