// The reference engine: fetch, find the decoded instruction, execute it, look around; one instruction at a time.
//
// Decoded instructions are cached by address, and every fetch compares the cached bytes with memory. So no store, by
// this CPU, another one or a device, can leave the cache stale: there is nothing to invalidate.

#include <emmintrin.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "engine/engine.h"
#include "engine/interpret/handlers.h"
#include "engine/interpret/operands.h"
#include "engine/interpret/reference.h"
#include "os/fault_guard.h"
#include "x86/debug.h"

namespace anykvm::engine {

using x86::ExitKind;
using x86::Privilege;

namespace {

constexpr unsigned cache_entries = 1u << 15;
constexpr std::size_t code_bytes = std::size_t(cache_entries) * native_code_bytes;
constexpr u64 longest_instruction = 15;
/// How often at least immediate_exit is looked at, in instructions.
constexpr u64 poll_interval = 64;

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

enum class Way { run, stretch, step, rehearse };

class Interpreter final : public Reference {
 public:
  Interpreter()
      : slots_(static_cast<Instruction*>(map(cache_entries * sizeof(Instruction), PROT_READ | PROT_WRITE))),
        code_(static_cast<u8*>(map(code_bytes, PROT_READ | PROT_WRITE | PROT_EXEC))) {}
  ~Interpreter() override {
    munmap(slots_, cache_entries * sizeof(Instruction));
    munmap(code_, code_bytes);
  }
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  void run(Cpu& cpu) override { (void)execute<Way::run>(cpu); }
  void step(Cpu& cpu) override { (void)execute<Way::step>(cpu); }
  Rehearsed rehearse(Cpu& cpu, std::span<Boundary> boundaries, u32 enough) override {
    return execute<Way::rehearse>(cpu, boundaries, enough);
  }
  u64 run_stretch(Cpu& cpu) override {
    const u64 before = cpu.instructions;
    (void)execute<Way::stretch>(cpu);
    return cpu.instructions - before;
  }
  const char* name() const override { return "interpret"; }

 private:
  template <Way way>
  Rehearsed execute(Cpu& cpu, std::span<Boundary> boundaries = {}, u32 enough = 0);
  /// The instruction at RIP, or nullptr with a fault raised or an exit set.
  const Instruction* fetch(Cpu& cpu, Result& why_not);
  const Instruction* fetch_slowly(Cpu& cpu, Result& why_not);
  static bool is_cached(const Instruction& slot, const u8* code_at);
  static const u8* code_page(Cpu& cpu, Gva gva, Result& why_not);
  static bool begin_closely(Context& context, Result& why_not);
  static void complete(Context& context, const Instruction& instruction, u64 flags, u8 shadow);
  static bool fault(Cpu& cpu, const Instruction* instruction);
  /// In a signal handler: lets native code in which the host raised an exception return, and says which.
  struct Recovery {
    const Interpreter& engine;
    Context& context;
  };
  static bool recover(void* recovery, void* ucontext);

  Instruction* slots_;  ///< mapped, so that an unused cache costs no memory
  u8* code_;            ///< native code of the slot of the same number
  ProbePages probe_pages_;
};

/// The common case, small enough to be part of the loop: code on a page that the TLB has, already decoded.
inline const Instruction* Interpreter::fetch(Cpu& cpu, Result& why_not) {
  const x86::CpuState& s = cpu.state;
  Gva gva = s.rip;
  if (s.code_bits != 64) {
    const x86::Segment& code = s.segment[x86::cs];
    if (gva > code.limit || code.limit - gva < longest_instruction - 1) [[unlikely]]
      return fetch_slowly(cpu, why_not);
    gva = u32(gva + code.base);
  }
  if ((gva & ~page_mask) <= page_size - 16) [[likely]] {
    if (const u8* code_at = cpu.mmu.lookup(gva, 1, Access::fetch, cpu.fetch_privilege())) [[likely]] {
      const Instruction& slot = slots_[slot_of(gva)];
      if (slot.code_bits == s.code_bits && is_cached(slot, code_at)) [[likely]]
        return &slot;
    }
  }
  return fetch_slowly(cpu, why_not);
}

inline bool Interpreter::is_cached(const Instruction& slot, const u8* code_at) {
  const __m128i now = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code_at));
  const __m128i then = _mm_load_si128(reinterpret_cast<const __m128i*>(slot.bytes));
  const unsigned same = unsigned(_mm_movemask_epi8(_mm_cmpeq_epi8(now, then)));
  return (~same & slot.length_mask()) == 0;
}

