#include "engine/direct/page_scan.h"

#include <emmintrin.h>

#include <bit>

#include "engine/native/decoded.h"

namespace anykvm::engine::direct {

namespace {

/// Behind 0F.
enum : u8 { group7 = 0x01, sysenter = 0x34, cpuid = 0xa2, group15 = 0xae, group9 = 0xc7 };
constexpr u8 xgetbv = 0xd0;

constexpr unsigned extension_of(u8 modrm) { return modrm >> 3 & 7; }
constexpr bool is_register_form(u8 modrm) { return modrm >= 0xc0; }

/// XSAVE, XRSTOR, XSAVEOPT; XSAVEC, XSAVES, XRSTORS. (CLWB and CLFLUSHOPT share two of them.)
bool is_xsave(u8 opcode, u8 modrm) {
  const unsigned extension = extension_of(modrm);
  return !is_register_form(modrm) &&
         (opcode == group15 ? extension >= 4 && extension <= 6 : extension >= 3 && extension <= 5);
}

/// 0F is before `opcode`; modrm is what follows.
bool is_forbidden(u8 opcode, u8 modrm, bool hides_xsave) {
  switch (opcode) {
    case cpuid: return true;
    case sysenter: return !host_is_amd();
    case group7: return modrm == xgetbv;
    case group9:
      return (is_register_form(modrm) && extension_of(modrm) == 7) || (hides_xsave && is_xsave(opcode, modrm));
    case group15: return hides_xsave && is_xsave(opcode, modrm);
    default: return false;
  }
}

bool begins(u8 opcode) { return opcode == group7 || opcode == group9 || opcode == group15; }

}  // namespace

unsigned find_suspects(const u8* page, bool hides_xsave, Suspect* found, unsigned most) {
  unsigned count = 0;
  const auto suspect = [&](unsigned offset, bool at_end) {
    if (count < most) found[count] = {u16(offset), at_end};
    ++count;
  };
  if (is_forbidden(page[0], page[1], hides_xsave)) suspect(0, true);
  if (page[page_size - 2] == 0x0f && begins(page[page_size - 1])) suspect(page_size - 2, true);
  const __m128i escape = _mm_set1_epi8(0x0f);
  const __m128i a = _mm_set1_epi8(char(cpuid)), b = _mm_set1_epi8(char(group7)), c = _mm_set1_epi8(char(group9)),
                d = _mm_set1_epi8(char(group15)), e = _mm_set1_epi8(char(sysenter));
  const auto load = [page](unsigned at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(page + at)); };
  for (unsigned at = 0; at < page_size; at += 16) {
    // The last vector's last byte has nothing behind it here.
    const bool last = at + 16 == page_size;
    const __m128i next = last ? _mm_srli_si128(load(at), 1) : load(at + 1);
    const __m128i second = _mm_or_si128(_mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(next, a), _mm_cmpeq_epi8(next, b)),
                                                     _mm_or_si128(_mm_cmpeq_epi8(next, c), _mm_cmpeq_epi8(next, d))),
                                        _mm_cmpeq_epi8(next, e));
    unsigned hits = unsigned(_mm_movemask_epi8(_mm_and_si128(_mm_cmpeq_epi8(load(at), escape), second)));
    for (; hits; hits &= hits - 1) {
      const unsigned offset = at + unsigned(std::countr_zero(hits));
      if (offset + 2 < page_size ? is_forbidden(page[offset + 1], page[offset + 2], hides_xsave)
                                 : page[offset + 1] == cpuid || page[offset + 1] == sysenter)
        suspect(offset, false);
    }
  }
  return count;
}

}  // namespace anykvm::engine::direct
