#include "isa/segments.h"

#include <asm/ldt.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa/state.h"

namespace anykvm::isa {

namespace {
constexpr LocalSegment table[] = {
    {.base = 0,
     .limit = 0xfffff,
     .wide = true,
     .pages = true,
     .code = true,
     .can_write_or_read = true,
     .present = true},
    {.base = code_address, .limit = 0xffff, .wide = true, .code = true, .can_write_or_read = true, .present = true},
    {.base = code_address, .limit = 0xffff, .code = true, .can_write_or_read = true, .present = true},
    {.base = data_address, .limit = data_total - 1, .wide = true, .can_write_or_read = true, .present = true},
    {.base = data_address, .limit = 0xffff, .can_write_or_read = true, .present = true},
    {.base = data_address, .limit = 0x0fff, .can_write_or_read = true, .down_or_conforming = true, .present = true},
    {.base = data_address, .limit = 0xffff, .wide = true, .present = true},
    {.base = data_address, .limit = 0xffff, .wide = true, .can_write_or_read = true},
    {.base = code_address, .limit = 0xffff, .wide = true, .code = true, .present = true},
    {.base = data_address,
     .limit = 0x0fff,
     .wide = true,
     .can_write_or_read = true,
     .down_or_conforming = true,
     .present = true},
    {.base = data_address + 0x100, .limit = 0x1f, .wide = true, .can_write_or_read = true, .present = true},
};
constexpr u64 gdt[16] = {0,
                         0x00cf9b000000ffff,  // kernel code, 32 bits
                         0x00af9b000000ffff,
                         0x00cf93000000ffff,
                         0x00cffb000000ffff,  // user code, 32 bits
                         0x00cff3000000ffff,
                         0x00affb000000ffff,  // user code, 64 bits
                         0,
                         0x00008b0000000067,  // TSS
                         0,
                         0x0000820000000fff,  // LDT
                         0,
                         0,
                         0,
                         0,
                         0x0040f50000000000};  // whose limit tells the CPU's number
}  // namespace

/// As modify_ldt() makes it: DPL 3, accessed.
u64 LocalSegment::descriptor() const {
  const u64 type = 1 | (can_write_or_read ? 2 : 0) | (down_or_conforming ? 4 : 0) | (code ? 8 : 0);
  const u64 high = (base >> 16 & 0xff) | type << 8 | 1u << 12 | 3u << 13 | (present ? 1u << 15 : 0) |
                   (limit & 0xf0000) | (wide ? 1u << 22 : 0) | (pages ? 1u << 23 : 0) | (base & 0xff000000);
  return high << 32 | (base & 0xffff) << 16 | (limit & 0xffff);
}

std::span<const LocalSegment> local_segments() { return table; }
std::span<const u64> global_descriptors() { return gdt; }

bool install_local_segments() {
  unsigned number = 0;
  for (const LocalSegment& s : table) {
    user_desc d{};
    d.entry_number = number++;
    d.base_addr = s.base;
    d.limit = s.limit;
    d.seg_32bit = s.wide;
    d.contents = unsigned(s.code) << 1 | unsigned(s.down_or_conforming);
    d.read_exec_only = !s.can_write_or_read;
    d.limit_in_pages = s.pages;
    d.seg_not_present = !s.present;
    if (syscall(SYS_modify_ldt, 0x11, &d, sizeof d)) return false;
  }
  return true;
}

bool is_wide(u16 selector) { return !(selector & 4) || selector >> 3 >= std::size(table) || table[selector >> 3].wide; }

Extent extent_of(u16 selector) {
  if (!(selector & 4) || selector >> 3 >= std::size(table)) return {};
  const LocalSegment& s = table[selector >> 3];
  const u32 limit = s.pages ? s.limit << 12 | 0xfff : s.limit;
  if (s.down_or_conforming && !s.code) return {s.base, limit + 1, s.wide ? 0xffffffff : 0xffff};
  return {s.base, 0, limit};
}

}  // namespace anykvm::isa