/// The bytes of RAM that an instruction at gva begins with; nullptr with why_not set.
const u8* Interpreter::code_page(Cpu& cpu, Gva gva, Result& why_not) {
  x86::Mmu::Translation page;
  why_not = cpu.mmu.translate(cpu, gva, Access::fetch, cpu.fetch_privilege(), page);
  if (why_not == Result::ok && !page.host) {
    why_not = cpu.give_up("instruction fetch from outside RAM");
  }
  return why_not == Result::ok ? page.host : nullptr;
}

const Instruction* Interpreter::fetch_slowly(Cpu& cpu, Result& why_not) {
  const x86::CpuState& s = cpu.state;
  Gva gva = s.rip;
  u64 room = longest_instruction;  // up to the end of the code segment
  const auto behind_limit = [&]() -> const Instruction* {
    why_not = cpu.gp();
    return nullptr;
  };
  if (s.code_bits != 64) {
    const u32 limit = s.segment[x86::cs].limit;
    if (s.rip > limit) return behind_limit();
    room = std::min<u64>(room, limit - s.rip + 1);
    gva = u32(gva + s.segment[x86::cs].base);
  }
  const auto found = [&](const Instruction& instruction) {
    return instruction.length > room && instruction.handler != undefined ? behind_limit() : &instruction;
  };
  const u8* code_at = code_page(cpu, gva, why_not);
  if (!code_at) return nullptr;
  const unsigned number = slot_of(gva);
  Instruction& slot = slots_[number];
  const std::span<u8> native{code_ + std::size_t(number) * native_code_bytes, native_code_bytes};

  u8 bytes[16] = {};
  const unsigned first = unsigned(std::min<u64>(page_size - (gva & ~page_mask), 15));  // on this page
  std::memcpy(bytes, code_at, first);
  const bool begins_alike =
      slot.code_bits == s.code_bits && !std::memcmp(slot.bytes, bytes, std::min<unsigned>(slot.length, first));
  if (begins_alike && slot.length <= first) return found(slot);
  if (!begins_alike && decode(bytes, first, s.code_bits, slot, native) == DecodeStatus::ok) return found(slot);
  if (first >= room) return behind_limit();

  // It continues on the next page, which only now may fault.
  const Gva next = s.code_bits == 64 ? gva + first : u32(gva + first);
  const u8* rest = code_page(cpu, next, why_not);
  if (!rest) return nullptr;
  std::memcpy(bytes + first, rest, 15 - first);
  if (!begins_alike || std::memcmp(slot.bytes, bytes, slot.length)) (void)decode(bytes, 15, s.code_bits, slot, native);
  return found(slot);
}

/// Before an instruction that TF, RF, an interrupt shadow, a breakpoint or the client's debugging has us watch. false:
/// it does not run.
bool Interpreter::begin_closely(Context& context, Result& why_not) {
  Cpu& cpu = context.cpu;
  // RF alone has nothing to watch for between two iterations: a fault's IRET sets it, with most of a page still to go.
  context.one_iteration = cpu.state.other_flags & x86::flag::tf || cpu.state.event.shadow || cpu.debug_watch;
  context.no_step = false;
  context.start_rip = cpu.state.rip;
  if (cpu.state.other_flags & x86::flag::rf)
    cpu.state.other_flags &= ~x86::flag::rf;  // IRET may set it again
  else if (cpu.debug_watch & x86::watch_code && !(cpu.state.event.shadow & KVM_X86_SHADOW_INT_MOV_SS))
    why_not = cpu.check_code_breakpoint();
  return why_not == Result::ok;
}

