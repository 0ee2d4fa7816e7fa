// What ends KVM_RUN, and what kvm_run and the registers say then.
#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

using Exits = TestMachine;

TEST_F(Exits, PortOut) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xb0, 0x5a,        // mov al, 0x5a
                            0xe6, 0x42,        // out 0x42, al
                            0xb8, 0x34, 0x12,  // mov ax, 0x1234
                            0xba, 0x00, 0x05,  // mov dx, 0x500
                            0xef,              // out dx, ax
                            0xf4,              // hlt
                        });
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_IO);
  EXPECT_EQ(run().io.direction, KVM_EXIT_IO_OUT);
  EXPECT_EQ(run().io.port, 0x42);
  EXPECT_EQ(run().io.size, 1);
  EXPECT_EQ(run().io.count, 1u);
  EXPECT_EQ(run().io.data_offset, page_size);
  EXPECT_EQ(*pio_data(), 0x5a);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().io.port, 0x500);
  EXPECT_EQ(run().io.size, 2);
  EXPECT_EQ(pio_data()[0] | pio_data()[1] << 8, 0x1234);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rip, 12u);
}

TEST_F(Exits, PortInIsFinishedBeforeImmediateExit) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xe4, 0x60,  // in al, 0x60
                            0x40,        // inc ax
                            0xf4,        // hlt
                        });
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_IO);
  EXPECT_EQ(run().io.direction, KVM_EXIT_IO_IN);
  *pio_data() = 0x77;
  run().immediate_exit = 1;
  EXPECT_EQ(vcpu.run(), -EINTR);
  EXPECT_EQ(regs().rip, 2u);
  EXPECT_EQ(regs().rax, 0x77u);
  run().immediate_exit = 0;
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rax, 0x78u);
}

TEST_F(Exits, AnAnswerIsDroppedWhenTheClientMovesRip) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xe4, 0x60,  // in al, 0x60
                            0xf4,        // hlt
                        });
  ASSERT_EQ(vcpu.run(), 0);
  *pio_data() = 0x77;
  kvm_regs moved = regs();
  moved.rip = 2;
  ASSERT_EQ(vcpu.set_regs(moved), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rax, 0u);
}

TEST_F(Exits, AClientMayChangeTheCounterOfAStringRead) {
  struct {
    u64 counter;     // what the client makes of 3
    unsigned exits;  // of the string instruction in all
  } const cases[] = {{0, 1}, {1, 1}, {3, 1}, {5, 2}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.counter);
    auto& vcpu = vcpus.empty() ? add_vcpu() : *vcpus[0];
    std::memset(ram + 0x2100, 0xcc, 16);
    start_real_mode(vcpu, {
                              0xbf, 0x00, 0x21,  // mov di, 0x2100
                              0xb9, 0x03, 0x00,  // mov cx, 3
                              0xf3, 0x6c,        // rep insb
                              0xe4, 0x60,        // in al, 0x60
                              0xf4,              // hlt
                          });
    for (unsigned exit = 0; exit < c.exits; ++exit) {
      ASSERT_EQ(vcpu.run(), 0);
      ASSERT_EQ(run().io.port, 0u);
      std::memset(pio_data(), 0x11, run().io.count);
      run().io.count = run().io.size = 0x7f;  // nothing may come of what the client writes here
      if (exit != 0) continue;
      kvm_regs changed = regs();
      changed.rcx = c.counter;
      ASSERT_EQ(vcpu.set_regs(changed), 0);
    }
    ASSERT_EQ(vcpu.run(), 0);
    ASSERT_EQ(run().io.port, 0x60);  // which does not take what is left of the answer to the other
    *pio_data() = 0x77;
    ASSERT_EQ(vcpu.run(), 0);
    EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
    EXPECT_EQ(regs().rax & 0xff, 0x77u);
    EXPECT_EQ(regs().rcx, 0u);
    EXPECT_EQ(regs().rdi, 0x2100 + c.counter);
    for (unsigned n = 0; n < 16; ++n) EXPECT_EQ(ram[0x2100 + n], n < c.counter ? 0x11 : 0xcc) << n;
  }
}

