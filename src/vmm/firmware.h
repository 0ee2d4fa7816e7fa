// What firmware finds on our board, beyond what a kernel that is entered directly needs: its ROM, a PCI bus with the
// two bridges of a PC, the firmware configuration device, and the ports that early PC code expects to answer.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "vmm/bus.h"
#include "vmm/fw_cfg.h"
#include "vmm/guest_memory.h"
#include "vmm/pci/bridges.h"
#include "vmm/pci/bus.h"
#include "vmm/rtc.h"

namespace anykvm::vmm {

/// A firmware image, in memory of its own that a read-only slot can map.
class FirmwareRom {
 public:
  static constexpr u64 smallest = 64 << 10, largest = 16 << 20;
  /// Its last part is also at the end of the first MiB, where a processor in real mode reaches it.
  static constexpr u64 shadow_limit = 128 << 10;

  /// Throws BadInput when the file is missing, or its size or its last bytes say that it is no firmware.
  explicit FirmwareRom(const std::string& path);
  ~FirmwareRom();
  FirmwareRom(const FirmwareRom&) = delete;
  FirmwareRom& operator=(const FirmwareRom&) = delete;

  u8* host() const { return host_; }
  u64 size() const { return size_; }
  /// It ends at 4 GiB.
  Gpa base() const { return (u64{1} << 32) - size_; }
  /// Copies the last part to RAM below 1 MiB: our RAM there is shadow RAM that is always on.
  void write_shadow(const GuestMemory& memory) const;

 private:
  u8* host_ = nullptr;
  u64 size_ = 0;
};

/// Port 0x92, system control port A: fast reset, and the A20 gate, which is always open. (IBM PS/2 Technical
/// Reference.)
class SystemControlPort final : public IoDevice {
 public:
  static constexpr u64 base_port = 0x92;
  explicit SystemControlPort(std::function<void()> reset) : reset_(std::move(reset)) {}
  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  std::function<void()> reset_;
  std::mutex mutex_;
  u8 value_ = 0x02;
};

/// Port 0x402: firmware's log, byte by byte, to a file. Reads as 0xe9 to say that somebody listens.
class DebugPort final : public IoDevice {
 public:
  static constexpr u64 base_port = 0x402;
  /// Throws BadInput when the file cannot be opened.
  explicit DebugPort(const std::string& path);
  ~DebugPort() override;
  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  std::mutex mutex_;
  FILE* file_;
};

/// The memory map for etc/e820: RAM as it is, and the ROM.
std::vector<u8> firmware_memory_map(const GuestMemory& memory, const FirmwareRom& rom);

}  // namespace anykvm::vmm
