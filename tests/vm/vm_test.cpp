// The VM's ioctls: what they refuse, and that slots can change under running vCPUs.
#include "vm/vm.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vcpu/test_machine.h"
#include "vm/ioeventfd.h"

namespace anykvm {
namespace {

using VmTest = TestMachine;

TEST_F(VmTest, Creation) {
  std::shared_ptr<vm::Vm> other;
  EXPECT_EQ(vm::Vm::create(1, other), -EINVAL);
  std::shared_ptr<vcpu::Vcpu> vcpu;
  add_vcpu();
  EXPECT_EQ(machine->create_vcpu(0, runs[0], vcpu), -EEXIST);
  EXPECT_EQ(machine->create_vcpu(vm::Vm::max_vcpu_ids, runs[0], vcpu), -EINVAL);
  EXPECT_EQ(machine->set_boot_cpu_id(0), -EBUSY);
  EXPECT_EQ(machine->set_identity_map_addr(0x1000), -EINVAL);
  EXPECT_EQ(machine->set_tss_addr(0xfffbd000), 0);
  EXPECT_EQ(machine->set_tss_addr(0xffffe000), -EINVAL);
}

TEST_F(VmTest, ChipsAndTheirErrors) {
  kvm_irqchip chip{};
  kvm_irq_level level{};
  kvm_msi msi{};
  kvm_pit_config pit{};
  kvm_pit_state2 pit_state{};
  kvm_irqfd irqfd{};
  EXPECT_EQ(machine->get_irqchip(chip), -ENXIO);
  EXPECT_EQ(machine->set_irqchip(chip), -ENXIO);
  EXPECT_EQ(machine->irq_line(level), -ENXIO);
  EXPECT_EQ(machine->irq_line_status(level), -ENXIO);
  EXPECT_EQ(machine->signal_msi(msi), -EINVAL);
  EXPECT_EQ(machine->set_gsi_routing(0, {}), -EINVAL);
  EXPECT_EQ(machine->create_pit2(pit), -ENOENT);
  EXPECT_EQ(machine->get_pit2(pit_state), -ENXIO);
  EXPECT_EQ(machine->irqfd(irqfd), -EAGAIN);

  ASSERT_EQ(machine->create_irqchip(), 0);
  EXPECT_EQ(machine->create_irqchip(), -EEXIST);
  chip.chip_id = 3;
  EXPECT_EQ(machine->get_irqchip(chip), -EINVAL);
  chip.chip_id = KVM_IRQCHIP_IOAPIC;
  EXPECT_EQ(machine->get_irqchip(chip), 0);
  EXPECT_EQ(machine->irq_line(level), 0);
  ASSERT_EQ(machine->create_pit2(pit), 0);
  EXPECT_EQ(machine->create_pit2(pit), -EEXIST);
  EXPECT_EQ(machine->get_pit2(pit_state), 0);
  EXPECT_EQ(machine->set_pit2(pit_state), 0);
}

TEST_F(VmTest, ChipsComeBeforeVcpus) {
  add_vcpu();
  EXPECT_EQ(machine->create_irqchip(), -EINVAL);
}

TEST_F(VmTest, Capabilities) {
  kvm_enable_cap cap{};
  cap.cap = KVM_CAP_XEN_HVM;
  EXPECT_EQ(machine->enable_cap(cap), -EINVAL);
  cap.cap = KVM_CAP_EXCEPTION_PAYLOAD;
  cap.flags = 1;
  EXPECT_EQ(machine->enable_cap(cap), -EINVAL);
  cap.flags = 0;
  cap.args[0] = 1;
  EXPECT_EQ(machine->enable_cap(cap), 0);
  cap.cap = KVM_CAP_MAX_VCPU_ID;
  cap.args[0] = 4;
  EXPECT_EQ(machine->enable_cap(cap), 0);
  EXPECT_EQ(machine->enable_cap(cap), 0) << "the same again";
  cap.args[0] = 8;
  EXPECT_EQ(machine->enable_cap(cap), -EINVAL);
  std::shared_ptr<vcpu::Vcpu> vcpu;
  EXPECT_EQ(machine->create_vcpu(4, nullptr, vcpu), -EINVAL);
}

TEST_F(VmTest, IoEventFdErrors) {
  const int event = eventfd(0, EFD_NONBLOCK), duplicate = dup(event), other = eventfd(0, EFD_NONBLOCK);
  kvm_ioeventfd args{.datamatch = 7, .addr = 0x500, .len = 2, .fd = event};
  args.flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH;
  const auto with = [&](auto change) {
    kvm_ioeventfd changed = args;
    change(changed);
    return machine->ioeventfd(changed);
  };
  EXPECT_EQ(with([](auto& a) { a.len = 3; }), -EINVAL);
  EXPECT_EQ(with([](auto& a) { a.len = 16; }), -EINVAL);
  EXPECT_EQ(with([](auto& a) { a.len = 0; }), -EINVAL) << "no length, but data";
  EXPECT_EQ(with([](auto& a) { a.addr = ~0ull; }), -EINVAL) << "wraps";
  EXPECT_EQ(with([](auto& a) { a.flags |= 0x100; }), -EINVAL);
  EXPECT_EQ(with([](auto& a) { a.fd = -1; }), -EBADF);
  EXPECT_EQ(with([](auto& a) { a.fd = 0; }), -EINVAL) << "no eventfd";
  ASSERT_EQ(machine->ioeventfd(args), 0);
  EXPECT_EQ(machine->ioeventfd(args), -EEXIST);
  EXPECT_EQ(with([&](auto& a) { a.fd = other; }), -EEXIST);
  EXPECT_EQ(with([](auto& a) { a.flags &= ~KVM_IOEVENTFD_FLAG_DATAMATCH; }), -EEXIST) << "a wildcard meets it";
  EXPECT_EQ(with([&](auto& a) { a.fd = other, a.datamatch = 8; }), 0);
  EXPECT_EQ(with([&](auto& a) { a.fd = other, a.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN; }), -ENOENT);
  EXPECT_EQ(with([&](auto& a) { a.fd = duplicate, a.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN; }), 0) << "the same eventfd";
  EXPECT_EQ(with([](auto& a) { a.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN; }), -ENOENT);
  close(event), close(duplicate), close(other);
}

TEST_F(VmTest, IoEventFdsTakeWrites) {
  auto& vcpu = add_vcpu();
  const int port = eventfd(0, EFD_NONBLOCK), memory = eventfd(0, EFD_NONBLOCK);
  kvm_ioeventfd args{.datamatch = 7, .addr = 0x500, .len = 2, .fd = port};
  args.flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH;
  ASSERT_EQ(machine->ioeventfd(args), 0);
  args = {.addr = 0xd0000010, .len = 0, .fd = memory};
  ASSERT_EQ(machine->ioeventfd(args), 0);
  start_real_mode(vcpu, {
                            0xba, 0x00, 0x05,  // mov dx, 0x500
                            0xb8, 0x07, 0x00,  // mov ax, 7
                            0xef,              // out dx, ax
                            0xa3, 0x10, 0x00,  // mov [0x10], ax
                            0xa2, 0x10, 0x00,  // mov [0x10], al
                            0x40,              // inc ax
                            0xef,              // out dx, ax
                        });
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.ds.base = 0xd0000000;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_IO) << "8 is not what the eventfd waits for";
  EXPECT_EQ(*pio_data(), 8);
  eventfd_t count = 0;
  EXPECT_EQ(eventfd_read(port, &count), 0);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(eventfd_read(memory, &count), 0);
  EXPECT_EQ(count, 2u) << "any length";
  close(port), close(memory);
}

TEST_F(VmTest, IrqFdErrors) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  const int event = eventfd(0, 0), duplicate = dup(event);
  kvm_irqfd args{};
  args.fd = static_cast<u32>(event);
  args.gsi = 5;
  args.flags = 4;
  EXPECT_EQ(machine->irqfd(args), -EINVAL);
  args.flags = 0;
  args.fd = ~0u;
  EXPECT_EQ(machine->irqfd(args), -EBADF);
  args.fd = 0;
  EXPECT_EQ(machine->irqfd(args), -EINVAL) << "no eventfd";
  args.fd = static_cast<u32>(event);
  ASSERT_EQ(machine->irqfd(args), 0);
  args.fd = static_cast<u32>(duplicate);
  args.gsi = 6;
  EXPECT_EQ(machine->irqfd(args), -EBUSY);
  args.gsi = 5;
  args.flags = KVM_IRQFD_FLAG_DEASSIGN;
  EXPECT_EQ(machine->irqfd(args), 0);
  EXPECT_EQ(machine->irqfd(args), 0) << "nothing to do is no error";
  args.flags = 0;
  EXPECT_EQ(machine->irqfd(args), 0);
  close(event), close(duplicate);
}

