// What reaches a running guest from outside: interrupts, NMIs, exceptions of the client's, the interrupt window, halts.
#include <sys/eventfd.h>
#include <unistd.h>

#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

class Events : public TestMachine {
 protected:
  /// A real-mode handler at the vector: its number to port 0x80, then iret.
  void handler(u8 vector) {
    const u16 offset = static_cast<u16>(0x6000 + vector * 16u);
    put(offset, {
                    0x50,          // push ax
                    0xb0, vector,  // mov al, vector
                    0xe6, 0x80,    // out 0x80, al
                    0x58,          // pop ax
                    0xcf,          // iret
                });
    store<u32>(vector * 4u, offset);
  }
  void expect_vector(vcpu::Vcpu& vcpu, u8 vector) {
    ASSERT_EQ(vcpu.run(), 0);
    ASSERT_EQ(run().exit_reason, KVM_EXIT_IO);
    EXPECT_EQ(*pio_data(), vector);
  }
  void expect_halt(vcpu::Vcpu& vcpu) {
    ASSERT_EQ(vcpu.run(), 0);
    EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  }
};

TEST_F(Events, ClientInterruptAndItsErrors) {
  auto& vcpu = add_vcpu();
  handler(0x20);
  start_real_mode(vcpu, {
                            0xfb,  // sti
                            0x90,  // nop
                            0xf4,  // hlt
                            0xf4,  // hlt
                        });
  EXPECT_EQ(vcpu.interrupt({256}), -EINVAL);
  expect_halt(vcpu);
  EXPECT_EQ(run().ready_for_interrupt_injection, 1);
  EXPECT_EQ(vcpu.interrupt({0x20}), 0);
  expect_vector(vcpu, 0x20);
  expect_halt(vcpu);
  EXPECT_EQ(regs().rip, 4u);
}

TEST_F(Events, InterruptIsRefusedWithChips) {
  ASSERT_EQ(machine->create_irqchip(), 0);
  auto& vcpu = add_vcpu();
  EXPECT_EQ(vcpu.interrupt({0x20}), -ENXIO);
}

TEST_F(Events, InterruptWindowOpensAfterTheShadow) {
  auto& vcpu = add_vcpu();
  handler(0x21);
  start_real_mode(vcpu, {
                            0x40,        // inc ax
                            0xfb,        // sti
                            0x40,        // inc ax
                            0x40,        // inc ax
                            0xeb, 0xfe,  // jmp .
                        });
  run().request_interrupt_window = 1;
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_IRQ_WINDOW_OPEN);
  EXPECT_EQ(run().ready_for_interrupt_injection, 1);
  EXPECT_EQ(regs().rip, 3u) << "one instruction after STI";
  ASSERT_EQ(vcpu.interrupt({0x21}), 0);
  run().request_interrupt_window = 0;
  expect_vector(vcpu, 0x21);
}

TEST_F(Events, InterruptWindowOpensAtIret) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0x68, 0x02, 0x02,  // push 0x202
                            0x0e,              // push cs
                            0x68, 0x08, 0x00,  // push 8
                            0xcf,              // iret
                            0xeb, 0xfe,        // 8: jmp .
                        });
  run().request_interrupt_window = 1;
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_IRQ_WINDOW_OPEN);
  EXPECT_EQ(regs().rip, 8u);
}

TEST_F(Events, NmiIsMaskedUntilIret) {
  auto& vcpu = add_vcpu();
  handler(2);
  start_real_mode(vcpu, {
                            0x90,  // nop
                            0xf4,  // hlt
                            0xf4,  // hlt
                        });
  ASSERT_EQ(vcpu.nmi(), 0);
  ASSERT_EQ(vcpu.nmi(), 0);
  ASSERT_EQ(vcpu.nmi(), 0);
  expect_vector(vcpu, 2);
  kvm_vcpu_events events;
  ASSERT_EQ(vcpu.get_vcpu_events(events), 0);
  EXPECT_EQ(events.nmi.masked, 1);
  EXPECT_EQ(events.nmi.pending, 1) << "two wait at most";
  expect_vector(vcpu, 2);
  expect_halt(vcpu);
  ASSERT_EQ(vcpu.get_vcpu_events(events), 0);
  EXPECT_EQ(events.nmi.masked, 0);
}

