// The reference engine: fetch, find the decoded instruction, execute it, look around; one instruction at a time.
//
// Decoded instructions are cached by address, and every fetch compares the cached bytes with memory. So no store, by
// this CPU, another one or a device, can leave the cache stale: there is nothing to invalidate.

#include <emmintrin.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "engine/engine.h"
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"

namespace anykvm::engine {

using x86::ExitKind;
using x86::Privilege;

namespace {

constexpr unsigned cache_entries = 1u << 15;
/// How often at least immediate_exit is looked at, in instructions.
constexpr u64 poll_interval = 64;

struct Slot {
  Instruction instruction;
  u16 length_mask;  ///< one bit a byte of the instruction
};

unsigned slot_of(Gva address) { return unsigned(address ^ address >> 13) % cache_entries; }

void* map(std::size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return at;
}

/// The client's own x87 and SSE control words, which the guest's instructions replace.
class HostControlWords {
 public:
  HostControlWords() { __asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr_), "=m"(control_)); }
  void restore() const { __asm__ volatile("fninit\n\tfldcw %1\n\tldmxcsr %0" ::"m"(mxcsr_), "m"(control_)); }

 private:
  u32 mxcsr_;
  u16 control_;
};

class Interpreter final : public Engine {
 public:
  Interpreter()
      : slots_(static_cast<Slot*>(map(cache_entries * sizeof(Slot), PROT_READ | PROT_WRITE))),
        code_(static_cast<u8*>(map(cache_entries * native_code_bytes, PROT_READ | PROT_WRITE | PROT_EXEC))) {}
  ~Interpreter() override {
    munmap(slots_, cache_entries * sizeof(Slot));
    munmap(code_, cache_entries * native_code_bytes);
  }
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  void run(Cpu& cpu) override { execute<false>(cpu); }
  void step(Cpu& cpu) override { execute<true>(cpu); }
  const char* name() const override { return "interpret"; }

 private:
  template <bool single>
  void execute(Cpu& cpu);
  /// The instruction at RIP, or nullptr with a fault raised or an exit set.
  const Instruction* fetch(Cpu& cpu, Result& why_not);
  const Instruction* fetch_across_pages(Cpu& cpu, Gva gva, const u8* first_page, Slot& slot, u8* code, Result& why_not);
  static void complete(Cpu& cpu, u8 shadow_before, bool trap);
  static bool fault(Cpu& cpu, const Instruction* instruction);

  Slot* slots_;  ///< mapped, so that an unused cache costs no memory
  u8* code_;     ///< native code of the slot of the same number
};

void fill(Slot& slot) { slot.length_mask = u16((1u << slot.instruction.length) - 1); }

Result fetch_fails(Cpu& cpu, const char* reason) {
  cpu.exit.kind = ExitKind::internal_error;
  cpu.exit.reason = reason;
  return Result::exit;
}

const Instruction* Interpreter::fetch(Cpu& cpu, Result& why_not) {
  const x86::CpuState& s = cpu.state;
  Gva gva = s.rip;
  if (s.code_bits != 64) [[unlikely]] {
    if (s.rip > s.segment[x86::cs].limit) {
      why_not = cpu.gp();
      return nullptr;
    }
    gva = u32(gva + s.segment[x86::cs].base);
  }
  const Privilege privilege = s.cpl == 3 ? Privilege::user : cpu.system_privilege;
  const u8* code_at = cpu.mmu.lookup(gva, 1, Access::fetch, privilege);
  if (!code_at) [[unlikely]] {
    x86::Mmu::Translation page;
    why_not = cpu.mmu.translate(cpu, gva, Access::fetch, privilege, page);
    if (why_not != Result::ok) return nullptr;
    if (!page.host) {
      why_not = fetch_fails(cpu, "instruction fetch from outside RAM");
      return nullptr;
    }
    code_at = page.host;
  }
  const unsigned number = slot_of(gva);
  Slot& slot = slots_[number];
  u8* code = code_ + std::size_t(number) * native_code_bytes;
  if ((gva & ~page_mask) > page_size - 16) [[unlikely]]
    return fetch_across_pages(cpu, gva, code_at, slot, code, why_not);

  const __m128i now = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code_at));
  const __m128i then = _mm_load_si128(reinterpret_cast<const __m128i*>(slot.instruction.bytes));
  const unsigned same = unsigned(_mm_movemask_epi8(_mm_cmpeq_epi8(now, then)));
  if ((~same & slot.length_mask) == 0 && slot.instruction.code_bits == s.code_bits) [[likely]]
    return &slot.instruction;

  u8 bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), now);
  (void)decode(bytes, 15, s.code_bits, slot.instruction, {code, native_code_bytes});
  fill(slot);
  return &slot.instruction;
}