/// Behind such an instruction. flags and shadow are those before it.
void Interpreter::complete(Context& context, const Instruction& instruction, u64 flags, u8 shadow) {
  Cpu& cpu = context.cpu;
  x86::CpuState& s = cpu.state;
  context.one_iteration = false;
  const bool repeats = instruction.repeat != Repeat::none && s.rip == context.start_rip;
  const bool branched = !repeats && s.rip != context.start_rip + instruction.length;
  // Between two iterations RF keeps the instruction's own breakpoint from being met again.
  if (repeats && (flags & x86::flag::rf || cpu.debug_watch & x86::watch_code)) s.other_flags |= x86::flag::rf;
  if (shadow) {
    s.event.shadow &= u8(~shadow);
    cpu.machine.interrupt_window_changed();
  }
  if (s.event.shadow & KVM_X86_SHADOW_INT_MOV_SS) return;  // a step is lost, data breakpoints wait
  u64 dr6 = cpu.debug_hits;
  cpu.debug_hits = 0;
  if (flags & x86::flag::tf && !context.no_step && (!(s.msr.debugctl & x86::debugctl_btf) || branched))
    dr6 |= x86::dr6_bs;
  cpu.debug_trap(dr6, cpu.debug_watch & x86::watch_steps);
}

/// Delivers what the instruction raised. false: the engine must return.
bool Interpreter::fault(Cpu& cpu, const Instruction* instruction) {
  cpu.mmio.retire_instruction();
  const bool clients = cpu.fault.vector == x86::exception::db && cpu.client_takes_debug();
  const Result result = clients ? cpu.debug_exit(x86::exception::db, cpu.fault.payload) : cpu.deliver_fault();
  if (result == Result::ok) return true;
  if (instruction && cpu.exit.kind == ExitKind::internal_error && !cpu.exit.byte_count) {
    cpu.exit.byte_count = instruction->length;
    std::memcpy(cpu.exit.bytes, instruction->bytes, instruction->length);
  }
  return false;
}

bool Interpreter::recover(void* recovery, void* ucontext) {
  const auto [engine, context] = *static_cast<Recovery*>(recovery);
  mcontext_t& machine = static_cast<ucontext_t*>(ucontext)->uc_mcontext;
  const auto at = reinterpret_cast<const u8*>(machine.gregs[REG_RIP]);
  if (at < engine.code_ || at >= engine.code_ + code_bytes) return false;
  const u8 vector = u8(machine.gregs[REG_TRAPNO]);
  if (vector == x86::exception::pf) return false;  // the memory behind guest RAM: for whoever guards that
  if (vector == x86::exception::xm) context.cpu.state.fpu.mxcsr = machine.fpregs->mxcsr;
  std::memcpy(context.x87_at_exception, machine.fpregs, sizeof context.x87_at_exception);
  context.host_exception = vector;
  const u8* const code = engine.code_ + std::size_t(at - engine.code_) / native_code_bytes * native_code_bytes;
  machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(way_out(code));
  return true;
}

