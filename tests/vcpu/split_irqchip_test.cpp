// KVM_CAP_SPLIT_IRQCHIP: local APICs here, PIC and I/O APIC in the client.
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

class SplitIrqChip : public TestMachine {
 protected:
  static constexpr u8 vector = 0x55;

  int enable(u64 pins) { return machine->enable_cap({.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {pins}}); }
  int route(u32 gsi, bool level) {
    kvm_irq_routing_entry entry{.gsi = gsi, .type = KVM_IRQ_ROUTING_MSI};
    entry.u.msi.address_lo = 0xfee00000;
    entry.u.msi.data = vector | (level ? 0x8000 : 0);
    return machine->set_gsi_routing(0, {&entry, 1});
  }
  /// A guest with its APIC in x2APIC mode that ends an interrupt and then writes port 0x20.
  void start() {
    vcpu::Vcpu& vcpu = add_vcpu();
    EXPECT_EQ(vcpu.set_cpuid2(x86::supported_cpuid()), 0);
    const kvm_msr_entry base{.index = 0x1b, .data = 0xfee00d00};
    EXPECT_EQ(vcpu.set_msrs({&base, 1}), 1);
    start_long_mode(vcpu, {
                              0xb9, 0x0f, 0x08, 0x00, 0x00,  // mov ecx, 0x80f
                              0xb8, 0xff, 0x01, 0x00, 0x00,  // mov eax, 0x1ff
                              0x31, 0xd2,                    // xor edx, edx
                              0x0f, 0x30,                    // wrmsr
                              0xfb,                          // sti
                              0xe6, 0x10,                    // out 0x10, al
                              0xf4,                          // hlt
                              0xeb, 0xfd,                    // jmp to the hlt
                          });
    set_gate(vector, code_at + 0x100);
    put(code_at + 0x100, {
                             0xb9, 0x0b, 0x08, 0x00, 0x00,  // mov ecx, 0x80b
                             0x31, 0xc0, 0x31, 0xd2,        // xor eax, eax; xor edx, edx
                             0x0f, 0x30,                    // wrmsr
                             0xe6, 0x20,                    // out 0x20, al
                             0x48, 0xcf,                    // iretq
                         });
    expect_port(0x10);
  }
  void expect_port(u16 port) {
    EXPECT_EQ(vcpus[0]->run(), 0);
    ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
    EXPECT_EQ(run().io.port, port);
  }
};

TEST_F(SplitIrqChip, IsMadeOnceAndBeforeTheVcpus) {
  EXPECT_EQ(enable(4097), -EINVAL);
  EXPECT_EQ(enable(24), 0);
  EXPECT_EQ(enable(24), -EEXIST);
  EXPECT_EQ(machine->create_irqchip(), -EEXIST);
  std::shared_ptr<vm::Vm> other;
  ASSERT_EQ(vm::Vm::create(0, other), 0);
  other.swap(machine);
  add_vcpu();
  EXPECT_EQ(enable(24), -EEXIST);
  vcpus.clear();
  other.swap(machine);
}

TEST_F(SplitIrqChip, TheChipsThemselvesAreNotThere) {
  EXPECT_EQ(enable(24), 0);
  kvm_irqchip chip{.chip_id = KVM_IRQCHIP_IOAPIC};
  EXPECT_EQ(machine->get_irqchip(chip), -ENXIO);
  EXPECT_EQ(machine->set_irqchip(chip), -ENXIO);
  EXPECT_EQ(machine->create_pit2({}), -ENOENT);
  kvm_irq_routing_entry entry{.gsi = 1, .type = KVM_IRQ_ROUTING_IRQCHIP};
  EXPECT_EQ(machine->set_gsi_routing(0, {&entry, 1}), -EINVAL);
  EXPECT_EQ(machine->irq_line({.irq = 1, .level = 1}), 0);  // no route: nobody
  EXPECT_EQ(machine->irqfd({.fd = 0, .gsi = 1, .flags = KVM_IRQFD_FLAG_RESAMPLE}), -EINVAL);
}

TEST_F(SplitIrqChip, TheEndOfALevelInterruptIsTheClientsToHear) {
  EXPECT_EQ(enable(24), 0);
  EXPECT_EQ(route(5, true), 0);
  start();
  EXPECT_EQ(machine->irq_line({.irq = 5, .level = 1}), 0);
  EXPECT_EQ(vcpus[0]->run(), 0);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IOAPIC_EOI});
  EXPECT_EQ(run().eoi.vector, vector);
  expect_port(0x20);
}

TEST_F(SplitIrqChip, OtherEndsAreNot) {
  EXPECT_EQ(enable(24), 0);
  EXPECT_EQ(route(5, false), 0);  // an edge
  start();
  EXPECT_EQ(machine->irq_line({.irq = 5, .level = 1}), 0);
  expect_port(0x20);
  EXPECT_EQ(route(24, true), 0);  // not a pin of the I/O APIC
  EXPECT_EQ(machine->irq_line({.irq = 24, .level = 1}), 0);
  expect_port(0x20);
}

TEST_F(SplitIrqChip, TheClientsPicReachesLint0) {
  EXPECT_EQ(enable(24), 0);
  start();
  kvm_lapic_state lapic;
  EXPECT_EQ(vcpus[0]->get_lapic(lapic), 0);
  EXPECT_EQ(lapic.regs[0x33] & 1, 1);  // the version says: EOI broadcasts can be suppressed
  EXPECT_EQ(vcpus[0]->interrupt({.irq = vector}), 0);
  EXPECT_EQ(vcpus[0]->interrupt({.irq = vector}), -EEXIST);
  expect_port(0x20);
}

}  // namespace
}  // namespace anykvm