TEST_F(Exits, StringPorts) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xbe, 0x00, 0x20,  // mov si, 0x2000
                            0xb9, 0x05, 0x00,  // mov cx, 5
                            0xba, 0xf8, 0x03,  // mov dx, 0x3f8
                            0xf3, 0x6e,        // rep outsb
                            0xbf, 0x00, 0x21,  // mov di, 0x2100
                            0xb9, 0x03, 0x00,  // mov cx, 3
                            0xf3, 0x6d,        // rep insw
                            0xf4,              // hlt
                        });
  std::memcpy(ram + 0x2000, "hello", 5);
  std::string out, in = "abcdef";
  for (;;) {
    ASSERT_EQ(vcpu.run(), 0);
    if (run().exit_reason != KVM_EXIT_IO) break;
    const size_t bytes = run().io.size * run().io.count;
    if (run().io.direction == KVM_EXIT_IO_OUT) {
      out.append(reinterpret_cast<char*>(pio_data()), bytes);
    } else {
      ASSERT_EQ(run().io.size, 2);
      ASSERT_LE(bytes, in.size());
      std::memcpy(pio_data(), in.data(), bytes);
      in.erase(0, bytes);
    }
  }
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(out, "hello");
  EXPECT_EQ(std::memcmp(ram + 0x2100, "abcdef", 6), 0);
}

TEST_F(Exits, Mmio) {
  auto& vcpu = add_vcpu();
  ram[0] = 0;
  // 4 MiB of RAM: 0x400000 and up belong to nobody.
  start_long_mode(vcpu, {
                            0x48, 0xbb, 0x00, 0x10, 0x00, 0x40, 0x00, 0, 0, 0,  // mov rbx, 0x40001000
                            0x8b, 0x03,                                         // mov eax, [rbx]
                            0x89, 0x43, 0x04,                                   // mov [rbx + 4], eax
                            0x66, 0xc7, 0x03, 0xcd, 0xab,                       // mov word [rbx], 0xabcd
                            0xf4,                                               // hlt
                        });
  store<u64>(tables_at + 0x1000 + 8, 0x40000083);  // PDPT: the second GiB onto itself
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_MMIO);
  EXPECT_EQ(run().mmio.phys_addr, 0x40001000u);
  EXPECT_EQ(run().mmio.len, 4u);
  EXPECT_EQ(run().mmio.is_write, 0);
  const u32 value = 0x12345678;
  std::memcpy(run().mmio.data, &value, 4);
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_MMIO);
  EXPECT_EQ(run().mmio.phys_addr, 0x40001004u);
  EXPECT_EQ(run().mmio.is_write, 1);
  EXPECT_EQ(run().mmio.len, 4u);
  EXPECT_EQ(std::memcmp(run().mmio.data, &value, 4), 0);
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_MMIO);
  EXPECT_EQ(run().mmio.len, 2u);
  EXPECT_EQ(run().mmio.data[0] | run().mmio.data[1] << 8, 0xabcd);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rax, value);
}

TEST_F(Exits, MmioReadIsFinishedBeforeImmediateExit) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xa1, 0x00, 0x00,  // mov ax, [0]
                            0xf4,              // hlt
                        });
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.ds.base = 0xd0000000;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_MMIO);
  EXPECT_EQ(run().mmio.phys_addr, 0xd0000000u);
  run().mmio.data[0] = 0x34;
  run().mmio.data[1] = 0x12;
  run().immediate_exit = 1;
  EXPECT_EQ(vcpu.run(), -EINTR);
  EXPECT_EQ(regs().rax, 0x1234u);
  EXPECT_EQ(regs().rip, 3u);
}

TEST_F(Exits, AStoreToAReadOnlySlotIsMmio) {
  auto& vcpu = add_vcpu();
  ASSERT_EQ(machine->set_user_memory_region(slot(1, 0x1000000, page_size, ram + 0x200000, KVM_MEM_READONLY)), 0);
  store<u16>(0x200000, 0xbeef);
  start_real_mode(vcpu, {
                            0xa1, 0x00, 0x00,  // mov ax, [0]
                            0xa3, 0x02, 0x00,  // mov [2], ax
                            0xf4,              // hlt
                        });
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.ds.base = 0x1000000;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_MMIO);
  EXPECT_EQ(run().mmio.phys_addr, 0x1000002u);
  EXPECT_EQ(run().mmio.is_write, 1);
  EXPECT_EQ(run().mmio.data[0] | run().mmio.data[1] << 8, 0xbeef);
  EXPECT_EQ(load<u16>(0x200002), 0);
}

/// Below 4 GiB and outside the RAM, where start_long_mode() maps nothing: a second 2 MiB page.
class EmulationFailure : public TestMachine {
 protected:
  static constexpr Gpa device = 0xd0000000;
  static constexpr u64 device_gva = 2 << 20;

