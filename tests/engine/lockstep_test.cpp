// The lockstep engine: what it lets pass, what it executes once, and that it names a wrong translation.
#include "engine/lockstep/lockstep.h"

#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <string>

#include "x86/fake_machine.h"

namespace anykvm::engine::lockstep {
namespace {

using x86::ExitKind;

class LockstepTest : public testing::Test {
 protected:
  static constexpr u64 tables_at = 0x1000, code_at = 0x10000, data_at = 0x20000, stack_top = 0x30000,
                       device_at = 0x40000000;

  explicit LockstepTest(void (*tamper)(u8*, u8*) = nullptr) : cpu(machine), engine(tamper) {
    static const u8 never = 0;
    cpu.immediate_exit = &never;
    cpu.cpuid.set(x86::supported_cpuid());
    cpu.reset();
    // One to one, in pages of 1 GiB: RAM and, above it, devices.
    machine.put(tables_at, tables_at + page_size + 3);
    for (u64 n = 0; n < 2; ++n) machine.put(tables_at + page_size + 8 * n, n << 30 | 0x83);
    x86::CpuState& s = cpu.state;
    s.cr0 = x86::cr0::pe | x86::cr0::et | x86::cr0::ne | x86::cr0::wp | x86::cr0::pg;
    s.cr3 = tables_at;
    s.cr4 = x86::cr4::pae | x86::cr4::osfxsr | x86::cr4::osxsave;
    s.xcr0 = x86::supported_xcr0() & 7;
    s.msr.efer = x86::efer::lme | x86::efer::lma;
    for (x86::Segment& segment : s.segment) segment = {.limit = ~0u, .type = 3, .present = true, .s = true, .g = true};
    s.segment[x86::cs].type = 11;
    s.segment[x86::cs].l = true;
    s.rip = code_at;
    s.gpr[x86::rsp] = stack_top;
    s.gpr[x86::rdi] = data_at;
    cpu.update_mode();
    cpu.mmu.flush_all();
  }
  void put(std::initializer_list<u8> code) { std::memcpy(machine.base + code_at, code.begin(), code.size()); }
  std::string report() const { return engine.report(); }

  x86::FakeMachine machine;
  x86::Cpu cpu;
  Lockstep engine;
};

TEST_F(LockstepTest, ExecutesEverythingOnce) {
  put({
      0xb9, 0x20, 0x4e, 0x00, 0x00,  // mov ecx, 20000
      0xff, 0x07,                    // loop: inc dword [rdi]
      0x51,                          // push rcx
      0xe8, 0x0d, 0x00, 0x00, 0x00,  // call function
      0x59,                          // pop rcx
      0x66, 0x0f, 0xfe, 0xc1,        // paddd xmm0, xmm1
      0xff, 0xc9,                    // dec ecx
      0x75, 0xef,                    // jnz loop
      0xf4,                          // hlt
      0x90, 0x90, 0x90,              //
      0x48, 0x01, 0x4f, 0x08,        // function: add [rdi+8], rcx
      0x31, 0xc9,                    // xor ecx, ecx
      0xc3,                          // ret
  });
  cpu.state.fpu.vector[1][0] = 3;
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt) << report();
  EXPECT_EQ(report(), "");
  EXPECT_EQ(machine.get<u32>(data_at), 20000u);
  EXPECT_EQ(machine.get<u64>(data_at + 8), 20000ull * 20001 / 2);
  u32 sum;
  std::memcpy(&sum, cpu.state.fpu.vector[0], sizeof sum);
  EXPECT_EQ(sum, 60000u);
  EXPECT_EQ(engine.counts().instructions, 1 + 20000u * 10);
  EXPECT_EQ(engine.counts().alone, 1u);  // HLT
  EXPECT_EQ(engine.counts().again, 0u);
}

TEST_F(LockstepTest, LoopsThatChangeOnlyMemoryAreCounted) {
  put({
      0xff, 0x0f,              // loop: dec dword [rdi]
      0x83, 0x47, 0x04, 0x02,  // add dword [rdi+4], 2
      0x83, 0x3f, 0x00,        // cmp dword [rdi], 0
      0x75, 0xf5,              // jnz loop
      0xf4,                    // hlt
  });
  machine.put<u32>(data_at, 5000);
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt) << report();
  EXPECT_EQ(machine.get<u32>(data_at + 4), 10000u);
}

