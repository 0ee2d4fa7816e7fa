// The initial RAM disk: what a kernel is able to unpack, where it goes.
//
// An initramfs is a chain of cpio archives, each plain or compressed (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst). A file that is cut off is told from a whole one as far
// as the outer format shows it: cpio, xz, zstd and lz4 do; of gzip, bzip2, lzma and lzo the kernel itself has to say
// so.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "vmm/loader/kernel.h"

namespace anykvm::vmm {

namespace {

bool begins(std::span<const u8> bytes, std::initializer_list<u8> magic) {
  return bytes.size() >= magic.size() && std::equal(magic.begin(), magic.end(), bytes.begin());
}

u32 le32(std::span<const u8> bytes) { return u32(bytes[0] | bytes[1] << 8 | bytes[2] << 16) | u32(bytes[3]) << 24; }

constexpr size_t cpio_header = 110;

bool is_cpio(std::span<const u8> bytes) {
  return begins(bytes, {'0', '7', '0', '7', '0', '1'}) || begins(bytes, {'0', '7', '0', '7', '0', '2'});
}

u64 cpio_field(std::span<const u8> header, unsigned index) {
  const auto* text = reinterpret_cast<const char*>(header.data()) + 6 + 8 * index;
  u64 value = 0;
  std::from_chars(text, text + 8, value, 16);
  return value;
}

/// The bytes of the cpio archive at the front, its trailer included; 0 when it ends before that.
u64 cpio_length(std::span<const u8> bytes) {
  u64 at = 0;
  while (at + cpio_header <= bytes.size() && is_cpio(bytes.subspan(at))) {
    const auto header = bytes.subspan(at);
    const u64 file_size = cpio_field(header, 6), name_size = cpio_field(header, 11);
    const u64 data = (at + cpio_header + name_size + 3) & ~u64{3};
    const u64 next = (data + file_size + 3) & ~u64{3};
    if (data + file_size > bytes.size()) return 0;
    static constexpr char trailer[] = "TRAILER!!!";
    if (name_size == sizeof trailer && std::memcmp(header.data() + cpio_header, trailer, sizeof trailer) == 0)
      return std::min<u64>(next, bytes.size());
    at = next;
  }
  return 0;
}

/// Whether all blocks of the zstd frame at the front are there (RFC 8878, section 3.1.1).
bool zstd_is_whole(std::span<const u8> bytes) {
  if (bytes.size() < 6) return false;
  const u8 descriptor = bytes[4];
  const bool single_segment = descriptor & 0x20;
  static constexpr u64 dictionary_sizes[] = {0, 1, 2, 4};
  static constexpr u64 content_sizes[] = {0, 2, 4, 8};
  u64 content = content_sizes[descriptor >> 6];
  if (content == 0 && single_segment) content = 1;
  u64 at = 5 + (single_segment ? 0 : 1) + dictionary_sizes[descriptor & 3] + content;
  for (;;) {
    if (at + 3 > bytes.size()) return false;
    const u32 block = u32(bytes[at] | bytes[at + 1] << 8 | bytes[at + 2] << 16);
    const bool repeats_one_byte = (block >> 1 & 3) == 1;
    at += 3 + (repeats_one_byte ? 1 : block >> 3);
    if (at > bytes.size()) return false;
    if (block & 1) return true;
  }
}

/// Whether the last block of the legacy lz4 stream at the front ends where the file does.
bool lz4_is_whole(std::span<const u8> bytes) {
  u64 at = 4;
  while (at + 4 <= bytes.size()) {
    const u32 block = le32(bytes.subspan(at));
    if (block == 0) return true;
    at += 4;
    if (block == 0x184c2102) continue;  // another stream begins
    if (block > bytes.size() - at) return false;
    at += block;
  }
  return at >= bytes.size() || std::all_of(bytes.begin() + long(at), bytes.end(), [](u8 byte) { return byte == 0; });
}

/// An xz file ends with a footer; zeroes may pad it.
bool xz_is_whole(std::span<const u8> bytes) {
  while (!bytes.empty() && bytes.back() == 0) bytes = bytes.first(bytes.size() - 1);
  return bytes.size() > 12 && bytes[bytes.size() - 2] == 'Y' && bytes.back() == 'Z';
}

}  // namespace

void check_initrd(const std::string& path, std::span<const u8> image) {
  const auto cut_off = [&] {
    throw BadInput(fmt::format("initrd {} is cut off: its archive does not end; copy or build it again", path));
  };
  std::span<const u8> rest = image;
  // Plain archives (microcode) come before the compressed one.
  while (is_cpio(rest)) {
    const u64 length = cpio_length(rest);
    if (length == 0) cut_off();
    rest = rest.subspan(length);
    while (!rest.empty() && rest.front() == 0) rest = rest.subspan(1);
  }
  if (rest.empty()) return;
  if (begins(rest, {0x28, 0xb5, 0x2f, 0xfd})) return zstd_is_whole(rest) ? void() : cut_off();
  if (begins(rest, {0x02, 0x21, 0x4c, 0x18})) return lz4_is_whole(rest) ? void() : cut_off();
  if (begins(rest, {0xfd, '7', 'z', 'X', 'Z', 0})) return xz_is_whole(rest) ? void() : cut_off();
  if (begins(rest, {0x1f, 0x8b}) || begins(rest, {'B', 'Z', 'h'}) || begins(rest, {0x5d, 0, 0}) ||
      begins(rest, {0x89, 'L', 'Z', 'O'})) {
    if (rest.size() < 32) cut_off();
    return;
  }
  if (rest.size() != image.size())
    throw BadInput(
        fmt::format("initrd {} goes on after an archive with something that is none, at byte {}: build it again", path,
                    image.size() - rest.size()));
  throw BadInput(fmt::format(
      "initrd {} is no initramfs: a cpio archive (newc), plain or compressed, is needed; a disk image goes to "
      "--disk",
      path));
}

LoadedInitrd load_initrd(const GuestMemory& memory, const std::string& path, Gpa kernel_end, Gpa limit) {
  if (path.empty()) return {};
  const auto image = read_file(path, "initrd");
  check_initrd(path, image);
  const Gpa end = std::min<Gpa>(memory.low_size(), limit + 1);
  const Gpa base = end > image.size() ? (end - image.size()) & page_mask : 0;
  if (base < kernel_end)
    throw BadInput(
        fmt::format("initrd {} of {} MiB does not fit beside the kernel in {} MiB of memory: give more by --memory",
                    path, (image.size() >> 20) + 1, memory.size() >> 20));
  memory.write(base, image);
  return {base, image.size()};
}

}  // namespace anykvm::vmm
