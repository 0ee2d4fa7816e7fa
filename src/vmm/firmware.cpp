#include "vmm/firmware.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "vmm/loader/kernel.h"

namespace anykvm::vmm {

FirmwareRom::FirmwareRom(const std::string& path) {
  const auto file = read_file(path, "firmware");
  if (file.size() < smallest || file.size() > largest || file.size() % smallest != 0)
    throw BadInput(
        fmt::format("firmware {} has {} bytes, and a ROM image has a multiple of 64 KiB up to 16 MiB: "
                    "it is cut off, or no firmware",
                    path, file.size()));
  // The processor begins 16 bytes before the end; an erased or a zeroed ROM has no instruction there.
  const u8 first = file[file.size() - 16];
  if (first == 0x00 || first == 0xff)
    throw BadInput(fmt::format("firmware {} has no code at its reset vector: it is cut off, or no firmware", path));
  size_ = file.size();
  void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "memory for the firmware");
  host_ = static_cast<u8*>(mapped);
  std::memcpy(host_, file.data(), size_);
}

FirmwareRom::~FirmwareRom() { munmap(host_, size_); }

void FirmwareRom::write_shadow(const GuestMemory& memory) const {
  constexpr Gpa end = 1 << 20;
  const u64 bytes = std::min(size_, shadow_limit);
  memory.write(end - bytes, {host_ + size_ - bytes, bytes});
}

void SystemControlPort::read(u64, std::span<u8> data) {
  const std::scoped_lock lock(mutex_);
  data[0] = value_;
}

void SystemControlPort::write(u64, std::span<const u8> data) {
  constexpr u8 reset_bit = 0x01, a20 = 0x02;
  bool resets;
  {
    const std::scoped_lock lock(mutex_);
    resets = (data[0] & reset_bit) && !(value_ & reset_bit);
    value_ = u8(data[0] | a20);
  }
  if (resets) reset_();
}

DebugPort::DebugPort(const std::string& path) : file_(std::fopen(path.c_str(), "ae")) {
  if (!file_) throw BadInput(fmt::format("cannot open firmware log {}: {}", path, std::strerror(errno)));
  setlinebuf(file_);
}

DebugPort::~DebugPort() { std::fclose(file_); }

void DebugPort::read(u64, std::span<u8> data) { data[0] = 0xe9; }

void DebugPort::write(u64, std::span<const u8> data) {
  const std::scoped_lock lock(mutex_);
  std::fwrite(data.data(), 1, data.size(), file_);
}

std::vector<u8> firmware_memory_map(const GuestMemory& memory, const FirmwareRom& rom) {
  enum : u32 { type_ram = 1, type_reserved = 2 };
  std::vector<u8> map;
  const auto append = [&](u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) map.push_back(u8(value >> (8 * i)));
  };
  const auto range = [&](Gpa base, u64 size, u32 type) {
    append(base, 8);
    append(size, 8);
    append(type, 4);
  };
  for (const GuestMemory::Region& region : memory.regions()) range(region.base, region.size, type_ram);
  range(rom.base(), rom.size(), type_reserved);
  return map;
}

}  // namespace anykvm::vmm
