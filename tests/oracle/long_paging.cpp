// Accesses to a window whose page tables tests change.
#include "oracle/long_generator.h"

namespace anykvm::oracle {

using namespace long_mode;

void LongGenerator::window_tables() {
  constexpr u64 flags = entry_p | entry_w | entry_u | entry_a | entry_d | entry_g | 0xe00;
  const auto entry = [&](u64 address, u64 base, bool leaf) {
    u64 value = base | entry_p | entry_w | entry_u;
    switch (below(8)) {
      case 0: value &= ~entry_p; break;
      case 1: value &= ~entry_w; break;
      case 2: value &= ~entry_u; break;
      case 3: value |= entry_nx; break;
      case 4: value |= 1ull << (40 + below(23)); break;  // reserved, ignored, keys
      case 5: value = base | (random_() & flags); break;
      case 6: value |= random_() & (entry_a | entry_d | 0x18); break;
      default: break;
    }
    if (!intel_ && address < LONG_PDPT) value &= ~entry_g;  // which AMD's reserve there, and TCG does not know
    if (leaf && below(3) == 0) value |= (random_() & 15) << 59;
    patch(address, value);
  };
  if (below(3) == 0) entry(LONG_PML4 + 8, LONG_WINDOW_PDPT, false);
  if (below(16) == 0) patch(LONG_PML4 + 8, LONG_WINDOW_PDPT | 7 | (below(2) || !intel_ ? entry_ps : entry_g));
  if (below(3) == 0) entry(LONG_WINDOW_PDPT, LONG_WINDOW_PD, false);
  if (below(3) == 0) entry(LONG_WINDOW_PDPT + 8, entry_ps | (below(8) ? 0 : 1ull << (12 + below(18))), true);  // 1 GiB
  if (below(2) == 0) entry(LONG_WINDOW_PD, LONG_WINDOW_PT, false);
  if (below(3) == 0) entry(LONG_WINDOW_PD + 8, LONG_WINDOW_PT2, false);
  if (below(2) == 0) entry(LONG_WINDOW_PD + 16, entry_ps | (below(8) ? 0 : 1ull << (12 + below(9))), true);  // 2 MiB
  for (unsigned n = 2 + below(3); n-- > 0;) {
    const u64 page = below(8);
    entry(LONG_WINDOW_PT + 8 * page, LONG_FRAMES + (page & 3) * 0x1000, true);
  }
}

u64 LongGenerator::page_offset() {
  const u64 offset = below(3) ? below(0x1000) & ~7u : below(2) ? 0xff8 + below(8) : below(16);
  const bool close = offset > only_code - 0x40 && offset < only_code + 0x140;  // pushes go down
  return close ? offset - 0x400 : offset;
}

u64 LongGenerator::window_address() {
  const u64 offset = page_offset();
  switch (below(8)) {
    case 0: return window + (1ull << 30) + LONG_FRAMES + below(4) * 0x1000 + (offset & 0xff8);
    case 1: return window + (2ull << 21) + LONG_FRAMES + below(4) * 0x1000 + (offset & 0xff8);
    case 2: return window + (1ull << 21) + below(4) * 0x1000 + offset;
    case 3: return below(4) ? window + below(8) * 0x1000 + offset : strange_address();
    default: return window + below(8) * 0x1000 + offset;
  }
}

void LongGenerator::access(Emitter& code) {
  const unsigned kind = below(13), size = below(3);
  code.load(0, kind == 5 ? jump_address() : data_address());
  switch (kind) {
    case 0:
    case 1: code.prefix_for_rax().bytes({size ? 0x8bu : 0x8au, 0x08}); break;  // loads
    case 2:
    case 3: code.prefix_for_rax().bytes({size ? 0x89u : 0x88u, 0x08}); break;  // stores
    case 4: code.prefix_for_rax().bytes({size ? 0x01u : 0x00u, 0x08}); break;
    case 5: code.bytes({0xff, any_of({0xe0u, 0xd0u})}); break;  // JMP, CALL
    case 6: code.prefix_for_rax().bytes({0xff, 0x30}); break;   // PUSH
    case 7: code.prefix_for_rax().bytes({0x8f, 0x00}); break;   // POP
    case 8:                                                     // a stack there
      if (bits_ == 64)
        code.bytes({0x48, 0x89, 0xc4, any_of({0x50u, 0x58u, 0xc3u, 0x9cu, 0xc9u})});
      else
        code.prefix_for_rax().bytes({0xf0, 0xff, 0x00});
      break;
    case 9:  // INVLPG; STAC and CLAC
      if (below(2))
        code.prefix_for_rax().bytes({0x0f, 0x01, 0x38});
      else
        code.bytes({0x0f, 0x01, any_of({0xcbu, 0xcau})});
      break;
    case 10:  // implicit supervisor accesses: an LDT in the window, with data and code segments not yet accessed
      if (cpl_ == 0) {
        patch(LONG_GDT + ldt2, segment(below(8) * 0x1000, 0x7fff, 0x82, 0));
        patch(LONG_GDT + ldt2 + 8, window >> 32);
        code.load(1, ldt2).bytes({0x0f, 0x00, 0xd1});
        code.load(1, below(8) * 0x1000 | 0x200 | below(2) * 8 | 4 | (below(2) ? 3 : 0));
        code.bytes({0x8e, 0xc1 | (bits_ == 64 ? any_of({0u, 3u, 4u}) : any_of({0u, 4u})) << 3});
        code.bytes({0x0f, 0x02, 0xd1});
      } else {
        code.bytes({0x0f, 0x18, 0x00});  // PREFETCHNTA (not CLFLUSH, for which TCG checks nothing)
      }
      break;
    case 11:  // an interrupt whose stack is there
      patch(LONG_IDT + 16 * 0x50, gate(code64_r0, LONG_SUPER_CODE + 0x80, 0xee, 3));
      patch(LONG_TSS + 0x34, window + 0x1000 * below(8) + (below(2) ? 0x800 : 0x10));
      code.bytes({0xcd, 0x50});
      break;
    default: code.prefix_for_rax().bytes({0x0f, 0xc1, 0x08}); break;
  }
}

}  // namespace anykvm::oracle
