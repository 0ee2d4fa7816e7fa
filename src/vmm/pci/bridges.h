// The bridges of a PC's PCI bus: to the host and to ISA.
#pragma once

#include <array>
#include <mutex>

#include "vmm/irq_line.h"
#include "vmm/pci/bus.h"
#include "vmm/pci/function.h"

namespace anykvm::vmm {

/// A host bridge without a register of its own, for machines that nobody sets up: Red Hat's generic one.
class GenericHostBridge final : public PciFunction {
 public:
  GenericHostBridge();
};

/// Intel's 440FX as firmware wants it: its PAM registers (data sheet 290549, section 3.2.19) remember what is written,
/// and 640 KiB to 1 MiB is RAM whatever they say. Its subsystem identity tells SeaBIOS that there is fw_cfg.
class I440fx final : public PciFunction {
 public:
  I440fx();
};

/// Intel's 82371SB (PIIX3), the ISA bridge: routes the pins of PCI's functions to ISA interrupts. (Data sheet 290550,
/// section 2.2.6.)
class Piix3 final : public PciFunction, public PciInterrupts {
 public:
  /// `lines[n]` is ISA interrupt n, or nullptr where PCI interrupts cannot go.
  explicit Piix3(const std::array<IrqLine*, 16>& lines);

  void write_config(unsigned offset, std::span<const u8> data) override;
  void set_pin(unsigned slot, bool level) override;

  /// Which of PIRQA to PIRQD (0 to 3) a slot's INTA# is wired to.
  static constexpr unsigned pirq_of(unsigned slot) { return (slot - 1) & 3; }

 private:
  void update(const std::scoped_lock<std::mutex>& held);

  std::array<IrqLine*, 16> lines_;
  std::mutex interrupt_mutex_;
  std::array<u32, 4> asserted_{};  ///< per PIRQ, a bit for each slot
  std::array<u8, 4> route_;
  u16 levels_ = 0;
};

}  // namespace anykvm::vmm
