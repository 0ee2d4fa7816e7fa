// Eventfds that raise interrupts: a thread of the VM, started with the first irqfd, waits for them and raises their
// GSIs. A resampling irqfd keeps its line up until the guest has ended the interrupt, then tells the client through a
// second eventfd.
// Reference: api.rst 4.75 KVM_IRQFD.
//
// A client that closes an eventfd without deassigning it leaves the irqfd in place (this library holds a duplicate)
// until the VM goes; the kernel would notice the close.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "anykvm/kvm.h"
#include "vm/event_fd.h"
#include "vm/irq_routing.h"
#include "x86/types.h"

namespace anykvm::vm {

class IrqFds {
 public:
  explicit IrqFds(IrqRouting& routing) : routing_(routing) {}
  ~IrqFds();

  /// KVM_IRQFD, once there is an interrupt controller.
  int ioctl(const kvm_irqfd& args);

 private:
  /// All resampling irqfds of one GSI: they share its line.
  class Resampler final : public IrqEndListener {
   public:
    Resampler(IrqRouting& routing, u32 gsi);
    ~Resampler();
    void interrupt_ended(u32 gsi) override;

    const u32 gsi;
    std::mutex mutex;  ///< of events; a leaf
    std::list<EventFd> events;

   private:
    IrqRouting& routing_;
  };
  struct Entry {
    u64 token;
    u32 gsi;
    EventFd event;
    std::shared_ptr<Resampler> resampler;  ///< nullptr: an edge per event
    std::list<EventFd>::iterator resample_event;
  };

  int assign(const kvm_irqfd& args);
  int deassign(const kvm_irqfd& args);
  int start();
  void run();
  void raise(u64 token);
  void remove(std::list<Entry>::iterator entry);

  IrqRouting& routing_;
  std::mutex mutex_;  ///< held while an interrupt is raised, so that none is after a deassign
  std::list<Entry> entries_;
  u64 next_token_ = 1;  ///< 0: stop_
  int poll_fd_ = -1;
  EventFd stop_;
  std::thread thread_;
};

}  // namespace anykvm::vm
