// See irq_routing.h.
#include "vm/irq_routing.h"

#include <algorithm>
#include <cerrno>

#include "irqchip/apic_bus.h"

namespace anykvm::vm {

namespace {
constexpr unsigned chips = KVM_NR_IRQCHIPS, pins_per_chip = KVM_IOAPIC_NUM_PINS, pic_pins = 8;
constexpr u32 pit_gsi = 0;

struct Route {
  u32 gsi;
  bool is_msi;
  u32 chip, pin;  // !is_msi
  u32 address_low, address_high, data;
};
}  // namespace

struct IrqRouting::Table {
  std::vector<Route> routes;  ///< sorted by GSI
  std::vector<u32> first;     ///< of a GSI in routes; one more entry than there are GSIs
  int gsi_of[chips][pins_per_chip];

  std::span<const Route> of(u32 gsi) const {
    if (u64{gsi} + 1 >= first.size()) return {};
    return {routes.data() + first[gsi], routes.data() + first[gsi + 1]};
  }
};

IrqRouting::IrqRouting(irqchip::ApicBus& bus) : bus_(bus) { set_gsi_routing(0, {}); }

IrqRouting::~IrqRouting() {
  irqchip::IrqChips* irq_chips = chips_.load(std::memory_order_acquire);
  if (!irq_chips) return;
  irq_chips->destroy_pit();
  irq_chips->set_listener(nullptr);
}

void IrqRouting::attach(irqchip::IrqChips& irq_chips) {
  chips_.store(&irq_chips, std::memory_order_release);
  irq_chips.set_listener(this);
  std::vector<kvm_irq_routing_entry> entries;
  const auto add = [&](u32 gsi, u32 chip, u32 pin) {
    kvm_irq_routing_entry entry = {};
    entry.gsi = gsi;
    entry.type = KVM_IRQ_ROUTING_IRQCHIP;
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entries.push_back(entry);
  };
  for (u32 gsi = 0; gsi < pins_per_chip; ++gsi) {
    add(gsi, KVM_IRQCHIP_IOAPIC, gsi);
    if (gsi < 16) add(gsi, gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, gsi % 8);
  }
  set_gsi_routing(0, entries);
}

// --- the table -------------------------------------------------------------------------------------------------------

int IrqRouting::set_gsi_routing(u32 flags, std::span<const kvm_irq_routing_entry> entries) {
  if (flags != 0 || entries.size() > max_routes) return -EINVAL;
  auto next = std::make_shared<Table>();
  for (auto& chip : next->gsi_of) std::fill(std::begin(chip), std::end(chip), -1);
  u32 gsis = 0;
  for (const kvm_irq_routing_entry& entry : entries) {
    if (entry.gsi >= max_routes) return -EINVAL;
    Route route{.gsi = entry.gsi, .is_msi = entry.type == KVM_IRQ_ROUTING_MSI};
    if (entry.type == KVM_IRQ_ROUTING_MSI) {
      if (entry.flags & ~u32{KVM_MSI_VALID_DEVID}) return -EINVAL;
      route.address_low = entry.u.msi.address_lo;
      route.address_high = entry.u.msi.address_hi;
      route.data = entry.u.msi.data;
      if (bus_.x2apic_format() && route.address_high & 0xff) return -EINVAL;
    } else if (entry.type == KVM_IRQ_ROUTING_IRQCHIP) {
      route.chip = entry.u.irqchip.irqchip;
      route.pin = entry.u.irqchip.pin;
      if (entry.flags != 0 || !chips_.load(std::memory_order_acquire) || route.chip >= chips ||
          route.pin >= (route.chip == KVM_IRQCHIP_IOAPIC ? pins_per_chip : pic_pins))
        return -EINVAL;
      next->gsi_of[route.chip][route.pin] = static_cast<int>(route.gsi);
    } else {
      return -EINVAL;
    }
    gsis = std::max(gsis, entry.gsi + 1);
    next->routes.push_back(route);
  }
  std::stable_sort(next->routes.begin(), next->routes.end(),
                   [](const Route& a, const Route& b) { return a.gsi < b.gsi; });
  // A GSI is one message, or at most one pin of each chip.
  for (size_t i = 0; i < next->routes.size(); ++i)
    for (size_t j = i; j-- != 0 && next->routes[j].gsi == next->routes[i].gsi;) {
      const Route &a = next->routes[i], &b = next->routes[j];
      if (a.is_msi || b.is_msi || a.chip == b.chip) return -EINVAL;
    }
  next->first.assign(gsis + 1, 0);
  for (const Route& route : next->routes) ++next->first[route.gsi + 1];
  for (u32 gsi = 0; gsi < gsis; ++gsi) next->first[gsi + 1] += next->first[gsi];
  {
    std::lock_guard lock(table_mutex_);
    table_ = std::move(next);
  }
  std::lock_guard lock(listeners_mutex_);
  update_watched_pins();
  return 0;
}

std::shared_ptr<const IrqRouting::Table> IrqRouting::table() const {
  std::lock_guard lock(table_mutex_);
  return table_;
}

int IrqRouting::gsi_of(u32 chip, unsigned pin) const { return table()->gsi_of[chip][pin]; }

// --- raising ---------------------------------------------------------------------------------------------------------

int IrqRouting::set_irq(u32 gsi, bool level, unsigned source) {
  irqchip::IrqChips* irq_chips = chips_.load(std::memory_order_acquire);
  int result = -1;
  for (const std::shared_ptr<const Table> routes = table(); const Route& route : routes->of(gsi)) {
    int taken;
    if (route.is_msi)
      taken = level ? bus_.send(decode_msi(route.address_low, route.address_high, route.data)) : -1;
    else if (route.chip == KVM_IRQCHIP_IOAPIC)
      taken = irq_chips->set_ioapic_pin(route.pin, source, level);
    else
      taken = irq_chips->set_pic_line(route.chip * pic_pins + route.pin, source, level);
    if (taken >= 0) result = taken + std::max(result, 0);
  }
  return result;
}

/// SDM volume 3, 11.11.1 and 11.11.2; with KVM_CAP_X2APIC_API the address' upper half holds bits 8 - 31 of the ID.
irqchip::InterruptMessage IrqRouting::decode_msi(u32 address_low, u32 address_high, u32 data) const {
  return {
      .destination = (address_low >> 12 & 0xff) | (bus_.x2apic_format() ? address_high & 0xffffff00 : 0),
      .vector = static_cast<u8>(data),
      .mode = static_cast<irqchip::DeliveryMode>(data >> 8 & 7),
      .logical = (address_low >> 2 & 1) != 0,
      .level_triggered = (data >> 15 & 1) != 0,
      .redirect_hint = (address_low >> 3 & 1) != 0,
  };
}

int IrqRouting::signal_msi(const kvm_msi& msi) {
  if (msi.flags & ~u32{KVM_MSI_VALID_DEVID}) return -EINVAL;
  if (bus_.x2apic_format() && msi.address_hi & 0xff) return -EINVAL;
  return bus_.send(decode_msi(msi.address_lo, msi.address_hi, msi.data));
}

bool IrqRouting::pulse_irq0() {
  const int result = pulse_irq(pit_gsi, irqchip::irq_source_pit);
  bus_.pulse_lint0_nmi();
  return result >= 0;
}

// --- what the guest does with it -------------------------------------------------------------------------------------

void IrqRouting::interrupt_ended(u32 chip, unsigned pin) {
  const int gsi = gsi_of(chip, pin);
  if (gsi < 0) return;
  if (gsi == pit_gsi)
    if (irqchip::Pit* pit = chips_.load(std::memory_order_acquire)->pit()) pit->tick_ended();
  std::lock_guard lock(listeners_mutex_);
  for (const Registration& registration : listeners_)
    if (registration.gsi == static_cast<u32>(gsi)) registration.listener->interrupt_ended(registration.gsi);
}

void IrqRouting::pin_unmasked(u32 chip, unsigned pin) {
  if (gsi_of(chip, pin) != pit_gsi) return;
  if (irqchip::Pit* pit = chips_.load(std::memory_order_acquire)->pit()) pit->irq0_unmasked();
}

void IrqRouting::add_end_listener(u32 gsi, IrqEndListener& listener) {
  std::lock_guard lock(listeners_mutex_);
  listeners_.push_back({gsi, &listener});
  update_watched_pins();
}

void IrqRouting::remove_end_listener(u32 gsi, IrqEndListener& listener) {
  std::lock_guard lock(listeners_mutex_);
  std::erase_if(listeners_, [&](const Registration& r) { return r.gsi == gsi && r.listener == &listener; });
  update_watched_pins();
}

/// With listeners_mutex_ held. The PIT's GSI is watched always.
void IrqRouting::update_watched_pins() {
  irqchip::IrqChips* irq_chips = chips_.load(std::memory_order_acquire);
  if (!irq_chips) return;
  const std::shared_ptr<const Table> routes = table();
  u32 pins = 0;
  for (unsigned pin = 0; pin < pins_per_chip; ++pin) {
    const int gsi = routes->gsi_of[KVM_IRQCHIP_IOAPIC][pin];
    const bool heard = std::any_of(listeners_.begin(), listeners_.end(),
                                   [&](const Registration& r) { return static_cast<int>(r.gsi) == gsi; });
    if (gsi == static_cast<int>(pit_gsi) || heard) pins |= 1u << pin;
  }
  irq_chips->set_watched_pins(pins);
}

}  // namespace anykvm::vm
