// Which kind of kernel it is, and what both kinds need: files, command line, memory map.
#include "vmm/loader/kernel.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "vmm/acpi/tables.h"

namespace anykvm::vmm {

std::vector<u8> read_file(const std::string& path, const char* what) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw BadInput(fmt::format("cannot open {} {}: {}", what, path, std::strerror(errno)));
  struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } closer{fd};
  struct stat status;
  if (fstat(fd, &status) != 0 || S_ISDIR(status.st_mode))
    throw BadInput(fmt::format("{} {} is a directory: give the file", what, path));

  std::vector<u8> bytes;
  if (S_ISREG(status.st_mode)) bytes.reserve(size_t(status.st_size));
  constexpr size_t chunk = 1 << 20;
  constexpr size_t most = size_t{2} << 30;
  for (;;) {
    const size_t have = bytes.size();
    if (have > most) throw BadInput(fmt::format("{} {} is larger than 2 GiB: not a {}", what, path, what));
    bytes.resize(have + chunk);
    const ssize_t got = read(fd, bytes.data() + have, chunk);
    bytes.resize(have + size_t(got > 0 ? got : 0));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw BadInput(fmt::format("cannot read {} {}: {}", what, path, std::strerror(errno)));
    if (got == 0) break;
  }
  if (bytes.empty()) throw BadInput(fmt::format("{} {} is empty: was its download or build cut off?", what, path));
  return bytes;
}

void write_command_line(const GuestMemory& memory, const std::string& command_line, u64 limit) {
  limit = std::min(limit, boot_layout::command_line_limit - 1);
  if (command_line.size() > limit)
    throw BadInput(fmt::format("the kernel's command line has {} bytes, and this kernel takes {}: shorten --append",
                               command_line.size(), limit));
  const auto* bytes = reinterpret_cast<const u8*>(command_line.c_str());
  if (!memory.write(boot_layout::command_line, {bytes, command_line.size() + 1}))
    throw BadInput("the guest has too little memory for a kernel: give more by --memory");
}

std::vector<MemoryRange> memory_map(const GuestMemory& memory) {
  std::vector<MemoryRange> map{{0, boot_layout::low_ram_end, true}, {acpi_base, acpi_size, false}};
  if (memory.low_size() > boot_layout::high_ram)
    map.push_back({boot_layout::high_ram, memory.low_size() - boot_layout::high_ram, true});
  if (memory.high_size()) map.push_back({GuestMemory::hole_end, memory.high_size(), true});
  return map;
}

LoadedKernel load_kernel(const GuestMemory& memory, const KernelFiles& files, Gpa rsdp) {
  const auto file = read_file(files.kernel, "kernel");
  if (is_elf(file)) return load_pvh(memory, files, file, rsdp);
  if (is_bzimage(file)) return load_bzimage(memory, files, file, rsdp);
  const auto begins = [&](std::initializer_list<u8> magic) {
    return file.size() >= magic.size() && std::equal(magic.begin(), magic.end(), file.begin());
  };
  if (begins({0x1f, 0x8b}) || begins({0x28, 0xb5, 0x2f, 0xfd}) || begins({0xfd, '7', 'z', 'X', 'Z'}))
    throw BadInput(fmt::format("kernel {} is a compressed file: unpack it first", files.kernel));
  if (file.size() < 0x264)
    throw BadInput(fmt::format("kernel {} has only {} bytes: it is cut off, or no kernel", files.kernel, file.size()));
  throw BadInput(fmt::format(
      "kernel {} is neither a bzImage nor an ELF vmlinux: give an x86-64 Linux kernel such as /boot/vmlinuz-*",
      files.kernel));
}

}  // namespace anykvm::vmm
