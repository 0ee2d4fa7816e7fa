// The interrupt controllers of one machine that all its CPUs share: the PIC pair and the I/O APIC behind one lock, and
// the PIT beside them.
// Reference: api.rst 4.24 KVM_CREATE_IRQCHIP, 4.26 KVM_GET_IRQCHIP, 4.71 KVM_CREATE_PIT2.
//
// Thread-safety: everything may be called from any thread. The lock is held while a message is sent over the APIC bus
// (so while ApicClient::wake() and its kind run), never while the listener is called.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "anykvm/kvm.h"
#include "irqchip/apic_bus.h"
#include "irqchip/ioapic.h"
#include "irqchip/pic.h"
#include "irqchip/pit.h"
#include "x86/types.h"

namespace anykvm::irqchip {

/// Parties that may drive one interrupt line; the line is the OR of their levels.
enum IrqSource : unsigned { irq_source_client = 0, irq_source_resample = 1, irq_source_pit = 2 };

/// Who wants to know what the guest does with its interrupts. Called without a lock of the chips, on the thread that
/// caused it.
class IrqChipsListener {
 public:
  /// The guest has ended the interrupt of a pin. chip: KVM_IRQCHIP_PIC_MASTER, _SLAVE (pin 0 - 7) or _IOAPIC.
  virtual void interrupt_ended(u32 chip, unsigned pin) = 0;
  /// The guest has unmasked a pin.
  virtual void pin_unmasked(u32 chip, unsigned pin) = 0;

 protected:
  ~IrqChipsListener() = default;
};

class IrqChips final : public EoiSink {
 public:
  /// Becomes the bus's EOI sink.
  explicit IrqChips(ApicBus& bus);
  ~IrqChips();
  IrqChips(const IrqChips&) = delete;
  IrqChips& operator=(const IrqChips&) = delete;

  /// Set once, before any vCPU runs. The listener outlives the chips' use.
  void set_listener(IrqChipsListener* listener) { listener_.store(listener, std::memory_order_release); }
  /// The I/O APIC pins whose edge-triggered EOIs the listener needs; level-triggered ones are always reported.
  void set_watched_pins(u32 pins);

  // --- lines ---------------------------------------------------------------------------------------------------------
  /// line: 0 - 15, pin: 0 - 23. Results as KVM_IRQ_LINE_STATUS: < 0 ignored, 0 coalesced, > 0 delivered.
  int set_pic_line(unsigned line, unsigned source, bool level);
  int set_ioapic_pin(unsigned pin, unsigned source, bool level);

  // --- the guest's accesses; false: not a port or address of these chips ---------------------------------------------
  bool pio_read(u16 port, void* data, unsigned size);
  bool pio_write(u16 port, const void* data, unsigned size);
  bool mmio_read(Gpa gpa, void* data, unsigned length);
  bool mmio_write(Gpa gpa, const void* data, unsigned length);

  // --- the 8259's INTR -----------------------------------------------------------------------------------------------
  /// A relaxed load. Only a vCPU with LocalApic::takes_pic_output() may look at it.
  bool pic_output() const { return pic_output_.load(std::memory_order_acquire); }
  /// The acknowledge cycle; -1 when INTR is down (another vCPU was faster).
  int pic_acknowledge();

  // --- the PIT -------------------------------------------------------------------------------------------------------
  /// KVM_CREATE_PIT2: -EEXIST when there is one. Of the flags only KVM_PIT_SPEAKER_DUMMY means something; others are
  /// not looked at, as in KVM. The output must stay until destroy_pit().
  int create_pit(os::TimerQueue& timers, PitOutput& output, u32 flags);
  /// Before its output goes; no vCPU runs any more. When it returns, no tick is on its way.
  void destroy_pit();
  Pit* pit() const { return pit_published_.load(std::memory_order_acquire); }  ///< nullptr: none

  // --- state ---------------------------------------------------------------------------------------------------------
  /// chip.chip_id says which; -EINVAL if there is none such.
  int get_state(kvm_irqchip& chip);
  int set_state(const kvm_irqchip& chip);

  // --- EoiSink -------------------------------------------------------------------------------------------------------
  bool wants_edge_eoi(u8 vector) const override {
    return edge_eoi_vectors_[vector / 64].load(std::memory_order_relaxed) >> (vector % 64) & 1;
  }
  void eoi(u8 vector, bool level_triggered, ApicClient& from) override;

 private:
  struct News;
  void collect(News& news);
  void tell(const News& news);
  void update_edge_eoi_vectors();

  ApicBus& bus_;
  std::mutex mutex_;
  Pic pic_;
  IoApic ioapic_;
  u32 watched_pins_ = 0;
  std::atomic<bool> pic_output_{false};
  std::atomic<u64> edge_eoi_vectors_[4] = {};
  std::atomic<IrqChipsListener*> listener_{nullptr};
  std::unique_ptr<Pit> pit_;
  std::atomic<Pit*> pit_published_{nullptr};
};

}  // namespace anykvm::irqchip
