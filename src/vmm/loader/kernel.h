// Puts a Linux kernel and its initrd into guest memory, and says in which state the processor enters it.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "vmm/guest_memory.h"

struct kvm_regs;
struct kvm_sregs;

namespace anykvm::vmm {

/// A file that cannot be used: one sentence that names the file, says what is wrong with it and what to do.
class BadInput : public std::runtime_error {
 public:
  using runtime_error::runtime_error;
};

struct KernelFiles {
  std::string kernel;
  std::string initrd;  ///< empty: none
  std::string command_line;
};

/// How the kernel is entered.
enum class EntryMode {
  linux64,  ///< the 64-bit entry of the boot protocol: long mode, RSI = boot_params
  pvh,      ///< PVH: 32-bit protected mode without paging, EBX = hvm_start_info
};

struct LoadedKernel {
  EntryMode mode;
  Gpa entry;
  Gpa parameters;
};

/// Loads a bzImage or an ELF vmlinux with a PVH note. `rsdp` is where the ACPI tables begin. Throws BadInput.
LoadedKernel load_kernel(const GuestMemory& memory, const KernelFiles& files, Gpa rsdp);

/// Fills in what differs from the reset state of a vCPU, and writes the descriptors and page tables that it needs.
void set_entry_state(const GuestMemory& memory, const LoadedKernel& kernel, kvm_regs& regs, kvm_sregs& sregs);

// What the parts of the loader share.

/// Low guest memory while the kernel is entered; it is free RAM to the kernel afterwards.
namespace boot_layout {
inline constexpr Gpa gdt = 0x1000;
inline constexpr Gpa pvh_info = 0x6000;  ///< hvm_start_info, its module and memory map
inline constexpr Gpa boot_params = 0x7000;
inline constexpr Gpa page_tables = 0x9000;  ///< six pages
inline constexpr Gpa stack_top = 0x10000;
inline constexpr Gpa command_line = 0x20000;
inline constexpr u64 command_line_limit = 0x10000;
inline constexpr Gpa low_ram_end = 0xa0000;
inline constexpr Gpa high_ram = 0x100000;
}  // namespace boot_layout

struct MemoryRange {
  Gpa base;
  u64 size;
  bool is_ram;  ///< otherwise reserved
};
/// The memory map, as E820 and PVH tell it.
std::vector<MemoryRange> memory_map(const GuestMemory& memory);

/// Reads a whole file. Throws BadInput when it cannot be read or is empty; `what` names its role.
std::vector<u8> read_file(const std::string& path, const char* what);
/// Refuses what no kernel unpacks, and what is cut off as far as the format tells without unpacking. Throws BadInput.
void check_initrd(const std::string& path, std::span<const u8> image);

struct LoadedInitrd {
  Gpa base = 0;
  u64 size = 0;
};
/// Puts the initrd, if there is one, as high as `limit` (the last address it may occupy) and memory allow, above
/// `kernel_end`. Throws BadInput.
LoadedInitrd load_initrd(const GuestMemory& memory, const std::string& path, Gpa kernel_end, Gpa limit);
/// Writes the command line with its terminating zero. Throws BadInput when it is longer than `limit`.
void write_command_line(const GuestMemory& memory, const std::string& command_line, u64 limit);

bool is_bzimage(std::span<const u8> file);
LoadedKernel load_bzimage(const GuestMemory& memory, const KernelFiles& files, std::span<const u8> file, Gpa rsdp);
bool is_elf(std::span<const u8> file);
LoadedKernel load_pvh(const GuestMemory& memory, const KernelFiles& files, std::span<const u8> file, Gpa rsdp);

}  // namespace anykvm::vmm
