// Interrupt lines by KVM_IRQ_LINE.
#include "vmm/irq_line.h"

#include "anykvm/vm.h"

namespace anykvm::vmm {

void GsiLine::set(bool level) { vm_.set_irq_line(gsi_, level); }

}  // namespace anykvm::vmm
