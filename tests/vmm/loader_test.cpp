// Kernels and initrds made by hand: what is loaded where, and every way in which a file can be wrong.
#include "vmm/loader/kernel.h"

#include <asm/bootparam.h>
#include <elf.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "anykvm/kvm.h"
#include "vmm/acpi/tables.h"

namespace anykvm::vmm {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::vector<u8> bytes_of(std::string_view text) { return {text.begin(), text.end()}; }

/// A cpio archive of one empty file and the trailer.
std::vector<u8> cpio() {
  std::string archive;
  for (const std::string name : {"init", "TRAILER!!!"}) {
    char header[111];
    std::snprintf(header, sizeof header, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 1, 0, 0, 0, 1, 0,
                  0, 0, 0, 0, 0, unsigned(name.size() + 1), 0);
    archive += header + name;
    archive.push_back('\0');
    archive.resize((archive.size() + 3) & ~size_t{3});
  }
  return bytes_of(archive);
}

std::vector<u8> bzimage(size_t code_size = 0x4000) {
  constexpr size_t setup = 2 * 512;
  std::vector<u8> file(setup + code_size);
  setup_header header{};
  header.setup_sects = 1;
  header.syssize = u32(code_size / 16);
  header.boot_flag = 0xaa55;
  header.jump = 0x6aeb;
  header.header = 0x53726448;
  header.version = 0x20f;
  header.xloadflags = XLF_KERNEL_64;
  header.relocatable_kernel = 1;
  header.kernel_alignment = 0x200000;
  header.cmdline_size = 2047;
  header.initrd_addr_max = 0x7fffffff;
  header.pref_address = 0x1000000;
  header.init_size = 0x10000;
  std::memcpy(file.data() + offsetof(boot_params, hdr), &header, sizeof header);
  file[setup] = 0x90;
  file[setup + 0x200] = 0xf4;
  return file;
}

std::vector<u8> vmlinux(bool with_note = true) {
  std::vector<u8> file(0x3000);
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_machine = EM_X86_64;
  header.e_phoff = 0x40;
  header.e_phnum = 2;
  std::memcpy(file.data(), &header, sizeof header);
  const Elf64_Phdr segments[] = {
      {PT_LOAD, 5, 0x1000, 0, 0x1000000, 0x1000, 0x2000, 0x1000},
      {PT_NOTE, 4, 0x2000, 0, 0, 20, 20, 4},
  };
  std::memcpy(file.data() + 0x40, segments, sizeof segments);
  file[0x1000] = 0xf4;
  if (with_note) {
    const u32 note[] = {4, 4, 18, 0x006e6558, 0x1000100};
    std::memcpy(file.data() + 0x2000, note, sizeof note);
  }
  return file;
}

struct LoaderTest : ::testing::Test {
  std::filesystem::path folder = std::filesystem::temp_directory_path() / ("anykvm-loader-" + std::to_string(getpid()));
  GuestMemory memory{64 << 20};
  LoaderTest() { std::filesystem::create_directory(folder); }
  ~LoaderTest() override { std::filesystem::remove_all(folder); }

