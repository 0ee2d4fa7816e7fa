// Windows: accesses of one block that lie near each other are checked together, with one look into the TLB.
//
// Compilers reach the stack and the members of an object at fixed distances from a register. As long as that register
// changes by known amounts only, one check of the whole range serves all of them; each access then costs one load, of
// the difference between the host's addresses and the guest's. The check stands where the flags are dead, when there
// is such a place between the register's last other change and the first access.
//
// Where the range cannot be had as a whole (it crosses pages, or one of the accesses is not allowed, or is a device's),
// the block is left for one whose accesses are checked singly: that one finds out which instruction faults.
//
// In 32-bit code the register must be so far from both ends of 4 GiB that nothing in the block wraps: what is emitted
// adds in 64 bits.
#include <algorithm>

#include "engine/translate/translation.h"

namespace anykvm::engine::translate {

namespace {

/// The wider a window, the more often it crosses pages.
constexpr s32 widest = 192;
/// The most that a known change is.
constexpr s32 most_change = 4096;
/// More than all changes of a block and a displacement together.
constexpr u32 out_of_reach = 2u << 20;
static_assert(most_instructions * most_change + 0x8000 < out_of_reach);

struct Access {
  int base = -1;  ///< guest register; -1: none that a window could have
  s32 displacement = 0;
  unsigned size = 0;
  bool write = false;
};

Access operand_access(const Guest& g, s32 word) {
  switch (g.what.kind) {
    case Kind::leave: return {.base = x86::rbp, .size = unsigned(word)};
    case Kind::native:
    case Kind::push_memory:
    case Kind::jump_indirect:
    case Kind::call_indirect: break;
    default: return {};
  }
  const MemoryOperand& operand = g.memory;
  if (!g.has_memory || operand.index >= 0 || operand.base < 0 || operand.segment >= x86::fs ||
      in_context(unsigned(operand.base)))
    return {};
  return {
      .base = operand.base, .displacement = operand.displacement, .size = operand.bytes, .write = operand.is_written};
}

Access stack_access(const Guest& g, s32 word) {
  switch (g.what.kind) {
    case Kind::push:
    case Kind::push_memory:
    case Kind::push_flags:
    case Kind::call:
    case Kind::call_indirect: return {.base = x86::rsp, .displacement = -word, .size = unsigned(word), .write = true};
    case Kind::pop:
    case Kind::ret: return {.base = x86::rsp, .size = unsigned(word)};
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
bool change_of(const Guest& g, int reg, s32 word, s32& change) {
  switch (g.what.kind) {
    case Kind::push:
    case Kind::push_memory:
    case Kind::push_flags: change = -word; return true;
    case Kind::pop: change = word; return reg == x86::rsp && g.registers[0].number != x86::rsp;
    case Kind::lea:
      change = g.memory.displacement;
      return g.width == word && g.memory.index < 0 && g.memory.base == reg &&
             (word == 8 || (change >= -most_change && change <= most_change));
    case Kind::native: break;
    default: return false;
  }
  change = g.adds * g.immediate;
  return g.adds && g.immediate >= -most_change && g.immediate <= most_change;
}

}  // namespace

void Translation::plan_windows() {
  /// A register since its last unknown change.
  struct Track {
    int since = 0;       ///< the first instruction behind that change
    s32 moved = 0;       ///< how much it has changed
    int dead_at = -1;    ///< the last instruction before which no flag is live, as far as is noted; -1: none
    s32 dead_moved = 0;  ///< `moved` there
    int window = -1;     ///< the one that is growing
  };
  /// A window as it grows.
  struct Growing {
    s32 origin;  ///< what the register had moved by where the check is
    unsigned accesses;
    bool is_hoisted;  ///< the check is where no flag is live, before the first access, where one is
  };
  Track tracks[16];
  Growing growing[window_count];
  int dead_at = -1;  // the last instruction before which no flag is live
  // To be called before `moved` changes, and before what it notes is used.
  const auto note_dead = [&](Track& track) {
    if (dead_at < track.since || dead_at == track.dead_at) return;
    track.dead_at = dead_at;
    track.dead_moved = track.moved;
  };

  const auto take = [&](const Access& access, unsigned n, s8& number) {
    number = -1;
    if (access.base < 0 || !access.size || access.displacement != s16(access.displacement)) return;
    Track& track = tracks[access.base];
    const auto low_in = [&](int w) { return track.moved + access.displacement - growing[w].origin; };
    const s32 size = s32(access.size);
    if (track.window >= 0) {
      const Window& window = windows_[track.window];
      const s32 low = low_in(track.window);
      if (std::max(low + size, window.high) - std::min(low, window.low) > widest) track.window = -1;
    }
    if (track.window < 0) {
      if (window_total_ == window_count) return;
      note_dead(track);
      if (!wide() && guests_[n].flags_live && track.dead_at < 0) return;
      track.window = int(window_total_++);
      const bool hoisted = guests_[n].flags_live && track.dead_at >= 0;
      growing[track.window] = {hoisted ? track.dead_moved : track.moved, 0, hoisted};
      const s32 low = low_in(track.window);
      windows_[track.window] = {.base = access.base,
                                .low = low,
                                .high = low + size,
                                .write = false,
                                .at = hoisted ? unsigned(track.dead_at) : n};
    }
    Window& window = windows_[track.window];
    const s32 low = low_in(track.window);
    window.low = std::min(low, window.low);
    window.high = std::max(low + size, window.high);
    window.write |= access.write;
    ++growing[track.window].accesses;
    number = s8(track.window);
  };

  for (unsigned n = 0; n < count_; ++n) {
    Guest& g = guests_[n];
    if (!g.flags_live) dead_at = int(n);
    take(operand_access(g, word()), n, g.operand_window);
    take(stack_access(g, word()), n, g.stack_window);
    if (!keeps_windows(g.what.kind)) {
      std::fill(std::begin(tracks), std::end(tracks), Track{.since = int(n) + 1});
      continue;
    }
    u32 seen = 0;
    for (const GeneralOperand& operand : g.general()) {
      const unsigned reg = operand.number;
      if (!operand.is_written || seen >> reg & 1) continue;
      seen |= 1u << reg;
      Track& track = tracks[reg];
      if (s32 change; !change_of(g, int(reg), word(), change)) {
        track = {.since = int(n) + 1};
      } else {
        note_dead(track);
        track.moved += change;
      }
    }
  }

  const auto pays = [&](int w) { return growing[w].accesses > 1 || growing[w].is_hoisted; };
  for (unsigned n = 0; n < count_; ++n)
    for (s8* window : {&guests_[n].operand_window, &guests_[n].stack_window})
      if (*window >= 0 && !pays(*window)) *window = -1;
  for (unsigned w = 0; w < window_total_; ++w)
    if (!pays(int(w))) windows_[w].at = most_instructions;  // nowhere
}

void Translation::check_window(unsigned number) {
  const Window& window = windows_[number];
  const bool flags_live = guests_[window.at].flags_live;
  if (!wide()) {
    a_.lea(index_scratch, home(unsigned(window.base)), -1, 0, -s32(out_of_reach), false);
    a_.compare32_immediate(index_scratch, -2 * out_of_reach);
    add_cold({.kind = Cold::Kind::singly, .site = a_.jump_if_later(3), .guest = window.at});  // jae
  }
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
