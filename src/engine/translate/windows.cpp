// Windows: accesses of one block that lie near each other are checked together, with one look into the TLB.
//
// Compilers reach the stack and the members of an object at fixed distances from a register. As long as that register
// changes by known amounts only, one check of the whole range serves all of them; each access then costs one load, of
// the difference between the host's addresses and the guest's. The check stands where the flags are dead, when there
// is such a place between the register's last other change and the first access.
//
// Where the range cannot be had as a whole (it crosses pages, or one of the accesses is not allowed, or is a device's),
// the block is left for one whose accesses are checked singly: that one finds out which instruction faults.
#include <algorithm>

#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

namespace {

/// The wider a window, the more often it crosses pages.
constexpr s32 widest = 192;

struct Access {
  int base = -1;  ///< guest register; -1: none that a window could have
  s32 displacement = 0;
  unsigned size = 0;
  bool write = false;
};

Access operand_access(const Guest& g) {
  switch (g.what.kind) {
    case Kind::leave: return {.base = x86::rbp, .size = 8};
    case Kind::native:
    case Kind::push_memory:
    case Kind::jump_indirect:
    case Kind::call_indirect: break;
    default: return {};
  }
  const ZydisDecodedOperand* const operand = memory_operand(g);
  if (!operand || operand->mem.index != ZYDIS_REGISTER_NONE || operand->mem.base == ZYDIS_REGISTER_NONE ||
      operand->mem.base == ZYDIS_REGISTER_RIP || operand->mem.segment == ZYDIS_REGISTER_FS ||
      operand->mem.segment == ZYDIS_REGISTER_GS)
    return {};
  const int base = ZydisRegisterGetId(operand->mem.base);
  if (in_context(unsigned(base))) return {};
  return {.base = base,
          .displacement = s32(operand->mem.disp.value),
          .size = operand->size / 8u,
          .write = (operand->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0};
}

Access stack_access(const Guest& g) {
  switch (g.what.kind) {
    case Kind::push:
    case Kind::push_memory:
    case Kind::push_flags:
    case Kind::call:
    case Kind::call_indirect: return {.base = x86::rsp, .displacement = -8, .size = 8, .write = true};
    case Kind::pop:
    case Kind::ret: return {.base = x86::rsp, .size = 8};
    default: return {};
  }
}

/// Whether what was checked before still holds behind it: translation and rights of every page are the same.
bool keeps_windows(Kind kind) {
  switch (kind) {
    case Kind::nothing:
    case Kind::native:
    case Kind::lea:
    case Kind::push:
    case Kind::pop:
    case Kind::push_memory:
    case Kind::push_flags:
    case Kind::move_from_segment:
    case Kind::bit_string:
    case Kind::jump_if: return true;
    default: return false;
  }
}

/// By how much the instruction changes the register, which is among those that it writes. false: nobody knows.
bool change_of(const Guest& g, int reg, s32& change) {
  const auto& operands = g.d.operands;
  switch (g.what.kind) {
    case Kind::push:
    case Kind::push_memory:
    case Kind::push_flags: change = -8; return true;
    case Kind::pop: change = 8; return reg == x86::rsp && general_register(operands[0]) != x86::rsp;
    case Kind::lea:
      change = s32(operands[1].mem.disp.value);
      return operands[0].size == 64 && operands[1].mem.index == ZYDIS_REGISTER_NONE &&
             operands[1].mem.base == operands[0].reg.value;
    case Kind::native: break;
    default: return false;
  }
  if (operands[0].size != 64 || general_register(operands[0]) != reg || !g.d.is_immediate(1)) return false;
  const s64 value = operands[1].imm.value.s;
  if (value < -4096 || value > 4096) return false;
  change = s32(value);
  if (g.d.mnemonic() == ZYDIS_MNEMONIC_SUB) change = -change;
  return g.d.mnemonic() == ZYDIS_MNEMONIC_SUB || g.d.mnemonic() == ZYDIS_MNEMONIC_ADD;
}

}  // namespace

void Translation::plan_windows() {
  /// A register from its last unknown change on.
  struct Track {
    unsigned since = 0;  ///< instruction
    s32 moved = 0;       ///< how much it has changed since then
    int window = -1;     ///< the one that is growing
  };
  /// What a window needs to be known while it grows, from the register's value at `since`.
  struct Growing {
    unsigned since, first, accesses;
    s32 low, high;
  };
  Track tracks[16];
  Growing growing[window_count];

  const auto take = [&](const Access& access, unsigned n, s8& window) {
    window = -1;
    if (access.base < 0 || !access.size) return;
    Track& track = tracks[access.base];
    const s32 low = track.moved + access.displacement, high = low + s32(access.size);
    if (access.displacement != s16(access.displacement)) return;
    if (track.window >= 0) {
      Growing& known = growing[track.window];
      if (std::max(high, known.high) - std::min(low, known.low) > widest) track.window = -1;
    }
    if (track.window < 0) {
      if (window_total_ == window_count) return;
      track.window = int(window_total_);
      growing[window_total_] = {track.since, n, 0, low, high};
      windows_[window_total_++] = {.base = access.base, .low = 0, .high = 0, .write = false, .at = n};
    }
    Growing& known = growing[track.window];
    ++known.accesses;
    known.low = std::min(low, known.low);
    known.high = std::max(high, known.high);
    windows_[track.window].write |= access.write;
    window = s8(track.window);
  };

  for (unsigned n = 0; n < count_; ++n) {
    Guest& g = guests_[n];
    take(operand_access(g), n, g.operand_window);
    take(stack_access(g), n, g.stack_window);
    if (!keeps_windows(g.what.kind)) {
      std::fill(std::begin(tracks), std::end(tracks), Track{.since = n + 1});
      continue;
    }
    u32 seen = 0;
    for (unsigned o = 0; o < g.d.instruction.operand_count; ++o) {
      const ZydisDecodedOperand& operand = g.d.operands[o];
      const int reg = general_register(operand);
      if (reg < 0 || !(operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) || seen >> reg & 1) continue;
      seen |= 1u << reg;
      if (s32 change; change_of(g, reg, change))
        tracks[reg].moved += change;
      else
        tracks[reg] = {.since = n + 1};
    }
  }

  // Where to check: nearest before the first access, where no flag is live.
  bool used[window_count];
  for (unsigned w = 0; w < window_total_; ++w) {
    Window& window = windows_[w];
    const Growing& known = growing[w];
    unsigned at = known.first;
    while (at > known.since && guests_[at].flags_live) --at;
    if (guests_[at].flags_live) at = known.first;
    s32 moved = 0;
    for (unsigned n = known.since; n < at; ++n) {
      s32 change = 0;
      for (unsigned o = 0; o < guests_[n].d.instruction.operand_count; ++o) {
        const ZydisDecodedOperand& operand = guests_[n].d.operands[o];
        if (general_register(operand) != window.base || !(operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)) continue;
        change_of(guests_[n], window.base, change);
        break;
      }
      moved += change;
    }
    window.at = at;
    window.low = known.low - moved;
    window.high = known.high - moved;
    used[w] = known.accesses > 1 || (guests_[known.first].flags_live && !guests_[at].flags_live);
  }
  for (unsigned n = 0; n < count_; ++n)
    for (s8* window : {&guests_[n].operand_window, &guests_[n].stack_window})
      if (*window >= 0 && !used[*window]) *window = -1;
  for (unsigned w = 0; w < window_total_; ++w)
    if (!used[w]) windows_[w].at = most_instructions;  // nowhere
}

void Translation::check_window(unsigned number) {
  const Window& window = windows_[number];
  const bool flags_live = guests_[window.at].flags_live;
  check_tag({.base = window.base, .displacement = window.low}, unsigned(window.high - window.low), window.write,
            window.at, flags_live, Cold::Kind::window);
  a_.load(address_scratch, tlb(offsetof(TlbEntry, addend)), index_scratch, flags_live ? 3 : 0);
  a_.store(offsetof(Context, addends) + number * 8, address_scratch);
  held_ = int(number);
}

Place Translation::in_window(int window, s32 displacement) {
  if (held_ != window) a_.load(address_scratch, offsetof(Context, addends) + unsigned(window) * 8);
  held_ = window;
  return {.base = home(unsigned(windows_[window].base)), .index = address_scratch, .displacement = displacement};
}

}  // namespace anykvm::engine::translate
