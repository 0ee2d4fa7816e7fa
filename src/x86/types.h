// The fixed-size integers and the three kinds of address that the machine is written in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anykvm {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using u128 = unsigned __int128;
using s128 = __int128;

using Gva = u64;  ///< guest virtual (linear) address
using Gpa = u64;  ///< guest physical address
using Gfn = u64;  ///< guest frame number: Gpa >> 12

inline constexpr u64 page_size = 4096;
inline constexpr u64 page_mask = ~(page_size - 1);

}  // namespace anykvm