// While a guest loop stores to a page, its slot is deleted, its memory unmapped, and both are put back.
TEST_F(VmTest, SlotsChangeUnderARunningGuest) {
  auto& vcpu = add_vcpu();
  constexpr Gpa at = 0x10000000;
  auto* page = static_cast<u8*>(mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_EQ(machine->set_user_memory_region(slot(5, at, page_size, page)), 0);
  start_real_mode(vcpu, {
                            0xff, 0x06, 0x00, 0x00,  // inc word [0]
                            0xeb, 0xfa,              // jmp 0
                        });
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.ds.base = at;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  std::atomic<bool> stop = false;
  std::atomic<u64> mmio_exits = 0, failures = 0;
  std::thread runner([&] {
    while (!stop) {
      const int result = vcpu.run();
      if (result == 0 && run().exit_reason == KVM_EXIT_MMIO)
        ++mmio_exits;
      else if (result != -EINTR)
        ++failures;
    }
  });
  for (int i = 0; i < 200; ++i) {
    *reinterpret_cast<volatile u16*>(page) = 0;
    ASSERT_TRUE(eventually([&] { return *reinterpret_cast<volatile u16*>(page) != 0; })) << "the guest stores";
    ASSERT_EQ(machine->set_user_memory_region(slot(5, 0, 0, page)), 0);
    ASSERT_EQ(mprotect(page, page_size, PROT_NONE), 0);  // a store that comes late would be EFAULT
    if (i % 16 == 0) {
      ASSERT_TRUE(eventually([&, seen = mmio_exits.load()] { return mmio_exits != seen; }));
    }
    ASSERT_EQ(mprotect(page, page_size, PROT_READ | PROT_WRITE), 0);
    ASSERT_EQ(machine->set_user_memory_region(slot(5, at, page_size, page)), 0);
  }
  stop = true;
  set_immediate_exit();
  runner.join();
  EXPECT_EQ(failures, 0u);
  EXPECT_GT(mmio_exits, 0u);
  munmap(page, page_size);
}

TEST_F(VmTest, TheDirtyLogSeesTheGuestsStores) {
  auto& vcpu = add_vcpu();
  ASSERT_EQ(
      machine->set_user_memory_region(slot(5, 0x10000000, 64 * page_size, ram + 0x200000, KVM_MEM_LOG_DIRTY_PAGES)), 0);
  start_real_mode(vcpu, {
                            0xa1, 0x00, 0x00,  // mov ax, [0]
                            0xa3, 0x00, 0x30,  // mov [0x3000], ax
                            0xf4,              // hlt
                            0xa3, 0x00, 0x30,  // mov [0x3000], ax
                            0xf4,              // hlt
                        });
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.ds.base = 0x10000000;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  u64 bitmap = 0;
  kvm_dirty_log log{};
  log.slot = 5;
  log.dirty_bitmap = &bitmap;
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(vcpu.run(), 0);
    ASSERT_EQ(run().exit_reason, KVM_EXIT_HLT);
    ASSERT_EQ(machine->get_dirty_log(log), 0);
    EXPECT_EQ(bitmap, 8u);
  }
}

TEST_F(VmTest, AnEndedVmLeavesNothingBehind) {
  const auto open_fds = [] {
    int count = 0;
    for (int fd = 0; fd < 256; ++fd) count += fcntl(fd, F_GETFD) >= 0;
    return count;
  };
  const int before = open_fds();
  for (int i = 0; i < 50; ++i) {
    std::shared_ptr<vm::Vm> other;
    ASSERT_EQ(vm::Vm::create(0, other), 0);
    ASSERT_EQ(other->create_irqchip(), 0);
    const int event = eventfd(0, 0);
    kvm_irqfd irqfd{};
    irqfd.fd = static_cast<u32>(event);
    irqfd.gsi = 3;
    ASSERT_EQ(other->irqfd(irqfd), 0);
    kvm_ioeventfd ioeventfd{.addr = 0x100, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO};
    ASSERT_EQ(other->ioeventfd(ioeventfd), 0);
    close(event);
  }
  EXPECT_EQ(open_fds(), before);
}

}  // namespace
}  // namespace anykvm
