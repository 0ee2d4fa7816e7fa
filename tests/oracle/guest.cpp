#include "oracle/guest.h"

#include <cstring>

namespace anykvm::oracle {

Ending Guest::ending(const Memory& memory, unsigned test) const {
  const u64 entry = log + u64(test) * log_size;
  const auto word = [&](u32 offset, unsigned index) {
    const u64 at = entry + offset + index * layout.word;
    return layout.word == 8 ? get<u64>(memory, at) : get<u32>(memory, at);
  };
  Ending ending{.vector = word(layout.vector, 0)};
  ending.has_error = has_error_code(ending.vector);
  unsigned n = 0;
  if (ending.has_error) ending.error = word(layout.frame, n++);
  for (u64* value : {&ending.rip, &ending.cs, &ending.flags, &ending.rsp, &ending.ss}) *value = word(layout.frame, n++);
  return ending;
}

std::span<const u8> Guest::code(unsigned test) const {
  return std::span(image).subspan(layout.tests + test * layout.test_size + layout.code, layout.code_size);
}

std::span<const u8> Guest::code_at(unsigned test, u64 cs, u64 rip) const {
  const u64 offset = offset_in_code(cs, rip);
  return offset < layout.code_size ? code(test).subspan(offset) : std::span<const u8>{};
}

void Guest::skip(unsigned test) {
  const u64 at = layout.tests + test * layout.test_size;
  for (u32 count : layout.counts) put<u32>(image, at + count, 0);
  std::memset(&image[at + layout.code], 0xcc, layout.code_size);
}

}  // namespace anykvm::oracle