TEST_F(Events, ExceptionOfTheClients) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0x90, 0xf4});  // nop; hlt
  set_gate(14, code_at + 0x100);
  put(code_at + 0x100, {
                           0x58,              // pop rax
                           0x0f, 0x20, 0xd3,  // mov rbx, cr2
                           0xf4,              // hlt
                       });
  kvm_enable_cap payload{.cap = KVM_CAP_EXCEPTION_PAYLOAD, .args = {1}};
  ASSERT_EQ(machine->enable_cap(payload), 0);
  kvm_vcpu_events events;
  ASSERT_EQ(vcpu.get_vcpu_events(events), 0);
  EXPECT_TRUE(events.flags & KVM_VCPUEVENT_VALID_PAYLOAD);
  events.exception.pending = 1;
  events.exception.nr = 14;
  events.exception.has_error_code = 1;
  events.exception.error_code = 6;
  events.exception_has_payload = 1;
  events.exception_payload = 0x1234567000;
  ASSERT_EQ(vcpu.set_vcpu_events(events), 0);
  expect_halt(vcpu);
  EXPECT_EQ(regs().rax, 6u);
  EXPECT_EQ(regs().rbx, 0x1234567000u);
}

TEST_F(Events, BadEventsAreRefused) {
  auto& vcpu = add_vcpu();
  kvm_vcpu_events events{};
  events.flags = 0x100;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL);
  events.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL) << "not enabled";
  events.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL) << "not enabled";
  events.flags = 0;
  events.exception.injected = 1;
  events.exception.nr = 32;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL);
  events.exception.nr = 2;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL) << "an NMI is no exception";
  events = {};
  events.flags = KVM_VCPUEVENT_VALID_SMM;
  events.smi.smm = 1;
  EXPECT_EQ(vcpu.set_vcpu_events(events), -EINVAL);
}

// --- with the in-kernel chips ------------------------------------------------------------------------------------

class EventsWithChips : public Events {
 protected:
  EventsWithChips() { EXPECT_EQ(machine->create_irqchip(), 0); }

  /// The 8259s as a PC's BIOS leaves them: vectors from 8 and 0x70, all lines open. Runs in the guest.
  static constexpr u8 init_pic[] = {
      0xb0, 0x11, 0xe6, 0x20, 0xe6, 0xa0,  // mov al, 0x11; out 0x20, al; out 0xa0, al
      0xb0, 0x08, 0xe6, 0x21,              // mov al, 8; out 0x21, al
      0xb0, 0x70, 0xe6, 0xa1,              // mov al, 0x70; out 0xa1, al
      0xb0, 0x04, 0xe6, 0x21,              // mov al, 4; out 0x21, al
      0xb0, 0x02, 0xe6, 0xa1,              // mov al, 2; out 0xa1, al
      0xb0, 0x01, 0xe6, 0x21, 0xe6, 0xa1,  // mov al, 1; out 0x21, al; out 0xa1, al
      0xb0, 0x00, 0xe6, 0x21, 0xe6, 0xa1,  // mov al, 0; out 0x21, al; out 0xa1, al
  };
};

TEST_F(EventsWithChips, ALineWakesAHaltedCpu) {
  auto& vcpu = add_vcpu();
  handler(0x0c);  // IRQ 4
  start_real_mode(vcpu, {
                            0xfb,        // sti
                            0xf4,        // hlt
                            0xe6, 0x81,  // out 0x81, al
                        });
  std::memmove(ram + code_at + sizeof init_pic, ram + code_at, 4);
  std::memcpy(ram + code_at, init_pic, sizeof init_pic);

  std::atomic<u64> raised_ns = 0;
  std::thread client([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    raised_ns = os::monotonic_ns();
    kvm_irq_level level{};
    level.irq = 4;
    level.level = 1;
    EXPECT_EQ(machine->irq_line_status(level), 0);
    EXPECT_EQ(level.status, 1);
  });
  ASSERT_EQ(vcpu.run(), 0);
  const u64 woken_ns = os::monotonic_ns();
  client.join();
  ASSERT_EQ(run().exit_reason, KVM_EXIT_IO);
  EXPECT_EQ(run().io.port, 0x80);
  EXPECT_EQ(*pio_data(), 0x0c);
  EXPECT_LT(woken_ns - raised_ns, 20'000'000u);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().io.port, 0x81);
}

