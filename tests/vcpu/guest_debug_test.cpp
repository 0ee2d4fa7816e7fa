// KVM_SET_GUEST_DEBUG: the client steps, breaks and watches its guest, which does not notice.
#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

class GuestDebug : public TestMachine {
 protected:
  int debug(u32 control, u64 dr0 = 0, u64 dr7 = 0x400) {
    kvm_guest_debug args{.control = control};
    args.arch.debugreg[0] = dr0;
    args.arch.debugreg[7] = dr7;
    return vcpus[0]->set_guest_debug(args);
  }
  void expect_debug(u8 exception, u64 pc, u64 dr6) {
    EXPECT_EQ(vcpus[0]->run(), 0);
    ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_DEBUG});
    EXPECT_EQ(run().debug.arch.exception, exception);
    EXPECT_EQ(run().debug.arch.pc, pc);
    if (exception == 1) {
      EXPECT_EQ(run().debug.arch.dr6, dr6);
    }
    EXPECT_EQ(regs().rip, pc);
  }
  static constexpr u32 step = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  static constexpr u64 dr6_step = 0xffff4ff0;
};

TEST_F(GuestDebug, StepsOneInstructionAtATime) {
  start_long_mode(add_vcpu(), {
                                  0x90,        // nop
                                  0xff, 0xc0,  // inc eax
                                  0x9c,        // pushfq
                                  0xe6, 0x10,  // out 0x10, al
                                  0x90,        // nop
                              });
  EXPECT_EQ(debug(step), 0);
  expect_debug(1, code_at + 1, dr6_step);
  expect_debug(1, code_at + 3, dr6_step);
  expect_debug(1, code_at + 4, dr6_step);
  EXPECT_EQ(load<u64>(stack_top - 8) & 0x100, 0u);  // the guest sees no TF
  EXPECT_EQ(vcpus[0]->run(), 0);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  expect_debug(1, code_at + 6, dr6_step);
  EXPECT_EQ(debug(0), 0);
  kvm_debugregs regs;
  EXPECT_EQ(vcpus[0]->get_debugregs(regs), 0);
  EXPECT_EQ(regs.dr6, 0xffff0ff0u);
}

TEST_F(GuestDebug, StepsOverAPortRead) {
  start_long_mode(add_vcpu(), {0xe4, 0x10, 0x90});  // in al, 0x10; nop
  EXPECT_EQ(debug(step), 0);
  EXPECT_EQ(vcpus[0]->run(), 0);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  *pio_data() = 0x42;
  expect_debug(1, code_at + 2, dr6_step);
  EXPECT_EQ(regs().rax & 0xff, 0x42u);
}

TEST_F(GuestDebug, SoftwareBreakpointsAreTheClients) {
  start_long_mode(add_vcpu(), {0x90, 0xcc, 0x90});  // nop; int3
  EXPECT_EQ(debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP), 0);
  expect_debug(3, code_at + 1, 0);
}

TEST_F(GuestDebug, HardwareBreakpointsAreTheClients) {
  start_long_mode(add_vcpu(), {
                                  0x90, 0x90,                                      // nop; nop
                                  0xc6, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00, 0x05,  // mov byte [0x2000], 5
                                  0x90,                                            // nop
                              });
  EXPECT_EQ(debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, code_at + 1, 0x402), 0);
  expect_debug(1, code_at + 1, 0xffff0ff1);
  EXPECT_EQ(run().debug.arch.dr7, 0x402u);
  EXPECT_EQ(debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, 0x2000, 0x402 | 1 << 16), 0);
  expect_debug(1, code_at + 10, 0xffff0ff1);
  EXPECT_EQ(load<u8>(0x2000), 5);
  kvm_debugregs regs;
  EXPECT_EQ(vcpus[0]->get_debugregs(regs), 0);
  EXPECT_EQ(regs.db[0], 0u);
  EXPECT_EQ(regs.dr7, 0x400u);
}

TEST_F(GuestDebug, InjectedExceptionsReachTheGuest) {
  start_long_mode(add_vcpu(), {0xf4});
  set_gate(3, code_at + 0x100);
  put(code_at + 0x100, {0xe6, 0x03});  // out 3, al
  EXPECT_EQ(debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_BP), 0);
  EXPECT_EQ(debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB), -EBUSY);
  EXPECT_EQ(vcpus[0]->run(), 0);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(run().io.port, 3);
}

