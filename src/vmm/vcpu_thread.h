// One vCPU on one thread: KVM_RUN, and the exits to the buses.
#pragma once

#include <atomic>
#include <thread>

#include "anykvm/anykvm.h"
#include "vmm/bus.h"
#include "vmm/guest_memory.h"
#include "vmm/run_outcome.h"

namespace anykvm::vmm {

class VcpuThread {
 public:
  /// All references outlive the thread. The thread begins with start().
  VcpuThread(Vcpu vcpu, const Bus& ports, const Bus& mmio, const GuestMemory& memory, OutcomeBox& outcome)
      : vcpu_(std::move(vcpu)), ports_(ports), mmio_(mmio), memory_(memory), outcome_(outcome) {}
  ~VcpuThread() { stop(); }

  Vcpu& vcpu() { return vcpu_; }
  void start();
  /// Brings the vCPU out of guest mode and waits for its thread.
  void stop();

 private:
  void run();
  bool handle(const Exit& exit);
  void report(Outcome::Kind kind, const std::string& what, std::span<const u8> instruction = {});
  std::string instruction_bytes(u64 rip) const;

  Vcpu vcpu_;
  const Bus& ports_;
  const Bus& mmio_;
  const GuestMemory& memory_;
  OutcomeBox& outcome_;
  std::thread thread_;
  std::atomic<bool> stopping_{false}, ended_{false};
};

}  // namespace anykvm::vmm
