// The terms. Opcodes are those of ACPI 6.4, section 20.3.
#include "vmm/acpi/aml.h"

#include <algorithm>

namespace anykvm::vmm::aml {

namespace {

enum : u8 {
  op_zero = 0x00,
  op_one = 0x01,
  op_name = 0x08,
  op_byte = 0x0a,
  op_word = 0x0b,
  op_dword = 0x0c,
  op_string = 0x0d,
  op_qword = 0x0e,
  op_scope = 0x10,
  op_buffer = 0x11,
  op_package = 0x12,
  op_extended = 0x5b,
  op_extended_device = 0x82,
};
enum : u8 { large_dword_address_space = 0x87, large_word_address_space = 0x88 };

void append(Bytes& to, const Bytes& bytes) { to.insert(to.end(), bytes.begin(), bytes.end()); }

void append_le(Bytes& to, u64 value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) to.push_back(u8(value >> (8 * i)));
}

/// Address space descriptor: range fixed at both ends, handed on and not consumed.
Bytes address_space(u8 tag, u8 resource_type, u8 type_flags, u32 first, u32 last) {
  const unsigned width = tag == large_dword_address_space ? 4 : 2;
  constexpr u8 fixed_at_both_ends = 0x0c;
  Bytes result{tag, u8(3 + 5 * width), 0, resource_type, fixed_at_both_ends, type_flags};
  append_le(result, 0, width);  // granularity
  append_le(result, first, width);
  append_le(result, last, width);
  append_le(result, 0, width);  // translation
  append_le(result, u64{last} - first + 1, width);
  return result;
}

/// PkgLength counts itself. The first byte holds the low bits and, from two bytes on, how many follow.
Bytes with_length(const Bytes& content) {
  Bytes result;
  if (content.size() + 1 < 0x40) {
    result.push_back(u8(content.size() + 1));
  } else {
    unsigned extra = 1;
    while (content.size() + 1 + extra >= (size_t{1} << (4 + 8 * extra))) ++extra;
    const size_t length = content.size() + 1 + extra;
    result.push_back(u8(extra << 6 | (length & 0x0f)));
    append_le(result, length >> 4, extra);
  }
  append(result, content);
  return result;
}

Bytes name_string(std::string_view name) {
  Bytes result;
  if (name.starts_with('\\')) {
    result.push_back('\\');
    name.remove_prefix(1);
  }
  for (size_t i = 0; i < 4; ++i) result.push_back(i < name.size() ? u8(name[i]) : u8('_'));
  return result;
}

}  // namespace

Bytes join(std::initializer_list<Bytes> terms) {
  Bytes result;
  for (const Bytes& term : terms) append(result, term);
  return result;
}

Bytes integer(u64 value) {
  if (value == 0) return {op_zero};
  if (value == 1) return {op_one};
  Bytes result;
  if (value <= 0xff) {
    result.push_back(op_byte);
    append_le(result, value, 1);
  } else if (value <= 0xffff) {
    result.push_back(op_word);
    append_le(result, value, 2);
  } else if (value <= 0xffff'ffff) {
    result.push_back(op_dword);
    append_le(result, value, 4);
  } else {
    result.push_back(op_qword);
    append_le(result, value, 8);
  }
  return result;
}

Bytes string(std::string_view text) {
  Bytes result(text.size() + 2);
  result.front() = op_string;
  std::ranges::copy(text, result.begin() + 1);
  return result;
}

Bytes package(std::span<const Bytes> elements) {
  Bytes content{u8(elements.size())};
  for (const Bytes& element : elements) append(content, element);
  return join({{op_package}, with_length(content)});
}

Bytes package(std::initializer_list<Bytes> elements) { return package({elements.begin(), elements.size()}); }

Bytes eisa_id(std::string_view id) {
  const auto hex = [](char digit) { return u32(digit <= '9' ? digit - '0' : digit - 'A' + 10); };
  u32 value = 0;
  for (size_t i = 0; i < 3; ++i) value = value << 5 | (u32(id[i]) & 0x1f);
  for (size_t i = 3; i < 7; ++i) value = value << 4 | hex(id[i]);
  return integer(__builtin_bswap32(value));
}

Bytes name(std::string_view name, const Bytes& value) { return join({{op_name}, name_string(name), value}); }

Bytes scope(std::string_view name, const Bytes& terms) {
  return join({{op_scope}, with_length(join({name_string(name), terms}))});
}

Bytes device(std::string_view name, const Bytes& terms) {
  return join({{op_extended, op_extended_device}, with_length(join({name_string(name), terms}))});
}

Bytes resources(std::initializer_list<Bytes> descriptors) {
  Bytes list = join(descriptors);
  list.push_back(0x79);  // end tag …
  list.push_back(0);     // … with a checksum that is not to be checked
  return join({{op_buffer}, with_length(join({integer(list.size()), list}))});
}

Bytes io_ports(u16 base, u8 count) {
  Bytes result{0x47, 0x01};  // I/O port descriptor, 16-bit decode
  append_le(result, base, 2);
  append_le(result, base, 2);
  result.push_back(1);  // alignment
  result.push_back(count);
  return result;
}

Bytes isa_irq(unsigned irq) {
  Bytes result{0x22};  // IRQ descriptor without flags
  append_le(result, 1u << irq, 2);
  return result;
}

Bytes fixed_memory(u32 base, u32 size) {
  Bytes result{0x86, 9, 0, 1};  // 32-bit fixed memory, 9 bytes, read-write
  append_le(result, base, 4);
  append_le(result, size, 4);
  return result;
}

Bytes bus_numbers(u16 first, u16 last) { return address_space(large_word_address_space, 2, 0, first, last); }

Bytes port_window(u16 first, u16 last) {
  constexpr u8 entire_range = 0x03;
  return address_space(large_word_address_space, 1, entire_range, first, last);
}

Bytes memory_window(u32 first, u32 last) {
  constexpr u8 read_write_uncached = 0x01;
  return address_space(large_dword_address_space, 0, read_write_uncached, first, last);
}

Bytes level_interrupt(u32 gsi) {
  Bytes result{0x89, 6, 0, 0x01, 1};  // extended interrupt, 6 bytes, a consumer's: level, high, exclusive; one
  append_le(result, gsi, 4);
  return result;
}

}  // namespace anykvm::vmm::aml
