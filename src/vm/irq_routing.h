// Which chip's pin, or which message, a GSI is: the table of KVM_SET_GSI_ROUTING, and everything that raises a GSI.
// Reference: api.rst 4.25 KVM_IRQ_LINE, 4.52 KVM_SET_GSI_ROUTING, 4.70 KVM_SIGNAL_MSI, 4.75 KVM_IRQFD.
//
// Thread-safety: everything may be called from any thread (an irqfd's, a vCPU's, the timer's). Raising a GSI copies a
// shared pointer under a short lock and does not allocate. Ends of interrupts are reported with listeners_mutex_ held,
// so a listener must not add or remove listeners; it may raise and lower GSIs.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "anykvm/kvm.h"
#include "irqchip/interrupt_message.h"
#include "irqchip/irqchip.h"
#include "x86/types.h"

namespace anykvm::vm {

/// Wants to know when the guest ends the interrupts of a GSI: a resampling irqfd.
class IrqEndListener {
 public:
  virtual void interrupt_ended(u32 gsi) = 0;

 protected:
  ~IrqEndListener() = default;
};

class IrqRouting final : public irqchip::IrqChipsListener, public irqchip::PitOutput {
 public:
  static constexpr u32 max_routes = 4096;  ///< KVM_CAP_IRQ_ROUTING

  /// With an empty table.
  explicit IrqRouting(irqchip::ApicBus& bus);
  /// Before the chips, whose PIT it takes away: no tick finds its way here any more. No vCPU runs.
  ~IrqRouting();
  IrqRouting(const IrqRouting&) = delete;
  IrqRouting& operator=(const IrqRouting&) = delete;

  /// KVM_CREATE_IRQCHIP: from now on entries may name the chips; installs the kernel's default table (GSI 0 - 15: PIC
  /// and I/O APIC, 16 - 23: I/O APIC) and becomes the chips' listener.
  void attach(irqchip::IrqChips& chips);

  /// KVM_SET_GSI_ROUTING: replaces the table. -EINVAL and no change for flags, more than max_routes entries, a GSI or
  /// pin out of range, an unknown type, entry flags, or two entries of a GSI that exclude each other. The VM has
  /// checked that there is an interrupt controller.
  int set_gsi_routing(u32 flags, std::span<const kvm_irq_routing_entry> entries);

  /// Sets a GSI's level for one source. < 0: ignored (no route, masked); 0: coalesced; > 0: delivered. For MSI routes
  /// level 1 sends the message.
  int set_irq(u32 gsi, bool level, unsigned source = irqchip::irq_source_client);
  /// An edge: up and down again. The result of going up.
  int pulse_irq(u32 gsi, unsigned source = irqchip::irq_source_client) {
    const int result = set_irq(gsi, true, source);
    set_irq(gsi, false, source);
    return result;
  }

  /// KVM_SIGNAL_MSI: > 0 delivered, 0 not taken, -1 nobody; -EINVAL for flags or reserved address bits.
  int signal_msi(const kvm_msi& msi);

  void add_end_listener(u32 gsi, IrqEndListener& listener);
  /// When it returns, the listener is not being called and will not be.
  void remove_end_listener(u32 gsi, IrqEndListener& listener);

  void interrupt_ended(u32 chip, unsigned pin) override;
  void pin_unmasked(u32 chip, unsigned pin) override;
  bool pulse_irq0() override;

 private:
  struct Table;
  std::shared_ptr<const Table> table() const;
  int gsi_of(u32 chip, unsigned pin) const;
  void update_watched_pins();
  irqchip::InterruptMessage decode_msi(u32 address_low, u32 address_high, u32 data) const;

  irqchip::ApicBus& bus_;
  std::atomic<irqchip::IrqChips*> chips_{nullptr};
  mutable std::mutex table_mutex_;
  std::shared_ptr<const Table> table_;

  struct Registration {
    u32 gsi;
    IrqEndListener* listener;
  };
  std::mutex listeners_mutex_;
  std::vector<Registration> listeners_;
};

}  // namespace anykvm::vm
