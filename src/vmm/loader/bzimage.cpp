// A bzImage by its 64-bit entry point. (Linux Documentation/arch/x86/boot.rst, protocol 2.12.)
#include <asm/bootparam.h>
#include <fmt/format.h>

#include <cstring>

#include "vmm/loader/kernel.h"

namespace anykvm::vmm {

namespace {

constexpr size_t header_offset = offsetof(boot_params, hdr);
constexpr u16 boot_flag = 0xaa55;
constexpr u32 header_magic = 0x53726448;  // "HdrS"
constexpr u16 protocol_with_64bit_entry = 0x020c;
constexpr u64 sector = 512;
constexpr u64 entry64_offset = 0x200;
constexpr u8 loader_undefined = 0xff;
constexpr u32 e820_ram = 1, e820_reserved = 2;

setup_header header_of(std::span<const u8> file) {
  setup_header header{};
  std::memcpy(&header, file.data() + header_offset, std::min(sizeof header, file.size() - header_offset));
  return header;
}

/// Bytes of the real-mode part, which is not used, and offset of the rest.
u64 setup_size(const setup_header& header) {
  return (u64{header.setup_sects ? header.setup_sects : u8{4}} + 1) * sector;
}

setup_header checked_header(const std::string& path, std::span<const u8> file) {
  const auto header = header_of(file);
  if (header.version < protocol_with_64bit_entry || !(header.xloadflags & XLF_KERNEL_64))
    throw BadInput(
        fmt::format("kernel {} has no 64-bit entry (boot protocol {}.{:02}): an x86-64 kernel of Linux 3.8 or "
                    "later is needed",
                    path, header.version >> 8, header.version & 0xff));
  const u64 whole = setup_size(header) + u64{header.syssize} * 16;
  if (file.size() + 15 < whole)
    throw BadInput(fmt::format("kernel {} is cut off: {} bytes of {} are there; copy or download it again", path,
                               file.size(), whole));
  if (file.size() <= setup_size(header) + entry64_offset)
    throw BadInput(fmt::format("kernel {} is cut off: it ends before its code; copy or download it again", path));
  return header;
}

}  // namespace

bool is_bzimage(std::span<const u8> file) {
  if (file.size() < header_offset + offsetof(setup_header, kernel_info_offset)) return false;
  const auto header = header_of(file);
  return header.boot_flag == boot_flag && header.header == header_magic;
}

LoadedKernel load_bzimage(const GuestMemory& memory, const KernelFiles& files, std::span<const u8> file, Gpa rsdp) {
  const auto header = checked_header(files.kernel, file);
  const auto code = file.subspan(setup_size(header));

  // At its preferred address the kernel needs no relocation. Where memory is too small for that, a relocatable one runs
  // from the lowest aligned address as well.
  Gpa load = header.pref_address;
  const u64 needed = std::max<u64>(header.init_size, code.size());
  if (header.relocatable_kernel && load + needed > memory.low_size()) {
    const u64 alignment = std::max<u64>(header.kernel_alignment, page_size);
    load = (boot_layout::high_ram + alignment - 1) / alignment * alignment;
  }
  if (load < boot_layout::high_ram || memory.at(load, needed).empty())
    throw BadInput(fmt::format("kernel {} needs {} MiB of memory to start: give more by --memory", files.kernel,
                               ((load + needed) >> 20) + 1));
  memory.write(load, code);

  write_command_line(memory, files.command_line, header.cmdline_size ? header.cmdline_size : 255);
  const auto initrd = load_initrd(memory, files.initrd, load + needed, header.initrd_addr_max);

  // The zero page: all zero but for the file's header and what a loader has to fill in.
  boot_params params{};
  params.hdr = header;
  // The header says how long it is by the jump over it, at 0x200.
  const size_t header_end = 0x202 + file[0x201];
  if (const size_t length = header_end - header_offset; length < sizeof params.hdr)
    std::memset(reinterpret_cast<u8*>(&params.hdr) + length, 0, sizeof params.hdr - length);
  params.hdr.type_of_loader = loader_undefined;
  params.hdr.code32_start = u32(load);
  params.hdr.cmd_line_ptr = u32(boot_layout::command_line);
  params.hdr.ramdisk_image = u32(initrd.base);
  params.hdr.ramdisk_size = u32(initrd.size);
  params.acpi_rsdp_addr = rsdp;
  for (const MemoryRange& range : memory_map(memory))
    params.e820_table[params.e820_entries++] = {range.base, range.size, range.is_ram ? e820_ram : e820_reserved};
  memory.write(boot_layout::boot_params, {reinterpret_cast<const u8*>(&params), sizeof params});
  return {EntryMode::linux64, load + entry64_offset, boot_layout::boot_params};
}

}  // namespace anykvm::vmm