/// The last 15 bytes of a page: the instruction may continue on the next one, which is translated only if it does.
const Instruction* Interpreter::fetch_across_pages(Cpu& cpu, Gva gva, const u8* first_page, Slot& slot, u8* code,
                                                   Result& why_not) {
  u8 bytes[16] = {};
  const unsigned first = unsigned(page_size - (gva & ~page_mask));
  std::memcpy(bytes, first_page, first < 16 ? first : 16);
  const auto cached = [&](unsigned available) {
    return slot.instruction.code_bits == cpu.state.code_bits && slot.instruction.length <= available &&
           !std::memcmp(slot.instruction.bytes, bytes, slot.instruction.length);
  };
  if (cached(first)) return &slot.instruction;
  if (decode(bytes, first < 15 ? first : 15, cpu.state.code_bits, slot.instruction, {code, native_code_bytes}) ==
      DecodeStatus::needs_more) {
    slot.instruction.handler = nullptr;
    slot.instruction.code_bits = 0;
    const Privilege privilege = cpu.state.cpl == 3 ? Privilege::user : cpu.system_privilege;
    Gva next = gva + first;
    if (cpu.state.code_bits != 64) next = u32(next);
    x86::Mmu::Translation page;
    why_not = cpu.mmu.translate(cpu, next, Access::fetch, privilege, page);
    if (why_not != Result::ok) return nullptr;
    if (!page.host) {
      why_not = fetch_fails(cpu, "instruction fetch from outside RAM");
      return nullptr;
    }
    std::memcpy(bytes + first, page.host, 15 - first);
    (void)decode(bytes, 15, cpu.state.code_bits, slot.instruction, {code, native_code_bytes});
  }
  fill(slot);
  return &slot.instruction;
}

/// After an instruction behind which an interrupt shadow ends or a single-step trap is due.
void Interpreter::complete(Cpu& cpu, u8 shadow_before, bool trap) {
  if (shadow_before) {
    cpu.state.event.shadow &= u8(~shadow_before);
    cpu.machine.interrupt_window_changed();
  }
  if (trap && !(shadow_before & KVM_X86_SHADOW_INT_MOV_SS)) {
    cpu.fault = {.vector = x86::exception::db, .trap = true, .payload = 1u << 14};
    (void)cpu.deliver_fault();
  }
}

/// Delivers what the instruction raised. false: the engine must return.
bool Interpreter::fault(Cpu& cpu, const Instruction* instruction) {
  cpu.mmio.retire_instruction();
  const Result result = cpu.deliver_fault();
  if (result == Result::ok) return true;
  if (instruction && cpu.exit.kind == ExitKind::internal_error && !cpu.exit.byte_count) {
    cpu.exit.byte_count = instruction->length;
    std::memcpy(cpu.exit.bytes, instruction->bytes, instruction->length);
  }
  return false;
}

template <bool single>
void Interpreter::execute(Cpu& cpu) {
  // FXRSTOR takes MXCSR from the image, too: keep a harmless one there.
  static constexpr u32 masked_mxcsr = 0x1f80;
  std::memcpy(cpu.state.fpu.x87 + 24, &masked_mxcsr, sizeof masked_mxcsr);
  const HostControlWords host;
  Context context{.cpu = cpu, .next_rip = 0};
  cpu.exit = {};
  cpu.mmio.begin_instruction();

  for (;;) {
    if constexpr (!single) {
      if (cpu.attention.load(std::memory_order_relaxed) ||
          (cpu.instructions % poll_interval == 0 && *cpu.immediate_exit)) [[unlikely]] {
        cpu.exit.kind = ExitKind::attention;
        break;
      }
    }
    Result result = Result::ok;
    const Instruction* instruction = fetch(cpu, result);
    const u8 shadow = cpu.state.event.shadow;
    const bool trap = cpu.state.other_flags & x86::flag::tf;
    if (instruction) [[likely]] {
      context.next_rip = cpu.state.rip + instruction->length;
      if (cpu.state.code_bits != 64) context.next_rip = u32(context.next_rip);
      result = instruction->handler(context, *instruction);
    }
    if (result == Result::ok) [[likely]] {
      cpu.state.rip = context.next_rip;
      ++cpu.instructions;
      if (shadow | trap) [[unlikely]]
        complete(cpu, shadow, trap);
      if (cpu.mmio.touched()) [[unlikely]] {
        cpu.mmio.retire_instruction();
        if (cpu.mmio.has_writes() && cpu.exit.kind == ExitKind::none) cpu.exit.kind = ExitKind::mmio_write;
      }
      if (cpu.exit.kind != ExitKind::none) [[unlikely]]
        break;
    } else if (result == Result::fault) {
      if (!fault(cpu, instruction)) break;
    } else {
      if (instruction && cpu.exit.kind == ExitKind::internal_error) {
        cpu.exit.byte_count = instruction->length;
        std::memcpy(cpu.exit.bytes, instruction->bytes, instruction->length);
      }
      break;
    }
    if constexpr (single) break;
  }
  if (context.x87_touched) host.restore();
}

}  // namespace

std::unique_ptr<Engine> make_interpreter() { return std::make_unique<Interpreter>(); }

}  // namespace anykvm::engine
