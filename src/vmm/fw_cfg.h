// QEMU's firmware configuration device: a list of items that firmware selects by number and reads byte by byte or by
// DMA, and a directory of those that have names. (QEMU, docs/specs/fw_cfg.rst.)
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "vmm/bus.h"
#include "vmm/guest_memory.h"

namespace anykvm::vmm {

class FwCfg final : public IoDevice {
 public:
  static constexpr u64 base_port = 0x510;
  static constexpr u64 port_count = 12;
  static constexpr size_t name_size = 56;  ///< of a file's name, with its terminating zero

  enum Item : u16 {
    signature = 0x00,
    id = 0x01,
    ram_size = 0x03,
    cpu_count = 0x05,
    boot_menu = 0x0e,
    cpu_limit = 0x0f,
    directory = 0x19,
    first_file = 0x20,
  };

  explicit FwCfg(const GuestMemory& memory);

  // Before the vCPUs run.
  void add(u16 item, std::vector<u8> bytes) { items_[item] = std::move(bytes); }
  /// Little-endian.
  void add(u16 item, u64 value, unsigned bytes);
  /// Throws std::logic_error when the name is too long.
  void add_file(std::string_view name, std::vector<u8> bytes);
  void add_file(std::string_view name, u64 value, unsigned bytes);

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  void select(u16 item);
  u8 next_byte();
  void transfer(Gpa descriptor);
  u32 perform(u32 control, u32 length, Gpa address);
  void update_directory();

  struct File {
    std::string name;
    u16 item;
  };
  const GuestMemory& memory_;
  std::map<u16, std::vector<u8>> items_;
  std::vector<File> files_;

  std::mutex mutex_;  ///< guards what follows
  const std::vector<u8>* selected_ = nullptr;
  size_t position_ = 0;
  u64 dma_address_ = 0;
};

}  // namespace anykvm::vmm
