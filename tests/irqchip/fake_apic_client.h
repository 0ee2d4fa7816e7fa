// vCPUs that only remember what their APICs asked of them, and a machine of several.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "irqchip/apic_bus.h"
#include "irqchip/lapic.h"
#include "os/clock.h"
#include "os/timer_queue.h"

namespace anykvm::irqchip::test {

class FakeApicClient : public ApicClient {
 public:
  void wake() override {
    ++wakes;
    std::lock_guard lock(mutex_);
    woken_ = true;
    condition_.notify_all();
  }
  void signal_nmi() override { ++nmis; }
  void signal_smi() override { ++smis; }
  void signal_init() override { ++inits; }
  void signal_sipi(u8 vector) override { ++sipis, sipi_vector = vector; }
  void signal_unhalt() override { ++unhalts; }
  u64 tsc_deadline_ns(u64 guest_tsc) override { return guest_tsc; }  // a TSC of 1 GHz that is the monotonic clock

  /// As HLT: false after two seconds.
  bool wait_for_wake() {
    std::unique_lock lock(mutex_);
    const bool woken = condition_.wait_for(lock, std::chrono::seconds(2), [&] { return woken_; });
    woken_ = false;
    return woken;
  }

  std::atomic<int> wakes{0}, nmis{0}, smis{0}, inits{0}, sipis{0}, unhalts{0}, sipi_vector{-1};

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  bool woken_ = false;
};

/// The offsets of the register page that the tests use.
namespace reg {
inline constexpr u32 id = 0x20, version = 0x30, tpr = 0x80, ppr = 0xa0, eoi = 0xb0, ldr = 0xd0, dfr = 0xe0, svr = 0xf0,
                     isr = 0x100, tmr = 0x180, irr = 0x200, esr = 0x280, icr = 0x300, icr_high = 0x310,
                     lvt_timer = 0x320, lvt_thermal = 0x330, lvt_lint0 = 0x350, lvt_lint1 = 0x360, lvt_error = 0x370,
                     initial_count = 0x380, current_count = 0x390, divide = 0x3e0, self_ipi = 0x3f0;
}

inline u32 read(LocalApic& apic, u32 offset) {
  u32 value;
  apic.mmio_read(offset, &value, 4);
  return value;
}
inline void write(LocalApic& apic, u32 offset, u32 value) { apic.mmio_write(offset, &value, 4); }

/// Acknowledges until pending() has nothing more to give; the vectors in that order, each ended at once.
inline std::vector<int> take_all(LocalApic& apic) {
  std::vector<int> vectors;
  for (int vector; (vector = apic.acknowledge()) >= 0;) {
    vectors.push_back(vector);
    write(apic, reg::eoi, 0);
  }
  return vectors;
}

/// APICs 0 .. n-1 with CPUID's x2APIC and TSC-deadline, enabled by software in flat mode.
struct FakeMachine {
  explicit FakeMachine(unsigned cpus) {
    for (u32 id = 0; id < cpus; ++id) {
      clients.push_back(std::make_unique<FakeApicClient>());
      apics.push_back(std::make_unique<LocalApic>(id, *clients.back(), bus, timers, id == 0));
      LocalApic& apic = *apics.back();
      apic.set_features({.x2apic = true, .tsc_deadline = true, .physical_address_bits = 46});
      write(apic, reg::svr, 0x1ff);
      write(apic, reg::ldr, 1u << (24 + id % 8));
    }
  }
  LocalApic& operator[](unsigned cpu) { return *apics[cpu]; }
  void enter_x2apic() {
    for (auto& apic : apics) EXPECT_EQ(apic->set_base(apic->base() | LocalApic::base_x2apic), 0);
  }
  /// Which APICs have the vector in their IRR; clears it.
  u32 takers(u8 vector) {
    u32 mask = 0;
    for (unsigned cpu = 0; cpu < apics.size(); ++cpu)
      for (int taken : take_all(*apics[cpu]))
        if (taken == vector) mask |= 1u << cpu;
    return mask;
  }

  os::TimerQueue timers;
  ApicBus bus;
  std::vector<std::unique_ptr<FakeApicClient>> clients;
  std::vector<std::unique_ptr<LocalApic>> apics;
};

}  // namespace anykvm::irqchip::test