template <Way way>
Reference::Rehearsed Interpreter::execute(Cpu& cpu, std::span<Boundary> boundaries, u32 enough) {
  // FXRSTOR takes MXCSR from the image, too: keep a harmless one there.
  static constexpr u32 masked_mxcsr = 0x1f80;
  std::memcpy(cpu.state.fpu.x87 + 24, &masked_mxcsr, sizeof masked_mxcsr);
  const HostControlWords host;
  Context context(cpu, probe_pages_);
  Recovery recovery{*this, context};
  const os::FaultRecovery recovers(&recover, &recovery);
  Rehearsed rehearsed{.count = 0, .clean = true};
  cpu.exit = {};
  cpu.mmio.begin_instruction();
  if (cpu.debug_exit_pending) [[unlikely]] {  // behind an instruction whose port or device the client has served
    if constexpr (way == Way::rehearse) return rehearsed;
    cpu.debug_exit_pending = false;
    (void)cpu.debug_exit(x86::exception::db, cpu.debug_exit_dr6);
    return rehearsed;
  }

  [[maybe_unused]] const u8 code_bits = cpu.state.code_bits;
  for (u64 passes = 0;; ++passes) {
    if constexpr (way == Way::stretch) {
      if (cpu.attention.load(std::memory_order_relaxed) || passes == poll_interval || cpu.state.code_bits != code_bits)
        break;
    }
    if constexpr (way == Way::run) {
      if (cpu.attention.load(std::memory_order_relaxed) ||
          (cpu.instructions % poll_interval == 0 && __atomic_load_n(cpu.immediate_exit, __ATOMIC_RELAXED)))
          [[unlikely]] {
        cpu.exit.kind = ExitKind::attention;
        break;
      }
    }
    Result result = Result::ok;
    const u8 shadow = cpu.state.event.shadow;
    const u64 flags = cpu.state.other_flags & (x86::flag::tf | x86::flag::rf);
    const bool closely = flags | shadow | cpu.debug_watch;
    if constexpr (way == Way::rehearse) {
      if (rehearsed.count == boundaries.size() || flags | cpu.debug_watch) break;
    }
    const Instruction* instruction = nullptr;
    if (!closely || begin_closely(context, result)) [[likely]]
      instruction = fetch(cpu, result);
    if constexpr (way == Way::rehearse) {
      if (!instruction || !instruction->repeatable) break;
      if (instruction->repeat != Repeat::none && cpu.state.gpr[x86::rcx] > Reference::most_elements) break;
    }
    const u64 rip = cpu.state.rip;
    if (instruction) [[likely]] {
      context.next_rip = rip + instruction->length;
      if (cpu.state.code_bits != 64) context.next_rip = u32(context.next_rip);
      result = instruction->handler(context, *instruction);
    }
    if constexpr (way == Way::rehearse) {
      if (result != Result::ok || cpu.exit.kind != ExitKind::none) {
        // Elements of a REP, or an event that could not be delivered, are behind us.
        const bool device = result == Result::exit && cpu.exit.kind == ExitKind::attention;
        rehearsed.clean = (result == Result::fault || device) && instruction->repeat == Repeat::none;
        break;
      }
    }
    if (result == Result::ok) [[likely]] {
      cpu.state.rip = context.next_rip;
      ++cpu.instructions;
      if (closely) [[unlikely]]
        complete(context, *instruction, flags, shadow);
      if (cpu.mmio.touched()) [[unlikely]] {
        cpu.mmio.retire_instruction();
        if (cpu.mmio.has_writes() && cpu.exit.kind == ExitKind::none) cpu.exit.kind = ExitKind::mmio_write;
      }
      if constexpr (way == Way::rehearse) {
        if (cpu.state.rip == rip && instruction->repeat != Repeat::none) continue;
        const bool back = cpu.state.rip <= rip;
        boundaries[rehearsed.count++] = boundary_of(cpu, back);
        if ((back && rehearsed.count >= enough) || end_rehearsal) break;
      }
      if (cpu.exit.kind != ExitKind::none) [[unlikely]]
        break;
    } else if (result == Result::fault) {
      if (!fault(cpu, instruction)) break;
    } else {
      cpu.state.other_flags |= flags & x86::flag::rf;  // it starts again
      if (instruction && cpu.exit.kind == ExitKind::internal_error) {
        cpu.exit.byte_count = instruction->length;
        std::memcpy(cpu.exit.bytes, instruction->bytes, instruction->length);
      }
      break;
    }
    if constexpr (way == Way::step) break;
  }
  if (context.x87_touched) host.restore();
  return rehearsed;
}

}  // namespace

std::unique_ptr<Engine> make_interpreter() { return std::make_unique<Interpreter>(); }
std::unique_ptr<Reference> make_reference() { return std::make_unique<Interpreter>(); }

}  // namespace anykvm::engine