TEST_F(LockstepTest, DevicesSeeAnAccessOnce) {
  machine.mmio_sinks.insert(device_at);
  machine.ports[0x80] = 0;
  put({
      0xb9, 0x03, 0x00, 0x00, 0x00,              // mov ecx, 3
      0x89, 0x0c, 0x25, 0x00, 0x00, 0x00, 0x40,  // loop: mov [0x40000000], ecx
      0xe6, 0x80,                                // out 0x80, al
      0xff, 0x07,                                // inc dword [rdi]
      0xff, 0xc9,                                // dec ecx
      0x75, 0xf1,                                // jnz loop
      0xf4,                                      // hlt
  });
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt) << report();
  EXPECT_EQ(machine.mmio_writes.size(), 3u);
  EXPECT_EQ(machine.pio_writes.size(), 3u);
  EXPECT_EQ(machine.get<u32>(data_at), 3u);
}

TEST_F(LockstepTest, IdleLoopsAreTheSame) {
  put({
      0x90,  // nop
      0xfa,  // cli
      0x9c,  // pushf
      0x58,  // pop rax
      0xfb,  // sti
      0xf4,  // hlt
  });
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt) << report();
  EXPECT_EQ(report(), "");
  EXPECT_EQ(cpu.state.gpr[x86::rax], 2u);
}

TEST_F(LockstepTest, FaultsAreDeliveredOnce) {
  // The IDT's gate for #PF leads to a handler that counts and skips the instruction.
  constexpr u64 idt_at = 0x3000, gdt_at = 0x4000, handler = code_at + 0x100;
  cpu.state.idtr = {idt_at, 0xfff};
  cpu.state.gdtr = {gdt_at, 0xf};
  machine.put<u64>(gdt_at + 8, 0x00af9b000000ffff);
  cpu.state.segment[x86::cs].selector = 8;
  machine.put<u64>(idt_at + 14 * 16, (handler & 0xffff) | 8ull << 16 | 0x8eull << 40 | (handler >> 16) << 48);
  put({
      0xb9, 0x05, 0x00, 0x00, 0x00,                    // mov ecx, 5
      0x48, 0xb8, 0,    0,    0,    0, 0x10, 0, 0, 0,  // mov rax, 1 << 36: not mapped
      0x8b, 0x10,                                      // loop: mov edx, [rax]
      0xff, 0xc9,                                      // dec ecx
      0x75, 0xfa,                                      // jnz loop
      0xf4,                                            // hlt
  });
  const u8 code[] = {
      0xff, 0x07,                          // inc dword [rdi]
      0x48, 0x83, 0x44, 0x24, 0x08, 0x02,  // add qword [rsp+8], 2
      0x48, 0x83, 0xc4, 0x08,              // add rsp, 8: the error code
      0x48, 0xcf,                          // iretq
  };
  std::memcpy(machine.base + handler, code, sizeof code);
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::halt) << report();
  EXPECT_EQ(cpu.state.rip, code_at + 22);
  EXPECT_EQ(machine.get<u32>(data_at), 5u);
}

/// Replaces the constant 0x12345678 in translated code by the next number.
void count_wrongly(u8* begin, u8* end) {
  constexpr u32 constant = 0x12345678;
  for (u8* at = begin; at + 4 <= end; ++at)
    if (!std::memcmp(at, &constant, 4)) ++*at;
}

