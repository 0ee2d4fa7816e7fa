// An ELF vmlinux by its PVH note. (Xen docs/misc/pvh.pandoc; xen/include/public/arch-x86/hvm/start_info.h.)
#include <elf.h>
#include <fmt/format.h>

#include <cstring>
#include <optional>

#include "vmm/loader/kernel.h"

namespace anykvm::vmm {

namespace {

struct StartInfo {
  u32 magic = 0x336e'c578;
  u32 version = 1;
  u32 flags = 0;
  u32 module_count = 0;
  u64 modules = 0;
  u64 command_line = 0;
  u64 rsdp = 0;
  u64 memory_map = 0;
  u32 memory_map_entries = 0;
  u32 reserved = 0;
};
struct Module {
  u64 base, size, command_line, reserved;
};
struct MapEntry {
  u64 base, size;
  u32 type, reserved;
};
static_assert(sizeof(StartInfo) == 56 && sizeof(Module) == 32 && sizeof(MapEntry) == 24);

constexpr u32 note_phys32_entry = 18;
constexpr u32 map_ram = 1, map_reserved = 2;

template <class T>
std::optional<T> structure_at(std::span<const u8> file, u64 offset) {
  if (offset > file.size() || file.size() - offset < sizeof(T)) return {};
  T value;
  std::memcpy(&value, file.data() + offset, sizeof value);
  return value;
}

[[noreturn]] void cut_off(const std::string& path) {
  throw BadInput(fmt::format("kernel {} is cut off: its ELF headers point beyond its end; copy it again", path));
}

/// The 32-bit entry point in a note segment of the file, if this is it.
std::optional<u32> entry_from_notes(std::span<const u8> notes) {
  u64 offset = 0;
  while (const auto note = structure_at<Elf64_Nhdr>(notes, offset)) {
    const u64 name = offset + sizeof *note;
    const u64 description = name + ((u64{note->n_namesz} + 3) & ~u64{3});
    const u64 next = description + ((u64{note->n_descsz} + 3) & ~u64{3});
    if (next > notes.size()) break;
    const bool is_xen = note->n_namesz == 4 && std::memcmp(notes.data() + name, "Xen", 4) == 0;
    if (is_xen && note->n_type == note_phys32_entry && note->n_descsz >= 4)
      return structure_at<u32>(notes, description);
    offset = next;
  }
  return {};
}

}  // namespace

bool is_elf(std::span<const u8> file) {
  return file.size() >= SELFMAG && std::memcmp(file.data(), ELFMAG, SELFMAG) == 0;
}

LoadedKernel load_pvh(const GuestMemory& memory, const KernelFiles& files, std::span<const u8> file, Gpa rsdp) {
  const std::string& path = files.kernel;
  const auto header = structure_at<Elf64_Ehdr>(file, 0);
  if (!header) cut_off(path);
  if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != EM_X86_64)
    throw BadInput(fmt::format("kernel {} is an ELF file, but not for x86-64", path));

  std::optional<u32> entry;
  Gpa end = 0;
  bool loaded = false;
  for (unsigned i = 0; i < header->e_phnum; ++i) {
    const auto segment = structure_at<Elf64_Phdr>(file, header->e_phoff + u64{i} * sizeof(Elf64_Phdr));
    if (!segment || segment->p_offset > file.size() || segment->p_filesz > file.size() - segment->p_offset)
      cut_off(path);
    const auto content = file.subspan(segment->p_offset, segment->p_filesz);
    if (segment->p_type == PT_NOTE && !entry) entry = entry_from_notes(content);
    if (segment->p_type != PT_LOAD || segment->p_memsz == 0) continue;
    if (segment->p_paddr < boot_layout::high_ram)
      throw BadInput(
          fmt::format("kernel {} is an ELF file that loads at {:#x}: not a Linux vmlinux", path, segment->p_paddr));
    const auto target = memory.at(segment->p_paddr, segment->p_memsz);
    if (target.empty() || content.size() > target.size())
      throw BadInput(fmt::format("kernel {} needs {} MiB of memory to start: give more by --memory", path,
                                 ((segment->p_paddr + segment->p_memsz) >> 20) + 1));
    std::memcpy(target.data(), content.data(), content.size());
    end = std::max<Gpa>(end, segment->p_paddr + segment->p_memsz);
    loaded = true;
  }
  if (!loaded || !entry)
    throw BadInput(
        fmt::format("kernel {} is an ELF file without a PVH entry: give the bzImage (vmlinuz), or build with "
                    "CONFIG_PVH",
                    path));

  write_command_line(memory, files.command_line, 2047);
  const auto initrd = load_initrd(memory, files.initrd, end, 0xffff'ffff);

  StartInfo info;
  Gpa next = boot_layout::pvh_info + sizeof info;
  const auto place = [&](const auto& structure) {
    memory.write(next, {reinterpret_cast<const u8*>(&structure), sizeof structure});
    next += sizeof structure;
  };
  info.command_line = boot_layout::command_line;
  info.rsdp = rsdp;
  if (initrd.size) {
    info.module_count = 1;
    info.modules = next;
    place(Module{initrd.base, initrd.size, 0, 0});
  }
  info.memory_map = next;
  for (const MemoryRange& range : memory_map(memory)) {
    place(MapEntry{range.base, range.size, range.is_ram ? map_ram : map_reserved, 0});
    ++info.memory_map_entries;
  }
  memory.write(boot_layout::pvh_info, {reinterpret_cast<const u8*>(&info), sizeof info});
  return {EntryMode::pvh, *entry, boot_layout::pvh_info};
}

}  // namespace anykvm::vmm
