// Registers that only remember, and the interrupt router.
#include "vmm/pci/bridges.h"

namespace anykvm::vmm {

namespace {

constexpr u16 intel = 0x8086, red_hat_pci = 0x1b36, red_hat_qumranet = 0x1af4;
constexpr u16 emulated_pc = 0x1100;
constexpr unsigned pam0 = 0x59, smram = 0x72, pirq_route = 0x60;
constexpr u8 route_disabled = 0x80;

}  // namespace

GenericHostBridge::GenericHostBridge() : PciFunction({red_hat_pci, 0x0008, 0x06'0000}) {}

I440fx::I440fx() : PciFunction({intel, 0x1237, 0x06'0000, 2, red_hat_qumranet, emulated_pc}) {
  for (unsigned i = 0; i < 7; ++i) allow_writes(pam0 + i, 0x33, 1);
  set_config(smram, 0x02, 1);
  allow_writes(smram, 0x78, 1);
}

Piix3::Piix3(const std::array<IrqLine*, 16>& lines) : PciFunction({intel, 0x7000, 0x06'0100}), lines_(lines) {
  route_.fill(route_disabled);
  for (unsigned i = 0; i < 4; ++i) {
    set_config(pirq_route + i, route_disabled, 1);
    allow_writes(pirq_route + i, 0x8f, 1);
  }
}

void Piix3::write_config(unsigned offset, std::span<const u8> data) {
  PciFunction::write_config(offset, data);
  const std::scoped_lock held(interrupt_mutex_);
  for (unsigned i = 0; i < 4; ++i) route_[i] = config8(pirq_route + i);
  update(held);
}

void Piix3::set_pin(unsigned slot, bool level) {
  const std::scoped_lock held(interrupt_mutex_);
  u32& slots = asserted_[pirq_of(slot)];
  slots = level ? slots | 1u << slot : slots & ~(1u << slot);
  update(held);
}

void Piix3::update(const std::scoped_lock<std::mutex>&) {
  u16 wanted = 0;
  for (unsigned i = 0; i < 4; ++i)
    if (asserted_[i] && !(route_[i] & route_disabled)) wanted |= u16(1u << (route_[i] & 15));
  const u16 changed = wanted ^ levels_;
  levels_ = wanted;
  for (unsigned irq = 0; irq < 16; ++irq)
    if ((changed >> irq & 1) && lines_[irq]) lines_[irq]->set(wanted >> irq & 1);
}

}  // namespace anykvm::vmm