struct WrongTranslationTest : LockstepTest {
  WrongTranslationTest() : LockstepTest(count_wrongly) {}
};

TEST_F(WrongTranslationTest, NamesInstructionAndRegister) {
  put({
      0xb9, 0x64, 0x00, 0x00, 0x00,        // mov ecx, 100
      0xff, 0x07,                          // loop: inc dword [rdi]
      0x83, 0xf9, 0x32,                    // cmp ecx, 50
      0x75, 0x0a,                          // jne skip
      0x8d, 0x51, 0x07,                    // lea edx, [rcx+7]
      0x48, 0x81, 0xc3, 0x78, 0x56, 0x34,  // add rbx, 0x12345678
      0x12,                                //
      0xff, 0xc9,                          // skip: dec ecx
      0x75, 0xeb,                          // jnz loop
      0xf4,                                // hlt
  });
  testing::internal::CaptureStderr();
  engine.run(cpu);
  const std::string printed = testing::internal::GetCapturedStderr();
  EXPECT_EQ(cpu.exit.kind, ExitKind::engine_error);
  EXPECT_EQ(printed, report());
  EXPECT_NE(report().find("> 000000000001000f  4881c378563412"), std::string::npos) << report();
  EXPECT_NE(report().find("add rbx, 0x12345678"), std::string::npos) << report();
  EXPECT_NE(report().find("* rbx      0000000000000000  0000000012345678  0000000012345679"), std::string::npos)
      << report();
  EXPECT_EQ(report().find("* rdx"), std::string::npos) << report();
  // It does not go on.
  engine.run(cpu);
  EXPECT_EQ(cpu.exit.kind, ExitKind::engine_error);
}

TEST_F(WrongTranslationTest, NamesTheStore) {
  put({
      0xc7, 0x07, 0x78, 0x56, 0x34, 0x12,  // mov dword [rdi], 0x12345678
      0x8b, 0x07,                          // mov eax, [rdi]
      0xf4,                                // hlt
  });
  testing::internal::CaptureStderr();
  engine.run(cpu);
  (void)testing::internal::GetCapturedStderr();
  EXPECT_EQ(cpu.exit.kind, ExitKind::engine_error);
  EXPECT_NE(report().find("> 0000000000010000"), std::string::npos) << report();
  EXPECT_NE(report().find("* 4 bytes stored at 0000000000020000"), std::string::npos) << report();
}

TEST_F(WrongTranslationTest, FindsAStoreToAnotherPlace) {
  put({
      0xc6, 0x87, 0x78, 0x56, 0x34, 0x12, 0x01,  // mov byte [rdi+0x12345678], 1
      0xf4,                                      // hlt
  });
  cpu.state.gpr[x86::rdi] = data_at - 0x12345678;
  testing::internal::CaptureStderr();
  engine.run(cpu);
  (void)testing::internal::GetCapturedStderr();
  EXPECT_EQ(cpu.exit.kind, ExitKind::engine_error);
  EXPECT_NE(report().find("mov byte ptr [rdi+0x12345678], 0x01"), std::string::npos) << report();
}

TEST_F(WrongTranslationTest, FindsAWrongBranch) {
  cpu.state.gpr[x86::rax] = 0x12345678;
  put({
      0x3d, 0x78, 0x56, 0x34, 0x12,  // cmp eax, 0x12345678
      0x74, 0x02,                    // je equal
      0xff, 0xc3,                    // inc ebx
      0x90,                          // equal: nop
      0xf4,                          // hlt
  });
  testing::internal::CaptureStderr();
  engine.run(cpu);
  (void)testing::internal::GetCapturedStderr();
  EXPECT_EQ(cpu.exit.kind, ExitKind::engine_error);
  EXPECT_NE(report().find("> 0000000000010000"), std::string::npos) << report();
  EXPECT_NE(report().find("* rflags"), std::string::npos) << report();
}

}  // namespace
}  // namespace anykvm::engine::lockstep
