// The segments that code under comparison can name: Linux' own GDT, and an LDT that worker and guest fill alike.
#pragma once

#include <span>

#include "x86/types.h"

namespace anykvm::isa {

struct LocalSegment {
  u32 base, limit;  ///< limit in bytes, or in pages with `pages`
  bool wide;        ///< D/B
  bool pages;
  bool code, can_write_or_read;
  bool down_or_conforming;
  bool present;
  u64 descriptor() const;
};

/// LDT entry n has selector n * 8 + 7.
std::span<const LocalSegment> local_segments();
inline constexpr u16 local_selector(unsigned n) { return u16(n * 8 + 7); }

/// By number in local_segments().
enum LocalName : unsigned {
  flat_code32,
  small_code32,
  code16,
  small_data32,
  data16,
  down_data,
  readonly_data,
  absent_data,
  hidden_code,
  down_data32,
  tiny_data
};

/// What Linux' GDT holds, as far as user mode can tell.
std::span<const u64> global_descriptors();

/// Puts the segments into this process' LDT. false: the host does not allow it.
bool install_local_segments();

/// The base and the last byte's offset of a selector's segment.
struct Extent {
  u32 base = 0, first = 0, last = 0xffffffff;
};
Extent extent_of(u16 selector);
/// D/B: whether a stack segment makes ESP the stack pointer, not SP.
bool is_wide(u16 selector);

}  // namespace anykvm::isa