TEST_F(EventsWithChips, AnIrqfdRaisesALine) {
  auto& vcpu = add_vcpu();
  handler(0x0c);
  start_real_mode(vcpu, {
                            0xfb,        // sti
                            0xf4,        // hlt
                            0xe6, 0x81,  // out 0x81, al
                        });
  std::memmove(ram + code_at + sizeof init_pic, ram + code_at, 4);
  std::memcpy(ram + code_at, init_pic, sizeof init_pic);
  const int fd = eventfd(0, 0);
  kvm_irqfd args{};
  args.fd = static_cast<u32>(fd);
  args.gsi = 4;
  ASSERT_EQ(machine->irqfd(args), 0);
  std::thread client([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    eventfd_write(fd, 1);
  });
  ASSERT_EQ(vcpu.run(), 0);
  client.join();
  ASSERT_EQ(run().exit_reason, KVM_EXIT_IO);
  EXPECT_EQ(*pio_data(), 0x0c);
  close(fd);
}

TEST_F(EventsWithChips, NmiWakesAHaltWithInterruptsOff) {
  auto& vcpu = add_vcpu();
  handler(2);
  start_real_mode(vcpu, {0xfa, 0xf4});  // cli; hlt
  std::thread client([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    vcpu.signal_nmi();
  });
  expect_vector(vcpu, 2);
  client.join();
}

TEST_F(EventsWithChips, ApplicationProcessorsWaitForStartUp) {
  add_vcpu();
  auto& ap = add_vcpu();
  kvm_mp_state state;
  ASSERT_EQ(vcpus[0]->get_mp_state(state), 0);
  EXPECT_EQ(state.mp_state, static_cast<u32>(KVM_MP_STATE_RUNNABLE));
  ASSERT_EQ(ap.get_mp_state(state), 0);
  EXPECT_EQ(state.mp_state, static_cast<u32>(KVM_MP_STATE_UNINITIALIZED));
  run(1).immediate_exit = 1;
  EXPECT_EQ(ap.run(), -EINTR);
  run(1).immediate_exit = 0;

  put(0x9000, {0x8c, 0xc8, 0xe6, 0x80});  // mov ax, cs; out 0x80, al
  std::atomic<int> result = 1;
  std::thread runner([&] {
    do result = ap.run();
    while (result == -EAGAIN);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(result, 1) << "waits for INIT";
  ap.signal_init();
  for (int ms = 0; result == 1 && ms < 10000; ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(result, -EAGAIN) << "waits for the start-up IPI";
  ap.signal_sipi(9);
  runner.join();
  EXPECT_EQ(result, 0);
  EXPECT_EQ(run(1).exit_reason, KVM_EXIT_IO);
  kvm_sregs sregs;
  ap.get_sregs(sregs);
  EXPECT_EQ(sregs.cs.base, 0x9000u);
  EXPECT_EQ(sregs.cs.selector, 0x900);
}

TEST_F(EventsWithChips, AHaltCostsNothing) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0xfb, 0xf4, 0xf4});  // sti; hlt; hlt
  timespec before, after;
  std::thread runner([&] {
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    vcpu.run();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  kvm_mp_state state;
  set_immediate_exit();
  vcpu.wake();
  runner.join();
  EXPECT_EQ(run().exit_reason, KVM_EXIT_INTR);
  ASSERT_EQ(vcpu.get_mp_state(state), 0);
  EXPECT_EQ(state.mp_state, static_cast<u32>(KVM_MP_STATE_HALTED));
  const s64 used_ns = (after.tv_sec - before.tv_sec) * 1'000'000'000ll + after.tv_nsec - before.tv_nsec;
  EXPECT_LT(used_ns, 9'000'000) << "3 % of 300 ms";
}

}  // namespace
}  // namespace anykvm