  std::string file(const char* name, const std::vector<u8>& bytes) {
    const auto path = folder / name;
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
    return path;
  }
  LoadedKernel load(const std::vector<u8>& kernel, const std::vector<u8>& initrd = {}, std::string line = "quiet") {
    return load_kernel(memory, {file("kernel", kernel), initrd.empty() ? "" : file("initrd", initrd), std::move(line)},
                       acpi_base);
  }
  void expect_refused(const std::vector<u8>& kernel, const char* why) {
    EXPECT_THAT([&] { load(kernel); },
                ThrowsMessage<BadInput>(AllOf(HasSubstr(why), HasSubstr((folder / "kernel").string()))));
  }
  void expect_initrd_refused(const std::vector<u8>& initrd, const char* why) {
    EXPECT_THAT([&] { load(bzimage(), initrd); },
                ThrowsMessage<BadInput>(AllOf(HasSubstr(why), HasSubstr((folder / "initrd").string()))));
  }
};

TEST_F(LoaderTest, BzImageAtItsPreferredAddress) {
  const auto kernel = load(bzimage(), cpio(), "console=ttyS0");
  EXPECT_EQ(kernel.mode, EntryMode::linux64);
  EXPECT_EQ(kernel.entry, 0x1000200u);
  EXPECT_EQ(memory.at(kernel.entry, 1)[0], 0xf4);

  boot_params params;
  std::memcpy(&params, memory.at(kernel.parameters, sizeof params).data(), sizeof params);
  EXPECT_STREQ(reinterpret_cast<const char*>(memory.at(params.hdr.cmd_line_ptr, 32).data()), "console=ttyS0");
  EXPECT_EQ(params.hdr.ramdisk_size, cpio().size());
  EXPECT_EQ(params.hdr.ramdisk_image, (64u << 20) - 4096) << "as high as memory is";
  EXPECT_EQ(memory.at(params.hdr.ramdisk_image, 1)[0], '0');
  EXPECT_EQ(params.acpi_rsdp_addr, acpi_base);
  EXPECT_EQ(params.hdr.type_of_loader, 0xff);
  u64 ram = 0;
  for (unsigned i = 0; i < params.e820_entries; ++i)
    if (params.e820_table[i].type == 1) ram += params.e820_table[i].size;
  EXPECT_EQ(ram, (64u << 20) - 0x60000) << "all but 0xa0000 to 0xfffff";
}

TEST_F(LoaderTest, RelocatableKernelGoesLowWhenMemoryIsSmall) {
  const GuestMemory small(8 << 20);
  const auto kernel = load_kernel(small, {file("kernel", bzimage()), "", ""}, acpi_base);
  EXPECT_EQ(kernel.entry, 0x200200u);
}

TEST_F(LoaderTest, PvhEntry) {
  const auto kernel = load(vmlinux(), cpio());
  EXPECT_EQ(kernel.mode, EntryMode::pvh);
  EXPECT_EQ(kernel.entry, 0x1000100u);
  const auto info = memory.at(kernel.parameters, 56);
  u32 words[14];
  std::memcpy(words, info.data(), sizeof words);
  EXPECT_EQ(words[0], 0x336ec578u);
  EXPECT_EQ(words[3], 1u) << "one module: the initrd";
  u64 module[2];
  std::memcpy(module, memory.at(words[4], sizeof module).data(), sizeof module);
  EXPECT_EQ(module[1], cpio().size());
  EXPECT_EQ(words[12], memory_map(memory).size());

  kvm_regs regs;
  kvm_sregs sregs{};
  set_entry_state(memory, kernel, regs, sregs);
  EXPECT_EQ(regs.rbx, kernel.parameters);
  EXPECT_EQ(sregs.cr0, 0x11u) << "protected, not paged";
  EXPECT_EQ(sregs.cs.db, 1);
}

TEST_F(LoaderTest, EntryStateIsTheBootProtocols) {
  kvm_regs regs;
  kvm_sregs sregs{};
  set_entry_state(memory, load(bzimage()), regs, sregs);
  EXPECT_EQ(regs.rip, 0x1000200u);
  EXPECT_EQ(regs.rsi, boot_layout::boot_params);
  EXPECT_EQ(regs.rflags, 2u);
  EXPECT_EQ(sregs.cs.selector, 0x10);
  EXPECT_EQ(sregs.ds.selector, 0x18);
  EXPECT_EQ(sregs.cs.l, 1);
  EXPECT_EQ(sregs.efer, 0x500u);
  // The descriptor that a reload of CS would read says the same as the cached one.
  u64 code;
  std::memcpy(&code, memory.at(sregs.gdt.base + 0x10, 8).data(), 8);
  EXPECT_EQ(code, 0x00af9b000000ffffu);
  // 0xfee00000 through the identity map.
  u64 entry;
  std::memcpy(&entry, memory.at(boot_layout::page_tables + 5 * page_size + (0xfee00000u >> 21 & 511) * 8, 8).data(), 8);
  EXPECT_EQ(entry, 0xfee00083u);
}

TEST_F(LoaderTest, KernelsThatAreNone) {
  EXPECT_THAT(
      [&] {
        load_kernel(memory, {"/no/such/kernel", "", ""}, 0);
      },
      ThrowsMessage<BadInput>(HasSubstr("No such file")));
  EXPECT_THAT([&] { load_kernel(memory, {folder, "", ""}, 0); }, ThrowsMessage<BadInput>(HasSubstr("is a directory")));
  expect_refused({}, "is empty");
  expect_refused(bytes_of("#!/bin/sh\n"), "cut off, or no kernel");
  expect_refused(std::vector<u8>(0x10000, 'x'), "neither a bzImage nor an ELF");
  expect_refused({0x1f, 0x8b, 8}, "compressed");
  auto old = bzimage();
  old[offsetof(boot_params, hdr) + offsetof(setup_header, xloadflags)] = 0;
  expect_refused(old, "no 64-bit entry");
}

TEST_F(LoaderTest, BzImageCutOffAnywhere) {
  const auto whole = bzimage();
  for (size_t size = 1; size + 16 < whole.size(); size += 509)
    EXPECT_THROW(load({whole.begin(), whole.begin() + long(size)}), BadInput) << size;
  expect_refused({whole.begin(), whole.end() - 100}, "cut off");
}

TEST_F(LoaderTest, ElfCutOffAndForeign) {
  const auto whole = vmlinux();
  for (size_t size = 1; size <= 0x2000; size += 101)
    EXPECT_THROW(load({whole.begin(), whole.begin() + long(size)}), BadInput) << size;
  expect_refused(vmlinux(false), "without a PVH entry");
  auto foreign = vmlinux();
  foreign[18] = EM_AARCH64;
  expect_refused(foreign, "not for x86-64");
  auto program = vmlinux();
  std::memset(program.data() + 0x40 + offsetof(Elf64_Phdr, p_paddr), 0, 8);
  expect_refused(program, "not a Linux vmlinux");
}

TEST_F(LoaderTest, MemoryTooSmall) {
  auto large = bzimage();
  const u32 init_size = 128 << 20;
  std::memcpy(large.data() + offsetof(boot_params, hdr) + offsetof(setup_header, init_size), &init_size, 4);
  expect_refused(large, "--memory");
  EXPECT_THAT([&] { load(bzimage(), std::vector<u8>(60 << 20, '0')); }, ThrowsMessage<BadInput>(HasSubstr("initrd")));
  EXPECT_THAT([&] { load(bzimage(), {}, std::string(3000, 'x')); }, ThrowsMessage<BadInput>(HasSubstr("2047")));
}

TEST_F(LoaderTest, Initrds) {
  expect_initrd_refused(bytes_of("hello"), "no initramfs");
  auto cut = cpio();
  cut.resize(cut.size() - 20);
  expect_initrd_refused(cut, "cut off");
  auto padded = cpio();
  padded.resize(padded.size() + 512);
  load(bzimage(), padded);
  auto chained = cpio();
  const u8 zstd[] = {0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x00, 0x01, 0x00, 0x00};
  chained.insert(chained.end(), std::begin(zstd), std::end(zstd));
  load(bzimage(), chained);
  chained[chained.size() - 3] = 0x11;  // a last raw block of two bytes that are not there
  expect_initrd_refused(chained, "cut off");
  auto foreign = cpio();
  foreign.push_back('x');
  expect_initrd_refused(foreign, "goes on");
  expect_initrd_refused(bytes_of(std::string("\xfd"
                                             "7zXZ\0\0\4rest of it",
                                             18)),
                        "cut off");
  const u8 lz4[] = {0x02, 0x21, 0x4c, 0x18, 9, 0, 0, 0, 1};
  expect_initrd_refused({std::begin(lz4), std::end(lz4)}, "cut off");
  EXPECT_THAT(
      [&] {
        load_kernel(memory, {file("kernel", bzimage()), file("initrd", {}), ""}, 0);
      },
      ThrowsMessage<BadInput>(HasSubstr("is empty")));
}

}  // namespace
}  // namespace anykvm::vmm
