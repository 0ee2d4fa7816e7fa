#include "vm/split_irqchip.h"

#include "irqchip/lapic.h"

namespace anykvm::vm {

SplitIrqChip::SplitIrqChip(irqchip::ApicBus& bus, u32 reserved_pins) : bus_(bus), reserved_pins_(reserved_pins) {
  bus_.set_eoi_sink(this);
}

SplitIrqChip::~SplitIrqChip() { bus_.set_eoi_sink(nullptr); }

void SplitIrqChip::routes_changed(std::span<const kvm_irq_routing_entry> entries) {
  u64 vectors[4] = {};
  for (const kvm_irq_routing_entry& entry : entries) {
    const u32 data = entry.u.msi.data;
    const bool level_triggered = data >> 15 & 1;
    if (entry.gsi < reserved_pins_ && entry.type == KVM_IRQ_ROUTING_MSI && level_triggered)
      vectors[(data & 0xff) / 64] |= 1ull << data % 64;
  }
  for (unsigned word = 0; word < 4; ++word) vectors_[word].store(vectors[word], std::memory_order_relaxed);
}

void SplitIrqChip::eoi(u8 vector, bool level_triggered, irqchip::ApicClient& from) {
  if (level_triggered && vectors_[vector / 64].load(std::memory_order_relaxed) >> vector % 64 & 1)
    from.ioapic_eoi(vector);
}

}  // namespace anykvm::vm