  void start(vcpu::Vcpu& vcpu, std::initializer_list<u8> code) {
    start_long_mode(vcpu, code);
    store<u64>(tables_at + 0x2008, device | 0x83);
    kvm_sregs sregs;
    ASSERT_EQ(vcpu.get_sregs(sregs), 0);
    sregs.cr4 |= 0x600;  // OSFXSR, OSXMMEXCPT
    ASSERT_EQ(vcpu.set_sregs(sregs), 0);
    kvm_regs regs;
    ASSERT_EQ(vcpu.get_regs(regs), 0);
    regs.rbx = device_gva;
    ASSERT_EQ(vcpu.set_regs(regs), 0);
  }
  void exit_on_every_failure() {
    kvm_enable_cap cap{.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
    ASSERT_EQ(machine->enable_cap(cap), 0);
  }
};

TEST_F(EmulationFailure, DevicesTakeOnlyWhatTheKernelsEmulatorKnows) {
  auto& vcpu = add_vcpu();
  exit_on_every_failure();
  const std::initializer_list<u8> unknown[] = {
      {0xd9, 0x03},                    // fld dword [rbx]
      {0xdd, 0x1b},                    // fstp qword [rbx]
      {0xdd, 0x33},                    // fnsave [rbx]
      {0x0f, 0x58, 0x03},              // addps xmm0, [rbx]
      {0xf3, 0x0f, 0x7e, 0x03},        // movq xmm0, [rbx]
      {0x0f, 0xae, 0x1b},              // stmxcsr [rbx]
      {0x48, 0x0f, 0xc7, 0x0b},        // cmpxchg16b [rbx]
      {0xf3, 0x0f, 0xb8, 0x03},        // popcnt eax, [rbx]
      {0xc4, 0xe2, 0x78, 0xf2, 0x03},  // andn eax, eax, [rbx]
  };
  for (const auto& code : unknown) {
    SCOPED_TRACE(testing::PrintToString(std::vector<int>(code.begin(), code.end())));
    start(vcpu, code);
    const kvm_regs before = regs();
    ASSERT_EQ(vcpu.run(), 0);
    ASSERT_EQ(run().exit_reason, KVM_EXIT_INTERNAL_ERROR);
    const auto& failure = run().emulation_failure;
    EXPECT_EQ(failure.suberror, KVM_INTERNAL_ERROR_EMULATION);
    EXPECT_GE(failure.ndata, 3u);
    EXPECT_EQ(failure.flags, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    ASSERT_EQ(failure.insn_size, code.size());
    EXPECT_EQ(std::memcmp(failure.insn_bytes, code.begin(), code.size()), 0);
    EXPECT_EQ(regs().rip, before.rip);
    EXPECT_EQ(regs().rax, before.rax);
    kvm_vcpu_events events;
    ASSERT_EQ(vcpu.get_vcpu_events(events), 0);
    EXPECT_EQ(events.exception.pending, 0);
  }
  const std::initializer_list<u8> known[] = {
      {0x0f, 0x10, 0x03},        // movups xmm0, [rbx]
      {0xf3, 0x0f, 0x7f, 0x03},  // movdqu [rbx], xmm0
      {0x0f, 0x6f, 0x03},        // movq mm0, [rbx]
      {0xd9, 0x3b},              // fnstcw [rbx]
      {0x0f, 0xae, 0x03},        // fxsave [rbx]
      {0x0f, 0xc7, 0x0b},        // cmpxchg8b [rbx]
      {0x0f, 0xa3, 0x03},        // bt [rbx], eax
      {0x0f, 0x38, 0xf0, 0x03},  // movbe eax, [rbx]
  };
  for (const auto& code : known) {
    SCOPED_TRACE(testing::PrintToString(std::vector<int>(code.begin(), code.end())));
    auto& fresh = add_vcpu();
    start(fresh, code);
    ASSERT_EQ(fresh.run(), 0);
    EXPECT_EQ(runs.back()->exit_reason, KVM_EXIT_MMIO);
  }
}

TEST_F(EmulationFailure, RamTakesAll) {
  auto& vcpu = add_vcpu();
  // Nothing but [rbx] is accessed before: the TLB does not have it.
  start(vcpu, {
                  0x0f, 0xae, 0x5b, 0x40,  // stmxcsr [rbx + 0x40]
                  0xd9, 0x03,              // fld dword [rbx]
                  0x0f, 0x00, 0x6b, 0x44,  // verw [rbx + 0x44]
                  0xf4,                    // hlt
              });
  store<u64>(tables_at + 0x2008, 0x20'0083);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(load<u32>(device_gva + 0x40), 0x1f80u);
}

TEST_F(EmulationFailure, TheKernelsIsTheClientsAndThenAnInvalidOpcode) {
  auto& vcpu = add_vcpu();
  start(vcpu, {0xd9, 0x03});  // fld dword [rbx]
  set_gate(6, code_at + 0x100);
  put(code_at + 0x100, {0xf4});  // hlt
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_INTERNAL_ERROR);
  EXPECT_EQ(regs().rip, code_at);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rip, code_at + 0x101);
}

TEST_F(EmulationFailure, UserCodeGetsAnInvalidOpcode) {
  auto& vcpu = add_vcpu();
  start(vcpu, {0xd9, 0x03});  // fld dword [rbx]
  set_gate(6, code_at + 0x100);
  put(code_at + 0x100, {0xf4});  // hlt
  constexpr Gpa tss = 0x3400;
  store<u64>(tss + 4, stack_top);
  for (Gpa entry : {tables_at, tables_at + 0x1000, tables_at + 0x2000, tables_at + 0x2008})
    store<u64>(entry, load<u64>(entry) | 4);  // user pages
  kvm_sregs sregs;
  ASSERT_EQ(vcpu.get_sregs(sregs), 0);
  sregs.cs.dpl = sregs.ss.dpl = 3;
  sregs.cs.selector |= 3;
  sregs.ss.selector |= 3;
  sregs.tr = {.base = tss, .limit = 0x67, .selector = 0x18, .type = 11, .present = 1};
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rip, code_at + 0x101);
}

