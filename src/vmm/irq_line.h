// One interrupt line of a device to the interrupt controllers.
#pragma once

#include "x86/types.h"

namespace anykvm {
class Vm;
}

namespace anykvm::vmm {

/// What a device holds of the interrupt controllers. Any thread; tests put their own in its place.
class IrqLine {
 public:
  virtual ~IrqLine() = default;

  /// Drives the line. Setting the level it has already changes nothing.
  virtual void set(bool level) = 0;

  void raise() { set(true); }
  void lower() { set(false); }
  /// An edge: what an edge-triggered device (the RTC, the keyboard controller) sends per event.
  void pulse() {
    set(true);
    set(false);
  }
};

/// The line of a global system interrupt (GSI), by KVM_IRQ_LINE.
class GsiLine final : public IrqLine {
 public:
  GsiLine(Vm& vm, u32 gsi) : vm_(vm), gsi_(gsi) {}
  void set(bool level) override;

 private:
  Vm& vm_;
  u32 gsi_;
};

}  // namespace anykvm::vmm
