// An interrupt line that remembers.
#pragma once

#include <atomic>

#include "vmm/irq_line.h"

namespace anykvm::vmm {

struct RecordingIrqLine final : IrqLine {
  void set(bool high) override {
    if (high && !level) ++edges;
    level = high;
  }
  std::atomic<bool> level = false;
  std::atomic<unsigned> edges = 0;
};

}  // namespace anykvm::vmm
