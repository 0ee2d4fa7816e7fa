// The guest's x87 registers on their way out of the host's unit. (On their way in: fill.cpp.)
//
// From load_x87() until save_x87() the unit holds them, whatever code runs: this library's own uses neither x87 nor
// MMX, and a signal handler gets a unit of its own from the kernel. An unmasked exception may wait in the unit
// meanwhile; only a guest's instruction can meet it. The unit's own pointers to its last instruction are the host's and
// may get lost at any time (AMD's XSAVE drops them), so that translated code notes what they would be.
#include <ucontext.h>

#include <cstring>
#include <utility>

#include "engine/translate/translator.h"
#include "x86/x87_environment.h"
#include "x86/xsave_parts.h"

namespace anykvm::engine::translate {

bool can_keep_x87() {
  static const bool has_xsave = (x86::xsave_layout().supported & ~(x86::xfeature::x87 | x86::xfeature::sse)) != 0;
  return has_xsave;
}

void Translator::save_x87() {
  if (context_->x87_missing) return;
  __asm__ volatile("xsave64 %0" : "+m"(context_->x87_image) : "a"(u32(x86::xfeature::x87)), "d"(0));
  take_x87(context_->x87_image.legacy);
}

void Translator::take_x87(const u8* image) {
  x86::CpuState& s = cpu_->state;
  constexpr unsigned words = 6;  // control, status, tags; the pointers lie behind them
  std::memcpy(s.fpu.x87, image, words);
  std::memcpy(s.fpu.x87 + x86::x87_stack_offset, image + x86::x87_stack_offset, x86::x87_stack_size);
  note_x87_pointers(x87_exception_waits(s.fpu));
  context_->x87_missing = 1;
}

void Translator::note_x87_pointers(bool exception_waits) {
  x86::CpuState& s = cpu_->state;
  const u32 last = std::exchange(context_->x87_last, 0);
  if (!last) return;
  const u32 segment = std::exchange(context_->x87_operand_segment, 0);
  const bool has_operand = segment && (X87Last::has_operand(last) || !x86::x87_behaviour().operand_if_fault);
  note_x87_instruction(s.fpu,
                       {.opcode = u16(X87Last::opcode(last)),
                        .code_selector = s.segment[x86::cs].selector,
                        .rip = context_->x87_page + X87Last::offset(last),
                        .has_operand = has_operand,
                        .data_selector = has_operand ? s.segment[segment - 1].selector : u16(0),
                        .offset = context_->x87_operand},
                       !context_->x87_settled && exception_waits);
}

void Translator::settle_x87_pointers() {
  if (context_->x87_missing || !context_->x87_last) return;
  u16 status;
  __asm__ volatile("fnstsw %0" : "=m"(status));
  note_x87_pointers(status & 0x80);
}

void Translator::rescue_x87(const void* ucontext) {
  if (context_->x87_missing) return;
  take_x87(reinterpret_cast<const u8*>(static_cast<const ucontext_t*>(ucontext)->uc_mcontext.fpregs));
}

}  // namespace anykvm::engine::translate
