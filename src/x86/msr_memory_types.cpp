// PAT and the MTRRs. Memory types do not change what an access does here; guests program them and read them back.
// Reference: Intel SDM volume 3, 12.11 "Memory Type Range Registers" and 12.12 "Page Attribute Table".
#include "x86/msr_parts.h"

namespace anykvm::x86 {
namespace {

enum : u32 {
  mtrr_cap = 0xfe,
  mtrr_phys_first = 0x200,
  mtrr_phys_last = 0x20f,
  pat = 0x277,
  mtrr_def_type = 0x2ff,
};
constexpr u64 mtrr_cap_value = 8 | 1 << 8 | 1 << 10;  // 8 variable ranges, fixed ranges, WC

/// Fixed-range registers in address order: one of 64K, two of 16K, eight of 4K. -1: not one of them.
int fixed_range(u32 index) {
  if (index == 0x250) return 0;
  if (index == 0x258 || index == 0x259) return int(index - 0x258) + 1;
  if (index >= 0x268 && index <= 0x26f) return int(index - 0x268) + 3;
  return -1;
}

bool is_mtrr_type(u64 type) { return type < 8 && (0x73 >> type & 1); }  // UC WC WT WP WB
bool is_pat_type(u64 type) { return type < 8 && (0xf3 >> type & 1); }   // and UC-

template <class Predicate>
bool all_bytes(u64 value, Predicate is_valid) {
  for (unsigned i = 0; i < 8; ++i)
    if (!is_valid(value >> (i * 8) & 0xff)) return false;
  return true;
}

}  // namespace

MsrAccess get_memory_type_msr(const Cpu& cpu, u32 index, u64& value) {
  const MsrState& msr = cpu.state.msr;
  if (index == pat)
    value = msr.pat;
  else if (index == mtrr_cap)
    value = mtrr_cap_value;
  else if (index == mtrr_def_type)
    value = msr.mtrr_def_type;
  else if (index >= mtrr_phys_first && index <= mtrr_phys_last)
    value = (index & 1 ? msr.mtrr_physmask : msr.mtrr_physbase)[(index - mtrr_phys_first) / 2];
  else if (const int fixed = fixed_range(index); fixed >= 0)
    value = msr.mtrr_fixed[fixed];
  else
    return MsrAccess::unknown;
  return MsrAccess::done;
}

MsrAccess set_memory_type_msr(Cpu& cpu, u32 index, u64 value) {
  MsrState& msr = cpu.state.msr;
  auto store = [&](u64& where, bool valid) {
    if (valid) where = value;
    return allow_if(valid);
  };
  if (index == pat) return store(msr.pat, all_bytes(value, is_pat_type));
  if (index == mtrr_def_type) return store(msr.mtrr_def_type, !(value & ~0xcffull) && is_mtrr_type(value & 0xff));
  if (index >= mtrr_phys_first && index <= mtrr_phys_last) {
    const unsigned range = (index - mtrr_phys_first) / 2;
    const u64 reserved = cpu.cpuid.reserved_physical_bits();
    if (index & 1) return store(msr.mtrr_physmask[range], !(value & (reserved | 0x7ff)));
    return store(msr.mtrr_physbase[range], !(value & (reserved | 0xf00)) && is_mtrr_type(value & 0xff));
  }
  if (const int fixed = fixed_range(index); fixed >= 0)
    return store(msr.mtrr_fixed[fixed], all_bytes(value, is_mtrr_type));
  return MsrAccess::unknown;
}

}  // namespace anykvm::x86
