// What comes from outside into the built-in VMM: kernel images and initrds (a whole header with some of it changed),
// and what a guest's driver writes into the registers of a virtio device and into its queues.
#include <asm/bootparam.h>
#include <elf.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <utility>
#include <vector>

#include "fuzz/input.h"
#include "vmm/loader/kernel.h"
#include "vmm/virtio/mmio.h"

namespace anykvm::fuzz {
namespace {

using namespace vmm;

GuestMemory& memory() {
  static GuestMemory memory(8 << 20);
  return memory;
}

void change(Input& input, std::vector<u8>& bytes) {
  for (unsigned changes = input.below(12); changes > 0; --changes) {
    const u64 value = input.number(), at = input.take<u16>() % bytes.size();
    std::memcpy(bytes.data() + at, &value, std::min<u64>(1u << input.below(4), bytes.size() - at));
  }
  if (input.flag()) bytes.resize(input.take<u16>() % bytes.size() + 1);
}

template <class Load>
void load(Load&& load) {
  try {
    load();
  } catch (const BadInput&) {
  }
}

void bzimage(Input& input) {
  std::vector<u8> file(0x2000);
  setup_header header{};
  header.setup_sects = 1;
  header.boot_flag = 0xaa55;
  header.jump = 0x66eb;
  header.header = 0x53726448;
  header.version = 0x20f;
  header.syssize = 0x1c00 / 16;
  header.xloadflags = XLF_KERNEL_64;
  header.relocatable_kernel = 1;
  header.pref_address = 0x200000;
  header.init_size = 0x4000;
  header.kernel_alignment = 0x200000;
  header.initrd_addr_max = 0x7fffffff;
  header.cmdline_size = 255;
  std::memcpy(file.data() + 0x1f1, &header, sizeof header);
  change(input, file);
  const KernelFiles files{.kernel = "bzImage", .initrd = "", .command_line = "console=ttyS0"};
  load([&] {
    if (is_bzimage(file)) (void)load_bzimage(memory(), files, file, input.number());
  });
}

void elf(Input& input) {
  std::vector<u8> file(0x1000);
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_machine = EM_X86_64;
  header.e_phoff = sizeof header;
  header.e_phnum = 3;
  const Elf64_Phdr segments[] = {
      {.p_type = PT_LOAD, .p_offset = 0x200, .p_paddr = 0x100000, .p_filesz = 0x400, .p_memsz = 0x800},
      {.p_type = PT_LOAD, .p_offset = 0x600, .p_paddr = 0x200000, .p_filesz = 0x100, .p_memsz = 0x100000},
      {.p_type = PT_NOTE, .p_offset = 0x800, .p_filesz = 0x40},
  };
  const u32 notes[] = {4, 8, 5, 0x006e6558, 1, 2, 4, 4, 18, 0x006e6558, 0x100000};
  std::memcpy(file.data(), &header, sizeof header);
  std::memcpy(file.data() + sizeof header, segments, sizeof segments);
  std::memcpy(file.data() + 0x800, notes, sizeof notes);
  change(input, file);
  const KernelFiles files{.kernel = "vmlinux", .initrd = "", .command_line = ""};
  load([&] {
    if (is_elf(file)) (void)load_pvh(memory(), files, file, input.number());
  });
}

void initrd(Input& input) {
  static constexpr char cpio[] =
      "070701000000010000000000000000000000010000000000000004000000000000000000000000000000000000000200000000a\0"
      "abcd0707010000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
      "0B00000000TRAILER!!!";
  static constexpr u8 zstd[] = {0x28, 0xb5, 0x2f, 0xfd, 0x24, 0x05, 0x29, 0, 0, 'h', 'e', 'l', 'l', 'o', 1, 2, 3, 4};
  static constexpr u8 xz[] = {0xfd, '7', 'z', 'X', 'Z', 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x59, 0x5a};
  static constexpr u8 lz4[] = {0x04, 0x22, 0x4d, 0x18, 0x64, 0x40, 0xa7, 5, 0, 0,
                               0x80, 'h',  'e',  'l',  'l',  'o',  0,    0, 0, 0};
  std::vector<u8> file;
  const auto add = [&file](const auto& bytes) {
    const auto* data = reinterpret_cast<const u8*>(bytes);
    file.insert(file.end(), data, data + sizeof bytes);
  };
  switch (input.below(4)) {
    case 0: add(cpio); break;
    case 1: add(zstd); break;
    case 2: add(xz); break;
    case 3: add(lz4); break;
  }
  change(input, file);
  load([&] { check_initrd("initrd", file); });
}

struct NoLine final : IrqLine {
  void set(bool) override {}
};

/// A device that copies what it reads to where it may write.
class Copier final : public VirtioDevice {
 public:
  u32 id() const override { return 2; }
  u64 features() const override { return 0; }
  std::span<const u16> queue_sizes() const override { return sizes_; }
  std::span<const u8> config() const override { return config_; }
  void notify(unsigned queue) override { notified_ = queue; }

