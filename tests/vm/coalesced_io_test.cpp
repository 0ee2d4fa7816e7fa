// Coalesced I/O: which writes are collected in the ring, and when they exit all the same.
#include "vm/coalesced_io.h"
#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

class CoalescedIo : public TestMachine {
 protected:
  static constexpr u64 mmio_at = 0x100000;  // above the RAM that these guests have

  CoalescedIo() {
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, 0, nullptr)), 0);
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, mmio_at, ram)), 0);
  }
  kvm_coalesced_mmio_ring& ring(unsigned index = 0) {
    return *reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<u8*>(runs[index]) + 2 * page_size);
  }
  /// Writes 0x12345678 to [rbx] and 0xab to port 0x40, then says so at port 0x10.
  void start(vcpu::Vcpu& vcpu, u64 address = mmio_at) {
    start_long_mode(vcpu, {
                              0xc7, 0x03, 0x78, 0x56, 0x34, 0x12,  // mov dword [rbx], 0x12345678
                              0xb0, 0xab,                          // mov al, 0xab
                              0xe6, 0x40,                          // out 0x40, al
                              0xe6, 0x10,                          // out 0x10, al
                          });
    kvm_regs r;
    EXPECT_EQ(vcpu.get_regs(r), 0);
    r.rbx = address;
    EXPECT_EQ(vcpu.set_regs(r), 0);
    EXPECT_EQ(vcpu.run(), 0);
  }
};

TEST_F(CoalescedIo, WritesIntoAZoneAreCollected) {
  add_vcpu();
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = 0x40, .size = 1, .pio = 1}), 0);
  start(*vcpus[0]);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(run().io.port, 0x10);
  ASSERT_EQ(ring().last, 2u);
  EXPECT_EQ(ring().coalesced_mmio[0].phys_addr, mmio_at);
  EXPECT_EQ(ring().coalesced_mmio[0].len, 4u);
  EXPECT_EQ(ring().coalesced_mmio[0].pio, 0u);
  EXPECT_EQ(ring().coalesced_mmio[0].data[3], 0x12);
  EXPECT_EQ(ring().coalesced_mmio[1].phys_addr, 0x40u);
  EXPECT_EQ(ring().coalesced_mmio[1].len, 1u);
  EXPECT_EQ(ring().coalesced_mmio[1].pio, 1u);
  EXPECT_EQ(ring().coalesced_mmio[1].data[0], 0xab);
}

TEST_F(CoalescedIo, OtherWritesExit) {
  add_vcpu();
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at + 64, .size = 16, .pio = 1}), 0);
  for (const u64 address : {mmio_at + 13, mmio_at + 16, mmio_at + 64}) {
    ring().first = ring().last = 0;
    start(*vcpus[0], address);
    EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_MMIO}) << address;
    EXPECT_EQ(ring().last, 0u);
  }
}

TEST_F(CoalescedIo, AFullOrBrokenRingExits) {
  constexpr u32 entries = (page_size - 8) / sizeof(kvm_coalesced_mmio);
  add_vcpu();
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
  ring().first = 5, ring().last = 4;  // full
  start(*vcpus[0]);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_MMIO});
  ring().last = entries;  // not an index
  start(*vcpus[0]);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_MMIO});
  ring().first = 1, ring().last = entries - 1;  // goes round
  start(*vcpus[0]);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(ring().last, 0u);
}

TEST_F(CoalescedIo, AZoneThatIsTakenAwayCollectsNoMore) {
  add_vcpu();
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
  EXPECT_EQ(machine->unregister_coalesced_mmio({.addr = mmio_at, .size = 16, .pio = 1}), 0);  // another zone
  start(*vcpus[0]);
  EXPECT_EQ(ring().last, 1u);
  EXPECT_EQ(machine->unregister_coalesced_mmio({.addr = mmio_at + 4, .size = 4}), 0);  // the zone that contains it
  start(*vcpus[0]);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_MMIO});
  EXPECT_EQ(machine->unregister_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
}

TEST_F(CoalescedIo, OnlyTheFirstVcpuHasTheRing) {
  add_vcpu();
  add_vcpu();
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = mmio_at, .size = 16}), 0);
  start(*vcpus[1]);
  EXPECT_EQ(run(1).exit_reason, u32{KVM_EXIT_MMIO});
  EXPECT_EQ(ring(1).last, 0u);
}

TEST_F(CoalescedIo, BadZonesAreRefused) {
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = 0, .size = 1, .pio = 2}), -EINVAL);
  EXPECT_EQ(machine->unregister_coalesced_mmio({.addr = 0, .size = 1, .pio = 2}), -EINVAL);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(machine->register_coalesced_mmio({.addr = 0, .size = 1}), 0);
  EXPECT_EQ(machine->register_coalesced_mmio({.addr = 0, .size = 1}), -ENOSPC);
}

}  // namespace
}  // namespace anykvm
