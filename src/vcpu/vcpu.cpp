#include "vcpu/vcpu.h"

#include <unistd.h>

#include "engine/engine.h"
#include "irqchip/apic_bus.h"
#include "vcpu/signal_mask.h"
#include "vm/vm.h"

namespace anykvm::vcpu {

Vcpu::Vcpu(std::shared_ptr<vm::Vm> vm, u32 id, kvm_run* run)
    : vm_(std::move(vm)),
      id_(id),
      run_(run),
      cpu_(*this),
      paravirt_(cpu_, vm_->clock(), static_cast<u32>(vm_->get_tsc_khz())),
      trace_(Trace::begin(id)) {
  const bool is_boot_cpu = vm_->is_boot_cpu(id);
  if (vm_->has_local_apics()) {
    apic_ = std::make_unique<irqchip::LocalApic>(id, *this, vm_->apic_bus(), vm_->timers(), is_boot_cpu);
    paravirt_.set_local_apic(*apic_, vm_->apic_bus());
    // Not without chips: only with them is the timer thread there before the first KVM_RUN.
    run_delay_ = std::make_unique<os::RunDelay>(vm_->timers());
    paravirt_.set_run_delay(*run_delay_);
  }
  mp_state_ = !apic_ || is_boot_cpu ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_UNINITIALIZED;
  tsc_offset_seen_ = cpu_.state.tsc_offset;
  cpu_.immediate_exit = &run_->immediate_exit;
  cpu_.pio_data = reinterpret_cast<u8*>(run_) + page_size;
  engine::Kind kind = engine::Kind::interpret;
  (void)engine::default_kind(kind);  // opening the system has checked it
  engine_ = engine::make(kind, &vm_->code_memory());
  os::install_fault_handlers();
}

Vcpu::~Vcpu() {
  apic_.reset();  // first: other threads reach the vCPU through it
  signal_mask_.reset();
  if (const int fd = wake_fd_.load(); fd >= 0) close(fd);
}

}  // namespace anykvm::vcpu
