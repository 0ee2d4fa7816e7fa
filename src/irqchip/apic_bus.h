// The bus between the local APICs of a machine, and between them and the I/O APIC: who is addressed by a destination,
// and where an EOI goes.
// Reference: SDM volume 3, 11.6.2 "Determining IPI Destination", 11.12.10 "Determining IPI Destination in x2APIC Mode".
//
// Thread-safety: everything may be called from any thread. send() takes no lock; it may be called with a chip's lock
// held, and calls ApicClient's any-thread methods.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "irqchip/interrupt_message.h"
#include "x86/types.h"

namespace anykvm::irqchip {

class ApicClient;
class LocalApic;

/// Where the end of an interrupt is reported when it did not come from another local APIC.
class EoiSink {
 public:
  /// Whether eoi() must be told of this vector although it is edge-triggered (something waits for its end). Any thread.
  virtual bool wants_edge_eoi(u8 vector) const = 0;
  /// Called on the vCPU's thread, with no lock of an APIC held.
  /// from: the CPU that it belongs to.
  virtual void eoi(u8 vector, bool level_triggered, ApicClient& from) = 0;

 protected:
  ~EoiSink() = default;
};

class ApicBus {
 public:
  static constexpr u32 max_apics = 1024;  ///< as Vm::max_vcpus
  static constexpr u32 max_ids = 4096;    ///< as Vm::max_vcpu_ids

  ApicBus();
  ~ApicBus();
  ApicBus(const ApicBus&) = delete;
  ApicBus& operator=(const ApicBus&) = delete;

  /// Delivers. source is the sender of an IPI, nullptr for the I/O APIC and MSIs.
  /// > 0: how many APICs took it; 0: the addressed APICs did not (disabled, or nobody has that ID); -1: nobody at all
  /// listens. KVM_SIGNAL_MSI and KVM_IRQ_LINE_STATUS return this.
  int send(const InterruptMessage& message, const LocalApic* source = nullptr);

  /// The APIC with this (initial, 32-bit) ID, nullptr if there is none. Good as long as the caller knows that vCPU to
  /// live.
  LocalApic* find(u32 apic_id) const;

  /// The 8259's INTR went up: wakes the first vCPU whose LINT0 takes it.
  void wake_pic_taker();
  /// A tick of the 8254 reaches the LINT0 of every APIC that has it in NMI mode (the guest's NMI watchdog), as in KVM.
  void pulse_lint0_nmi();

  /// nullptr: nobody (also the default). The sink must outlive the APICs, or be taken away while no vCPU runs.
  void set_eoi_sink(EoiSink* sink) { eoi_sink_.store(sink, std::memory_order_release); }
  EoiSink* eoi_sink() const { return eoi_sink_.load(std::memory_order_acquire); }

  /// KVM_CAP_X2APIC_API: 32-bit IDs in MSI routes and kvm_lapic_state; 0xff no longer broadcasts to x2APICs.
  void set_x2apic_format(bool on) { x2apic_format_.store(on, std::memory_order_relaxed); }
  bool x2apic_format() const { return x2apic_format_.load(std::memory_order_relaxed); }
  /// KVM_CAP_X86_APIC_BUS_CYCLES_NS: of the timers' clock. Before there are APICs.
  void set_bus_cycle_ns(u64 ns) { bus_cycle_ns_ = ns; }
  u64 bus_cycle_ns() const { return bus_cycle_ns_; }
  /// KVM_X86_QUIRK_LINT0_REENABLED, _LAPIC_MMIO_HOLE: the boot CPU's LINT0 is in ExtINT mode after reset; the register
  /// page stays the APIC's while it is off or in x2APIC mode.
  void disable_lint0_quirk() { lint0_quirk_.store(false, std::memory_order_relaxed); }
  void disable_mmio_hole_quirk() { mmio_hole_quirk_.store(false, std::memory_order_relaxed); }
  bool has_lint0_quirk() const { return lint0_quirk_.load(std::memory_order_relaxed); }
  bool has_mmio_hole_quirk() const { return mmio_hole_quirk_.load(std::memory_order_relaxed); }
  void disable_broadcast_quirk() { broadcast_quirk_.store(false, std::memory_order_relaxed); }

 private:
  friend class LocalApic;

  void add(LocalApic& apic);
  /// Waits until no send() can hold a pointer to it.
  void remove(LocalApic& apic);
  bool matches(const LocalApic& apic, const InterruptMessage& message, const LocalApic* source) const;

  int send_to_one_of(const InterruptMessage& message, const LocalApic* source) const;
  /// Calls f(LocalApic&) until it returns false. The APICs stay alive meanwhile.
  template <class F>
  void for_each(F f) const;

  /// While one exists, remove() waits.
  class Reader {
   public:
    explicit Reader(const ApicBus& bus) : bus_(bus) { bus_.readers_.fetch_add(1); }
    ~Reader() { bus_.readers_.fetch_sub(1, std::memory_order_release); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

   private:
    const ApicBus& bus_;
  };

  std::mutex mutex_;  ///< add and remove
  mutable std::atomic<u32> readers_{0};
  std::atomic<u32> slots_{0};  ///< slots in use so far, holes included
  std::unique_ptr<std::atomic<LocalApic*>[]> apics_;
  std::unique_ptr<std::atomic<LocalApic*>[]> by_id_;
  std::atomic<u32> moved_ids_{0};  ///< APICs whose xAPIC ID the guest or client has changed: no shortcut by ID then
  std::atomic<EoiSink*> eoi_sink_{nullptr};
  std::atomic<bool> x2apic_format_{false}, broadcast_quirk_{true}, lint0_quirk_{true}, mmio_hole_quirk_{true};
  u64 bus_cycle_ns_ = 1;
};

}  // namespace anykvm::irqchip