  /// What a device of the VMM does on a thread of its own.
  void work() {
    if (notified_ == none) return;
    const unsigned queue = std::exchange(notified_, none);
    (void)serve(queue, chain_, 64, [](Chain& chain) {
      u8 bytes[256];
      const u64 got = chain.readable.copy_out(chain.readable.bytes() / 2, bytes);
      u64 written = chain.writable.copy_in(0, {bytes, got});
      if (const u64 front = chain.writable.bytes() / 3) chain.writable.drop_front(front);
      if (const u64 back = chain.readable.bytes() / 3) chain.readable.drop_back(back);
      return u32(written);
    });
  }

 private:
  static constexpr unsigned none = ~0u;
  static constexpr u16 sizes_[] = {256, 8};
  static constexpr u8 config_[] = {1, 2, 3, 4, 5};
  unsigned notified_ = none;
  Chain chain_;
};

class Driver {
 public:
  explicit Driver(Input& input) : Driver(input, std::make_unique<Copier>()) {}

  void play() {
    set(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    for (u32 half : {0u, 1u}) {
      set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
      set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
      set(VIRTIO_MMIO_DRIVER_FEATURES, input_.byte() < 200 ? get(VIRTIO_MMIO_DEVICE_FEATURES) : u32(input_.number()));
    }
    set(VIRTIO_MMIO_STATUS, get(VIRTIO_MMIO_STATUS) | VIRTIO_CONFIG_S_FEATURES_OK);
    for (u32 queue : {0u, 1u}) {
      set(VIRTIO_MMIO_QUEUE_SEL, queue);
      set(VIRTIO_MMIO_QUEUE_NUM, 8);
      set(VIRTIO_MMIO_QUEUE_DESC_LOW, u32(rings));
      set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, u32(rings + 0x100));
      set(VIRTIO_MMIO_QUEUE_USED_LOW, u32(rings + 0x200));
      set(VIRTIO_MMIO_QUEUE_READY, 1);
    }
    set(VIRTIO_MMIO_STATUS, get(VIRTIO_MMIO_STATUS) | VIRTIO_CONFIG_S_DRIVER_OK);
    std::memset(memory().at(rings, 0x1000).data(), 0, 0x1000);
    for (unsigned steps = 0; steps < 48 && !input_.empty(); ++steps) {
      take_step();
      copier_.work();
    }
  }

 private:
  Driver(Input& input, std::unique_ptr<Copier> copier)
      : input_(input), copier_(*copier), device_(std::move(copier), memory(), line_) {}

  static constexpr Gpa rings = 0x1000, buffers = 0x3000;

  void set(u64 offset, u32 value) { device_.write(offset, {reinterpret_cast<const u8*>(&value), sizeof value}); }
  u32 get(u64 offset) {
    u32 value = 0;
    device_.read(offset, {reinterpret_cast<u8*>(&value), sizeof value});
    return value;
  }
  template <class T>
  void put(Gpa at, const T& value) {
    (void)memory().write(at, {reinterpret_cast<const u8*>(&value), sizeof value});
  }

  void take_step() {
    switch (input_.below(8)) {
      case 0: set(input_.byte() * 4u, u32(input_.number())); return;
      case 1: {
        u8 bytes[8];
        device_.read(input_.take<u16>() % VirtioMmio::window_size, {bytes, 1u << input_.below(4)});
        return;
      }
      case 2: {
        const u64 value = input_.number();
        device_.write(input_.take<u16>() % VirtioMmio::window_size,
                      {reinterpret_cast<const u8*>(&value), 1u << input_.below(4)});
        return;
      }
      case 3:
      case 4: {  // a descriptor, here or in an indirect table
        const Gpa table = input_.flag() ? rings : buffers;
        const Gpa address = input_.flag() ? buffers + input_.byte() * 16u : input_.number();
        const u32 length = input_.flag() ? input_.byte() * 16u : u32(input_.number());
        put(table + input_.below(10) * 16u, vring_desc{address, length, u16(input_.byte() & 7), input_.byte()});
        return;
      }
      case 5: put(rings + 0x100 + input_.below(12) * 2u, u16(input_.number())); return;
      case 6:
        put(rings + 0x102, ++index_);
        put(rings + 0x104 + (index_ - 1) % 8 * 2u, u16(input_.byte()));
        [[fallthrough]];
      case 7: set(VIRTIO_MMIO_QUEUE_NOTIFY, input_.byte()); return;
    }
  }

  Input& input_;
  NoLine line_;
  Copier& copier_;
  VirtioMmio device_;
  u16 index_ = 0;
};

}  // namespace

void loader(std::span<const u8> bytes) {
  Input input(bytes);
  switch (input.below(6)) {
    case 0: return bzimage(input);
    case 1: return elf(input);
    case 2: return initrd(input);
    default: return Driver(input).play();
  }
}

}  // namespace anykvm::fuzz
