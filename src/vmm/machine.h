// The machine that `anykvm boot` gives a guest. A kernel gets a PC with an empty PCI bus, its disks, network and
// entropy by virtio-mmio; firmware gets a PC as firmware knows it, with the same devices by virtio-pci.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "anykvm/anykvm.h"
#include "vmm/acpi/tables.h"
#include "vmm/bus.h"
#include "vmm/event_loop.h"
#include "vmm/firmware.h"
#include "vmm/guest_memory.h"
#include "vmm/i8042.h"
#include "vmm/loader/kernel.h"
#include "vmm/pci/bridges.h"
#include "vmm/pci/bus.h"
#include "vmm/power_management.h"
#include "vmm/rtc.h"
#include "vmm/run_outcome.h"
#include "vmm/serial.h"
#include "vmm/vcpu_thread.h"
#include "vmm/virtio/device.h"
#include "vmm/virtio/mmio.h"
#include "vmm/virtio/pci.h"

namespace anykvm::vmm {

struct DiskOption {
  std::string path;
  bool read_only = false;
};

struct FirmwareOptions {
  std::string path;        ///< the ROM's image
  std::string log;         ///< where its debug output goes; empty: nowhere
  bool boot_menu = false;  ///< let it ask for the boot device
};

struct MachineOptions {
  KernelFiles files;                        ///< what to boot …
  std::optional<FirmwareOptions> firmware;  ///< … unless there is firmware to find it
  u64 memory_bytes = u64{512} << 20;
  GuestMemory::Backing memory_backing = GuestMemory::Backing::anonymous;
  unsigned cpus = 1;
  std::vector<DiskOption> disks;
  bool network = false;
};

/// Assembled by the constructor, run by start(), ended by stop(). Throws BadInput for files, KvmError for a KVM that is
/// not able to.
class Machine {
 public:
  static constexpr u32 virtio_base = 0xd000'0000;
  static constexpr unsigned virtio_limit = 16;

  Machine(const Kvm& kvm, const MachineOptions& options, EventLoop& loop, OutcomeBox& outcome,
          std::function<void(u8)> console);
  ~Machine();

  Serial16550& serial() { return *serial_; }
  void start();
  /// Brings all vCPUs to an end. The event loop must be stopped before devices go, and is the caller's.
  void stop();

 private:
  void reset();
  void add_bridges(bool for_firmware);
  void add_firmware(const FirmwareOptions& options);
  void describe_to_firmware(const MachineOptions& options);
  void add_virtio(std::unique_ptr<VirtioDevice> device);
  void create_vcpus(const Kvm& kvm, unsigned count, const LoadedKernel* kernel);
  IrqLine& line(u32 gsi);

  OutcomeBox& outcome_;
  GuestMemory memory_;
  Vm vm_;
  Bus ports_, mmio_;
  std::vector<std::unique_ptr<GsiLine>> lines_;
  std::unique_ptr<Serial16550> serial_;
  std::unique_ptr<I8042> keyboard_;
  std::unique_ptr<Rtc> rtc_;
  std::unique_ptr<PowerManagement> power_;
  PciBus pci_;
  std::unique_ptr<PciFunction> host_bridge_;
  std::unique_ptr<Piix3> isa_bridge_;

  // With firmware only.
  std::unique_ptr<FirmwareRom> rom_;
  std::unique_ptr<FwCfg> fw_cfg_;
  std::unique_ptr<SystemControlPort> system_control_;
  std::unique_ptr<DebugPort> debug_port_;

  std::vector<VirtioSlot> virtio_slots_;
  std::vector<PciSlot> pci_slots_;
  std::vector<std::unique_ptr<VirtioRegisters>> virtio_;
  std::vector<std::unique_ptr<VcpuThread>> vcpus_;
};

}  // namespace anykvm::vmm