TEST_F(GuestDebug, InterruptsCanBeHeldBack) {
  start_long_mode(add_vcpu(), {0x90, 0x90, 0x90});
  set_gate(2, code_at + 0x100);
  put(code_at + 0x100, {0x90, 0x90});
  EXPECT_EQ(debug(step | KVM_GUESTDBG_BLOCKIRQ), 0);
  EXPECT_EQ(vcpus[0]->nmi(), 0);
  expect_debug(1, code_at + 1, dr6_step);
  EXPECT_EQ(debug(step), 0);
  expect_debug(1, code_at + 0x101, dr6_step);
}

TEST_F(GuestDebug, WithoutEnableNothingIsSet) {
  start_long_mode(add_vcpu(), {0x90, 0xe6, 0x10});  // nop; out 0x10, al
  EXPECT_EQ(debug(KVM_GUESTDBG_SINGLESTEP), 0);
  EXPECT_EQ(vcpus[0]->run(), 0);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
}

TEST_F(GuestDebug, AHaltIsSteppedIntoWhereTheChipsAreOurs) {
  EXPECT_EQ(machine->create_irqchip(), 0);
  start_long_mode(add_vcpu(), {0xf4, 0x90});  // hlt
  EXPECT_EQ(debug(step), 0);
  expect_debug(1, code_at + 1, dr6_step);
  kvm_mp_state state;
  EXPECT_EQ(vcpus[0]->get_mp_state(state), 0);
  EXPECT_EQ(state.mp_state, u32{KVM_MP_STATE_HALTED});
}

// --- exits that can be turned off or on
// -------------------------------------------------------------------------------

TEST_F(GuestDebug, AHaltLeftToTheGuestHidesPvUnhalt) {
  constexpr u32 pv_unhalt = 1 << 7, pv_eoi = 1 << 6;
  const kvm_cpuid_entry2 leaves[] = {{0x40000000, 0, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d, {}},
                                     {0x40000001, 0, 0, pv_unhalt | pv_eoi, 0, 0, 0, {}}};
  auto& vcpu = add_vcpu();
  kvm_cpuid_entry2 got[2];
  u32 count;
  ASSERT_EQ(vcpu.set_cpuid2(leaves), 0);
  ASSERT_EQ(vcpu.get_cpuid2(got, count), 0);
  EXPECT_EQ(got[1].eax, pv_unhalt | pv_eoi);
  ASSERT_EQ(machine->enable_cap({.cap = KVM_CAP_X86_DISABLE_EXITS, .args = {KVM_X86_DISABLE_EXITS_HLT}}), 0);
  ASSERT_EQ(vcpu.set_cpuid2(leaves), 0);
  ASSERT_EQ(vcpu.get_cpuid2(got, count), 0);
  EXPECT_EQ(got[1].eax, pv_eoi);
}

TEST_F(GuestDebug, AHaltLeftToTheGuestEndsWithAnEvent) {
  EXPECT_EQ(machine->enable_cap({.cap = KVM_CAP_X86_DISABLE_EXITS, .args = {16}}), -EINVAL);
  EXPECT_EQ(machine->enable_cap({.cap = KVM_CAP_X86_DISABLE_EXITS, .args = {KVM_X86_DISABLE_EXITS_HLT}}), 0);
  start_long_mode(add_vcpu(), {0xfb, 0xf4, 0xe6, 0x10});  // sti; hlt; out 0x10, al
  set_gate(0x40, code_at + 0x100);
  put(code_at + 0x100, {0xe6, 0x40});  // out 0x40, al
  run().request_interrupt_window = 1;
  // The window opens behind STI's shadow, which HLT ends.
  EXPECT_EQ(vcpus[0]->run(), 0);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IRQ_WINDOW_OPEN});
  EXPECT_EQ(regs().rip, code_at + 2);
  run().request_interrupt_window = 0;
  EXPECT_EQ(vcpus[0]->interrupt({.irq = 0x40}), 0);
  EXPECT_EQ(vcpus[0]->run(), 0);
  ASSERT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(run().io.port, 0x40);
}

}  // namespace
}  // namespace anykvm
