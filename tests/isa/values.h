// Edge values: what registers and memory begin with.
#pragma once

#include "isa/random.h"

namespace anykvm::isa {

u64 any_integer(Random& random);
u32 any_single(Random& random);
u64 any_double(Random& random);
/// An 80-bit value, unnormal, pseudo-denormal and pseudo-infinite ones included; ten bytes.
void any_extended(Random& random, u8* out);

/// What the lanes of a case's vectors mostly are, so that operands meet their like.
enum class Lanes : u8 { mixed, integers, singles, doubles, halves };
u64 any_lane(Random& random, Lanes lanes);

}  // namespace anykvm::isa