TEST_F(Exits, TripleFault) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0x0f, 0x0b});  // ud2, and the IDT is empty
  kvm_sregs sregs;
  vcpu.get_sregs(sregs);
  sregs.idt.limit = 0;
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_SHUTDOWN);
}

TEST_F(Exits, FailEntryForStateThatNoCpuCanBeIn) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {0xf4});  // hlt
  kvm_regs bad = regs();
  const kvm_regs good = bad;
  bad.rip = 0x0000800000000000;  // not canonical
  ASSERT_EQ(vcpu.set_regs(bad), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_FAIL_ENTRY);
  EXPECT_EQ(run().fail_entry.hardware_entry_failure_reason, 0x80000021u);
  ASSERT_EQ(vcpu.set_regs(good), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
}

TEST_F(Exits, ProtectedRamIsEfault) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xc6, 0x06, 0x00, 0x90, 0x01,  // mov byte [0x9000], 1
                            0xf4,                          // hlt
                        });
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_READ), 0);
  EXPECT_EQ(vcpu.run(), -EFAULT);
  EXPECT_EQ(regs().rip, 0u);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_MEMORY_FAULT});
  u64 memory_fault[3];
  std::memcpy(memory_fault, run().padding, sizeof memory_fault);
  EXPECT_EQ(memory_fault[0], 0u) << "flags";
  EXPECT_EQ(memory_fault[1], 0x9000u) << "gpa";
  EXPECT_EQ(memory_fault[2], page_size);
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_READ | PROT_WRITE), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(ram[0x9000], 1);
}

TEST_F(Exits, CodeThatRunsIntoProtectedRamIsEfaultEachTime) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0xc6, 0x06, 0x00, 0xa0, 0x01, 0xf4}, 0x8ffe);  // mov byte [0xa000], 1 ; hlt
  kvm_sregs sregs;
  ASSERT_EQ(vcpu.get_sregs(sregs), 0);
  sregs.cs = {.base = 0, .limit = 0xffff, .selector = 0, .type = 11, .present = 1, .s = 1};
  ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  kvm_regs at = regs();
  at.rip = 0x8ffe;
  ASSERT_EQ(vcpu.set_regs(at), 0);
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_NONE), 0);
  for (int n = 0; n < 3; ++n) {
    EXPECT_EQ(vcpu.run(), -EFAULT);
    EXPECT_EQ(regs().rip, 0x8ffeu);
  }
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_READ | PROT_WRITE), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(ram[0xa000], 1);
}

TEST_F(Exits, RunStateIsSaved) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xfb,  // sti
                            0x90,  // nop
                            0xf4,  // hlt
                            0xfa,  // cli
                            0xf4,  // hlt
                        });
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().if_flag, 1);
  EXPECT_EQ(run().ready_for_interrupt_injection, 1);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().if_flag, 0);
  EXPECT_EQ(run().ready_for_interrupt_injection, 0);
  run().cr8 = 16;
  EXPECT_EQ(vcpu.run(), -EINVAL);
}

TEST_F(Exits, SyncRegs) {
  auto& vcpu = add_vcpu();
  start_real_mode(vcpu, {0x40, 0xf4, 0x40, 0xf4});  // inc ax; hlt; inc ax; hlt
  run().kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().s.regs.regs.rax, 1u);
  EXPECT_EQ(run().s.regs.sregs.cs.base, code_at);
  run().s.regs.regs.rax = 41;
  run().kvm_dirty_regs = KVM_SYNC_X86_REGS;
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().s.regs.regs.rax, 42u);
  EXPECT_EQ(run().kvm_dirty_regs, 0u);
  run().kvm_valid_regs = 1 << 10;
  EXPECT_EQ(vcpu.run(), -EINVAL);
}

}  // namespace
}  // namespace anykvm
