// See apic_bus.h.
#include "irqchip/apic_bus.h"

#include <thread>

#include "irqchip/lapic.h"

namespace anykvm::irqchip {

namespace {
constexpr u32 xapic_broadcast = 0xff, x2apic_broadcast = ~0u;
constexpr u32 dfr_flat = 0xffffffff, dfr_cluster = 0x0fffffff;
}  // namespace

ApicBus::ApicBus()
    : apics_(std::make_unique<std::atomic<LocalApic*>[]>(max_apics)),
      by_id_(std::make_unique<std::atomic<LocalApic*>[]>(max_ids)) {}

ApicBus::~ApicBus() = default;

void ApicBus::add(LocalApic& apic) {
  std::lock_guard lock(mutex_);
  u32 slot = 0;
  while (slot < slots_.load(std::memory_order_relaxed) && apics_[slot].load(std::memory_order_relaxed)) ++slot;
  if (slot == max_apics) return;  // the VM has refused that many vCPUs
  apics_[slot].store(&apic);
  if (slot == slots_.load(std::memory_order_relaxed)) slots_.store(slot + 1);
  if (apic.id() < max_ids) by_id_[apic.id()].store(&apic);
}

void ApicBus::remove(LocalApic& apic) {
  {
    std::lock_guard lock(mutex_);
    for (u32 slot = 0; slot < slots_.load(std::memory_order_relaxed); ++slot)
      if (apics_[slot].load(std::memory_order_relaxed) == &apic) apics_[slot].store(nullptr);
    if (apic.id() < max_ids && by_id_[apic.id()].load(std::memory_order_relaxed) == &apic)
      by_id_[apic.id()].store(nullptr);
  }
  while (readers_.load() != 0) std::this_thread::yield();
}

template <class F>
void ApicBus::for_each(F f) const {
  for (u32 slot = 0; slot < slots_.load(std::memory_order_acquire); ++slot)
    if (LocalApic* apic = apics_[slot].load(); apic && !f(*apic)) return;
}

LocalApic* ApicBus::find(u32 apic_id) const { return apic_id < max_ids ? by_id_[apic_id].load() : nullptr; }

bool ApicBus::matches(const LocalApic& apic, const InterruptMessage& message, const LocalApic* source) const {
  using Register = LocalApic::Register;
  if (!apic.hardware_enabled()) return false;
  switch (message.shorthand) {
    case Shorthand::self: return &apic == source;
    case Shorthand::all: return true;
    case Shorthand::others: return &apic != source;
    case Shorthand::none: break;
  }
  const bool x2apic = apic.x2apic_mode();
  u32 destination = message.destination;
  // The I/O APIC and 8-bit MSIs cannot say the x2APIC broadcast.
  if (!source && x2apic && destination == xapic_broadcast && broadcast_quirk_.load(std::memory_order_relaxed))
    destination = x2apic_broadcast;
  if (destination == (x2apic ? x2apic_broadcast : xapic_broadcast)) return true;

  if (!message.logical) {
    // An ID that xAPIC cannot express reaches a CPU that has not switched to x2APIC yet (hot-plug), as in KVM.
    return destination == (x2apic || destination > 0xff ? apic.id() : apic.get(Register::id) >> 24);
  }
  const u32 ldr = apic.get(Register::ldr);
  if (x2apic) return ldr >> 16 == destination >> 16 && (ldr & destination & 0xffff) != 0;
  const u32 logical_id = ldr >> 24;
  switch (apic.get(Register::dfr)) {
    case dfr_flat: return (logical_id & destination) != 0;
    case dfr_cluster: return logical_id >> 4 == destination >> 4 && (logical_id & destination & 15) != 0;
    default: return false;
  }
}

int ApicBus::send(const InterruptMessage& message, const LocalApic* source) {
  Reader reader(*this);
  const bool broadcast = message.shorthand == Shorthand::none &&
                         (message.destination == xapic_broadcast || message.destination == x2apic_broadcast);
  if (message.shorthand == Shorthand::none && !message.logical && !broadcast &&
      moved_ids_.load(std::memory_order_relaxed) == 0) {
    LocalApic* apic = find(message.destination);
    return apic && matches(*apic, message, source) && apic->accept(message);
  }
  const bool one_of = message.mode == DeliveryMode::lowest_priority || message.redirect_hint;
  if (one_of && !(broadcast && !message.logical)) return send_to_one_of(message, source);

  int taken = 0;
  bool matched = false;
  for_each([&](LocalApic& apic) {
    if (matches(apic, message, source)) {
      matched = true;
      taken += apic.accept(message);
    }
    return true;
  });
  return matched || !broadcast ? taken : -1;
}

/// KVM's vector hashing: which of the destinations gets it depends on the vector alone, so that each interrupt stays on
/// its CPU.
int ApicBus::send_to_one_of(const InterruptMessage& message, const LocalApic* source) const {
  const auto is_candidate = [&](const LocalApic& apic) {
    return apic.software_enabled() && matches(apic, message, source);
  };
  u32 candidates = 0;
  for_each([&](LocalApic& apic) {
    candidates += is_candidate(apic);
    return true;
  });
  if (candidates == 0) return -1;
  u32 skip = message.vector % candidates;
  LocalApic* chosen = nullptr;
  for_each([&](LocalApic& apic) {
    if (!is_candidate(apic)) return true;
    chosen = &apic;
    return skip-- != 0;
  });
  return chosen && chosen->accept(message);
}

void ApicBus::wake_pic_taker() {
  Reader reader(*this);
  for_each([](LocalApic& apic) {
    if (!apic.takes_pic_output()) return true;
    apic.client().wake();
    return false;
  });
}

void ApicBus::pulse_lint0_nmi() {
  Reader reader(*this);
  for_each([](LocalApic& apic) {
    if (apic.hardware_enabled() && apic.lint0_in_nmi_mode()) apic.client().signal_nmi();
    return true;
  });
}

}  // namespace anykvm::irqchip
