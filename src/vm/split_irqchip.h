// The split irqchip's side of an EOI: which vectors belong to the I/O APIC that the client emulates.
// Reference: api.rst 7.5 KVM_CAP_SPLIT_IRQCHIP, chapter 5 KVM_EXIT_IOAPIC_EOI.
#pragma once

#include <atomic>
#include <span>

#include "anykvm/kvm.h"
#include "irqchip/apic_bus.h"
#include "x86/types.h"

namespace anykvm::vm {

class SplitIrqChip final : public irqchip::EoiSink {
 public:
  /// reserved_pins: GSIs below it are the I/O APIC's pins. Becomes the bus's EOI sink.
  SplitIrqChip(irqchip::ApicBus& bus, u32 reserved_pins);
  ~SplitIrqChip();
  SplitIrqChip(const SplitIrqChip&) = delete;
  SplitIrqChip& operator=(const SplitIrqChip&) = delete;

  void routes_changed(std::span<const kvm_irq_routing_entry> entries);

  bool wants_edge_eoi(u8) const override { return false; }
  void eoi(u8 vector, bool level_triggered, irqchip::ApicClient& from) override;

 private:
  irqchip::ApicBus& bus_;
  const u32 reserved_pins_;
  std::atomic<u64> vectors_[4] = {};  ///< of level-triggered routes of those pins
};

}  // namespace anykvm::vm
