// What the translator must get right beyond what each instruction does: the state at a host exception in the middle of
// a block.
#include <asm/prctl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "engine/engine.h"
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

class TranslatorTest : public TestMachine {
 protected:
  TranslatorTest() { engine::set_default_kind(engine::Kind::translate); }
  ~TranslatorTest() override { engine::set_default_kind(engine::Kind::interpret); }

  /// SSE and AVX as a kernel enables them.
  void enable_vectors(vcpu::Vcpu& vcpu) {
    kvm_sregs sregs;
    ASSERT_EQ(vcpu.get_sregs(sregs), 0);
    sregs.cr4 |= 0x40600;  // OSFXSR, OSXMMEXCPT, OSXSAVE
    ASSERT_EQ(vcpu.set_sregs(sregs), 0);
    kvm_xcrs xcrs{.nr_xcrs = 1, .flags = 0, .xcrs = {{.xcr = 0, .reserved = 0, .value = 7}}, .padding = {}};
    ASSERT_EQ(vcpu.set_xcrs(xcrs), 0);
  }
  void make_runnable(vcpu::Vcpu& vcpu) {
    kvm_mp_state state{.mp_state = KVM_MP_STATE_RUNNABLE};
    ASSERT_EQ(vcpu.set_mp_state(state), 0);
  }
  static u64 gs_base() {
    u64 base;
    syscall(SYS_arch_prctl, ARCH_GET_GS, &base);
    return base;
  }
  /// The exception frame that a handler finds: RIP, CS, RFLAGS, RSP, SS.
  u64 frame(unsigned n) { return load<u64>(regs().rsp + n * 8); }
};

TEST_F(TranslatorTest, DivideErrorFindsTheRegistersOfItsInstruction) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0x49, 0xc7, 0xc7, 0x0f, 0, 0, 0,  // mov r15, 15
                            0x6a, 0x07,                       // push 7
                            0x31, 0xc9,                       // xor ecx, ecx
                            0xb8, 0x05, 0,    0,    0,        // mov eax, 5
                            0xba, 0x06, 0,    0,    0,        // mov edx, 6
                            0xf9,                             // stc
                            0x48, 0xf7, 0xf1,                 // div rcx
                            0x49, 0xff, 0xc7,                 // inc r15
                            0xf4,                             // hlt
                        });
  set_gate(0, 0x11000);
  put(0x11000, {0xf4});  // hlt
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rip, 0x11001u);
  EXPECT_EQ(frame(0), code_at + 22);
  EXPECT_EQ(frame(2) & 0x8d5, 0x45u);  // CF by stc, ZF and PF by xor
  EXPECT_EQ(frame(3), stack_top - 8);
  EXPECT_EQ(regs().rax, 5u);
  EXPECT_EQ(regs().rdx, 6u);
  EXPECT_EQ(regs().r15, 15u);
}

TEST_F(TranslatorTest, DividesInABlock) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0xb9, 0x01, 0, 0, 0,     // mov ecx, 1
                            0xb8, 0x9c, 0xff, 0, 0,  // mov eax, 0xff9c
                            0x31, 0xd2,              // xor edx, edx
                            0x66, 0xf7, 0xf9,        // idiv cx: 65436 does not fit
                            0xf4,                    // hlt
                        });
  set_gate(0, 0x11000);
  put(0x11000, {
                   0xb1, 0x07,        // mov cl, 7
                   0x31, 0xc0,        // xor eax, eax
                   0xb0, 0x64,        // mov al, 100
                   0x48, 0x31, 0xd2,  // xor rdx, rdx
                   0x48, 0xf7, 0xf1,  // div rcx
                   0x0f, 0xb6, 0xd8,  // movzx ebx, al
                   0xf4,              // hlt
               });
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(regs().rbx, 14u);
  EXPECT_EQ(regs().rdx, 2u);
}

TEST_F(TranslatorTest, UnmaskedSimdExceptionFindsTheVectorRegisters) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0xb8, 0x80, 0x1d, 0,    0,                 // mov eax, 0x1d80: division by zero unmasked
                            0x89, 0x04, 0x25, 0x00, 0x90, 0,    0,     // mov [0x9000], eax
                            0x0f, 0xae, 0x14, 0x25, 0x00, 0x90, 0, 0,  // ldmxcsr [0x9000]
                            0x0f, 0x57, 0xc9,                          // xorps xmm1, xmm1
                            0xb8, 0x03, 0,    0,    0,                 // mov eax, 3
                            0xf3, 0x0f, 0x2a, 0xc0,                    // cvtsi2ss xmm0, eax
                            0xf3, 0x0f, 0x5e, 0xc1,                    // divss xmm0, xmm1
                            0xf4,                                      // hlt
                        });
  enable_vectors(vcpu);
  set_gate(19, 0x11000);
  put(0x11000, {
                   0x0f, 0x11, 0x04, 0x25, 0x00, 0x91, 0, 0,  // movups [0x9100], xmm0
                   0xf4,                                      // hlt
               });
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(regs().rip, 0x11009u);
  EXPECT_EQ(frame(0), code_at + 32);
  EXPECT_EQ(load<float>(0x9100), 3.0f);
  kvm_fpu fpu;
  ASSERT_EQ(vcpu.get_fpu(fpu), 0);
  EXPECT_EQ(fpu.mxcsr, 0x1d84u);
}

TEST_F(TranslatorTest, HostFaultOnRamLeavesTheStateOfItsInstruction) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0x8b, 0x04, 0x25, 0x00, 0x90, 0, 0,  // mov eax, [0x9000]: the TLB knows the page
                            0x89, 0x04, 0x25, 0x00, 0x90, 0, 0,  // mov [0x9000], eax
                            0xe6, 0x10,                          // out 0x10, al
                            0xbb, 0x01, 0,    0,    0,           // mov ebx, 1
                            0x49, 0xc7, 0xc6, 0x0e, 0,    0, 0,  // mov r14, 14
                            0x41, 0x54,                          // push r12
                            0xf9,                                // stc
                            0xff, 0x04, 0x25, 0x00, 0x90, 0, 0,  // inc dword [0x9000]
                            0xf4,                                // hlt
                        });
  ASSERT_EQ(vcpu.run(), 0);
  ASSERT_EQ(run().exit_reason, KVM_EXIT_IO);
  const u64 gs_before = gs_base();
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_NONE), 0);
  EXPECT_EQ(vcpu.run(), -EFAULT);
  EXPECT_EQ(gs_base(), gs_before);
  EXPECT_EQ(regs().rip, code_at + 31);
  EXPECT_EQ(regs().rbx, 1u);
  EXPECT_EQ(regs().r14, 14u);
  EXPECT_EQ(regs().rsp, stack_top - 8);
  EXPECT_EQ(regs().rflags & 1, 1u);
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_READ | PROT_WRITE), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  EXPECT_EQ(load<u32>(0x9000), 1u);
}

// The fault comes up in the reference engine while the guest's x87 registers are in the host's unit.
TEST_F(TranslatorTest, HostFaultOnRamKeepsX87Registers) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0xdb, 0xe3,              // fninit
                            0xd9, 0xe8,              // fld1
                            0xd9, 0xeb,              // fldpi
                            0xbf, 0x00, 0x90, 0, 0,  // mov edi, 0x9000
                            0xb9, 0x04, 0,    0, 0,  // mov ecx, 4
                            0xf3, 0xa6,              // repe cmpsb
                            0xd8, 0xc1,              // fadd st0, st1
                            0xf4,                    // hlt
                        });
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_NONE), 0);
  EXPECT_EQ(vcpu.run(), -EFAULT);
  EXPECT_EQ(regs().rip, code_at + 16);
  kvm_fpu fpu;
  ASSERT_EQ(vcpu.get_fpu(fpu), 0);
  EXPECT_EQ(fpu.fsw, 0x3000);
  EXPECT_EQ(fpu.ftwx, 0xc0);
  EXPECT_EQ(fpu.fpr[1][7], 0x80);  // 1.0, below pi
  EXPECT_EQ(fpu.last_ip, code_at + 4);
  ASSERT_EQ(mprotect(ram + 0x9000, page_size, PROT_READ | PROT_WRITE), 0);
  ASSERT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, KVM_EXIT_HLT);
  ASSERT_EQ(vcpu.get_fpu(fpu), 0);
  EXPECT_EQ(fpu.last_ip, code_at + 18);
}

TEST_F(TranslatorTest, AnotherProcessorsStoreReachesARunningLoop) {
  auto& looping = add_vcpu();
  start_long_mode(looping, {
                               0xc6, 0x04, 0x25, 0x00, 0x90, 0, 0, 0x01,  // mov byte [0x9000], 1
                               0xeb, 0xfe,                                // jmp to itself
                               0xf4,                                      // hlt
                           });
  auto& writing = add_vcpu();
  start_long_mode(writing, {0xc6, 0x04, 0x25, 0x00, 0x90, 0, 0, 0x01, 0xeb, 0xfe, 0xf4});
  make_runnable(writing);
  kvm_regs at_writer = regs(1);
  at_writer.rip = 0x20000;
  ASSERT_EQ(writing.set_regs(at_writer), 0);
  put(0x20000, {
                   0xc6, 0x04, 0x25, 0x09, 0x00, 0x01, 0, 0x00,  // mov byte [0x10009], 0: jmp to the next
                   0xf4,                                         // hlt
               });
  std::thread loop([&] { EXPECT_EQ(looping.run(), 0); });
  EXPECT_TRUE(eventually([&] { return __atomic_load_n(ram + 0x9000, __ATOMIC_ACQUIRE) == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // until it runs in a block of its own
  EXPECT_EQ(writing.run(), 0);
  EXPECT_EQ(run(1).exit_reason, KVM_EXIT_HLT);
  std::atomic<bool> ended{false};
  std::thread watchdog([&] {
    if (!eventually([&] { return ended.load(); })) {
      ADD_FAILURE() << "still in the loop";
      set_immediate_exit();
      looping.wake();
    }
  });
  loop.join();
  ended = true;
  watchdog.join();
  EXPECT_EQ(regs().rip, code_at + 11);
}

TEST_F(TranslatorTest, CodeWrittenElsewhereRunsBehindASerializingInstruction) {
  constexpr u32 rounds = 300;
  auto& caller = add_vcpu();
  start_long_mode(caller, {
                              0xbd, 0x01, 0,    0,    0,           // mov ebp, 1
                              0x39, 0x2c, 0x25, 0x00, 0x90, 0, 0,  // wait: cmp [0x9000], ebp
                              0x75, 0xf7,                          // jne wait
                              0x31, 0xc0,                          // xor eax, eax
                              0x0f, 0xa2,                          // cpuid
                              0xe8, 0xe9, 0x0f, 0x02, 0,           // call 0x31000
                              0x39, 0xe8,                          // cmp eax, ebp
                              0x75, 0x11,                          // jne out
                              0x89, 0x2c, 0x25, 0x40, 0x90, 0, 0,  // mov [0x9040], ebp
                              0xff, 0xc5,                          // inc ebp
                              0x81, 0xfd, 0x2d, 0x01, 0,    0,     // cmp ebp, 301
                              0x75, 0xd7,                          // jne wait
                              0xf4,                                // out: hlt
                          });
  auto& writer = add_vcpu();
  kvm_sregs sregs;
  ASSERT_EQ(caller.get_sregs(sregs), 0);
  ASSERT_EQ(writer.set_sregs(sregs), 0);
  make_runnable(writer);
  kvm_regs at_writer{};
  at_writer.rip = 0x20000;
  at_writer.rsp = stack_top - 0x1000;
  at_writer.rflags = 2;
  ASSERT_EQ(writer.set_regs(at_writer), 0);
  put(0x31000, {0xb8, 0, 0, 0, 0, 0xc3});  // mov eax, imm32 ; ret
  put(0x20000, {
                   0xbd, 0x01, 0,    0,    0,              // mov ebp, 1
                   0x89, 0x2c, 0x25, 0x01, 0x10, 0x03, 0,  // again: mov [0x31001], ebp
                   0x89, 0x2c, 0x25, 0x00, 0x90, 0,    0,  // mov [0x9000], ebp
                   0x39, 0x2c, 0x25, 0x40, 0x90, 0,    0,  // wait: cmp [0x9040], ebp
                   0x75, 0xf7,                             // jne wait
                   0xff, 0xc5,                             // inc ebp
                   0x81, 0xfd, 0x2d, 0x01, 0,    0,        // cmp ebp, 301
                   0x75, 0xdf,                             // jne again
                   0xf4,                                   // hlt
               });
  std::atomic<int> running{2};
  std::thread first([&] {
    EXPECT_EQ(caller.run(), 0);
    --running;
  });
  std::thread second([&] {
    EXPECT_EQ(writer.run(), 0);
    --running;
  });
  // When the caller finds old code it halts, and the writer waits for ever.
  (void)eventually([&] { return running.load() < 2; });
  if (!eventually([&] { return running.load() == 0; }))
    for (unsigned n = 0; n < 2; ++n) {
      __atomic_store_n(&run(n).immediate_exit, 1, __ATOMIC_RELAXED);
      vcpus[n]->wake();
    }
  first.join();
  second.join();
  EXPECT_EQ(regs(0).rbp, rounds + 1);
  EXPECT_EQ(regs(1).rbp, rounds + 1);
}

/// The same code on the reference engine and on the translator.
class TranslatorAgainstReference : public TestMachine {
 protected:
  TranslatorAgainstReference() { engine::set_default_kind(engine::Kind::interpret); }
  ~TranslatorAgainstReference() override { engine::set_default_kind(engine::Kind::interpret); }

  u64 xcr0 = 0;  ///< of the guest; 0: no vector registers

  void compare(std::initializer_list<u8> code) {
    kvm_regs found[2];
    std::vector<u8> memory[2];
    for (const unsigned n : {0u, 1u}) {
      if (n) engine::set_default_kind(engine::Kind::translate);
      auto& vcpu = add_vcpu();
      for (u64 at = 0x9000; at < 0xb000; at += 8) store<u64>(at, at * 0x9e3779b97f4a7c15);
      std::memset(ram + 0x7000, 0, 0x1000);
      start_long_mode(vcpu, code);
      kvm_mp_state runnable{.mp_state = KVM_MP_STATE_RUNNABLE};
      ASSERT_EQ(vcpu.set_mp_state(runnable), 0);
      if (xcr0) {
        kvm_sregs sregs;
        ASSERT_EQ(vcpu.get_sregs(sregs), 0);
        sregs.cr4 |= 0x40600;  // OSFXSR, OSXMMEXCPT, OSXSAVE
        ASSERT_EQ(vcpu.set_sregs(sregs), 0);
        kvm_xcrs xcrs{.nr_xcrs = 1, .flags = 0, .xcrs = {{.xcr = 0, .reserved = 0, .value = xcr0}}, .padding = {}};
        ASSERT_EQ(vcpu.set_xcrs(xcrs), 0);
      }
      ASSERT_EQ(vcpu.run(), 0);
      ASSERT_EQ(run(n).exit_reason, KVM_EXIT_HLT);
      found[n] = regs(n);
      memory[n].assign(ram + 0x7000, ram + 0xb000);
    }
    EXPECT_EQ(std::memcmp(&found[0], &found[1], sizeof found[0]), 0);
    EXPECT_EQ(found[0].rflags, found[1].rflags);
    EXPECT_EQ(found[0].rax, found[1].rax);
    EXPECT_TRUE(memory[0] == memory[1]);
  }
};

TEST_F(TranslatorAgainstReference, BitStrings) {
  compare({
      0xbb, 0x00, 0xa0, 0,    0,                 // mov ebx, 0xa000
      0x48, 0xc7, 0xc1, 0xf3, 0xff, 0xff, 0xff,  // mov rcx, -13
      0x49, 0xc7, 0xc7, 0x77, 0x03, 0,    0,     // mov r15, 0x377
      0x31, 0xc0,                                // xor eax, eax
      0x48, 0x0f, 0xab, 0x0b,                    // bts [rbx], rcx: on the page before
      0x11, 0xc0,                                // adc eax, eax
      0xf0, 0x4c, 0x0f, 0xb3, 0x3c, 0x0b,        // lock btr [rbx + rcx], r15
      0x11, 0xc0,                                // adc eax, eax
      0x0f, 0xbb, 0x4b, 0x04,                    // btc dword [rbx + 4], ecx
      0x11, 0xc0,                                // adc eax, eax
      0x44, 0x0f, 0xa3, 0x7b, 0xfe,              // bt dword [rbx - 2], r15d
      0x11, 0xc0,                                // adc eax, eax
      0x48, 0x0f, 0xab, 0x4b, 0x05,              // bts [rbx + 5], rcx: across the pages
      0x11, 0xc0,                                // adc eax, eax
      0xf4,                                      // hlt
  });
}

TEST_F(TranslatorAgainstReference, FlagsOnTheStack) {
  compare({
      0xf9,        // stc
      0x9c,        // pushfq
      0xfb,        // sti
      0x9c,        // pushfq
      0xfb,        // sti
      0xfd,        // std
      0x9c,        // pushfq
      0xfc,        // cld
      0x19, 0xc0,  // sbb eax, eax: CF is still set
      0x9c,        // pushfq
      0xfa,        // cli
      0x9c,        // pushfq
      0x9f,        // lahf
      0xf4,        // hlt
  });
}

TEST_F(TranslatorAgainstReference, ShiftsByNothingKeepFlags) {
  compare({
      0xbb, 0x00, 0xa0, 0,    0,  // mov ebx, 0xa000
      0xf9,                       // stc
      0xff, 0x0b,                 // dec dword [rbx]: a check of the address between CF and who reads it
      0x66, 0xc1, 0x4b, 0x08, 0,  // ror word [rbx + 8], 0
      0x19, 0xc0,                 // sbb eax, eax
      0xf9,                       // stc
      0xff, 0x0b,                 // dec dword [rbx]
      0xc1, 0x63, 0x08, 0x20,     // shl dword [rbx + 8], 32
      0x19, 0xc9,                 // sbb ecx, ecx
      0xf4,                       // hlt
  });
  EXPECT_EQ(u32(regs(0).rax), ~0u);
}

TEST_F(TranslatorAgainstReference, SegmentsAndPushesFromMemory) {
  compare({
      0x0f, 0x01, 0xf8,                                // swapgs
      0x65, 0x48, 0x8b, 0x04, 0x25, 0x00, 0x90, 0, 0,  // mov rax, gs:[0x9000]
      0xb9, 0x02, 0x01, 0x00, 0xc0,                    // mov ecx, MSR_KERNEL_GS_BASE
      0x31, 0xd2,                                      // xor edx, edx
      0xb8, 0x00, 0x01, 0,    0,                       // mov eax, 0x100
      0x0f, 0x30,                                      // wrmsr
      0xf9,                                            // stc
      0x0f, 0x01, 0xf8,                                // swapgs
      0x65, 0xff, 0x34, 0x25, 0x00, 0x90, 0,    0,     // push qword gs:[0x9000]
      0xff, 0x34, 0x24,                                // push qword [rsp]
      0x41, 0xbd, 0x00, 0xa0, 0,    0,                 // mov r13d, 0xa000
      0x41, 0xff, 0x75, 0xfc,                          // push qword [r13 - 4]: across pages
      0x11, 0xc0,                                      // adc eax, eax
      0x8c, 0xc8,                                      // mov eax, cs
      0x48, 0x8c, 0xd3,                                // mov rbx, ss
      0x41, 0x8c, 0xde,                                // mov r14d, ds
      0xf4,                                            // hlt
  });
}

TEST_F(TranslatorAgainstReference, JumpsInTheMiddleOfABlock) {
  compare({
      0xb9, 0x64, 0,    0, 0,  // mov ecx, 100
      0x31, 0xc0,              // xor eax, eax
      0xf6, 0xc1, 0x01,        // again: test cl, 1
      0x74, 0x06,              // jz even
      0x01, 0xc8,              // add eax, ecx
      0x79, 0x04,              // jns next
      0xeb, 0x02,              // jmp next
      0xd1, 0xc0,              // even: rol eax, 1
      0xff, 0xc9,              // next: dec ecx
      0x0f, 0x93, 0xc3,        // setnc bl
      0x75, 0xec,              // jnz again
      0x3c, 0x80,              // cmp al, 0x80
      0xeb, 0x01,              // jmp over
      0xf4,                    // hlt
      0x0f, 0x92, 0xc2,        // over: setc dl
      0xf4,                    // hlt
  });
}

TEST_F(TranslatorAgainstReference, Avx512) {
  if (!x86::supports(x86::Feature::avx512bw)) GTEST_SKIP() << "no AVX-512 here";
  xcr0 = 0xe7;
  compare({
      0xbb, 0x00, 0x90, 0x00, 0x00,                                // mov    ebx,0x9000
      0x41, 0xbd, 0x00, 0x91, 0x00, 0x00,                          // mov    r13d,0x9100
      0x41, 0xbe, 0x78, 0x56, 0x34, 0x12,                          // mov    r14d,0x12345678
      0x48, 0xb8, 0x69, 0x96, 0x3c, 0xc3, 0xf0, 0x0f, 0x5a, 0x5a,  // movabs rax,0x5a5a0ff0c33c9669
      0xc4, 0xe1, 0xfb, 0x92, 0xc8,                                // kmovq  k1,rax
      0x62, 0xe1, 0xfe, 0x48, 0x6f, 0x0b,                          // vmovdqu64 zmm17,ZMMWORD PTR [rbx]
      0x62, 0xe1, 0x75, 0xc1, 0xfe, 0x63, 0x01,                    // vpaddd zmm20{k1}{z},zmm17,ZMMWORD PTR [rbx+0x40]
      0x62, 0xd1, 0x75, 0x40, 0x74, 0x55, 0xfc,                    // vpcmpeqb k2,zmm17,ZMMWORD PTR [r13-0x100]
      0xc4, 0xe1, 0xfb, 0x93, 0xca,                                // kmovq  rcx,k2
      0x62, 0xd2, 0x7d, 0x48, 0x7c, 0xee,                          // vpbroadcastd zmm5,r14d
      0x62, 0xd1, 0x55, 0x58, 0xfe, 0x75, 0x01,                    // vpaddd zmm6,zmm5,DWORD BCST [r13+0x4]
      0x62, 0xe1, 0x7f, 0x49, 0x7f, 0xa3, 0x81, 0x00, 0x00, 0x00,  // vmovdqu8 ZMMWORD PTR [rbx+0x81]{k1},zmm20
      0x62, 0xf1, 0xfe, 0x48, 0x7f, 0x73, 0x04,                    // vmovdqu64 ZMMWORD PTR [rbx+0x100],zmm6
      0x62, 0x22, 0x75, 0x40, 0x8d, 0xfc,                          // vpermb zmm31,zmm17,zmm20
      0x62, 0x41, 0x8f, 0x00, 0x2a, 0xf6,                          // vcvtsi2sd xmm30,xmm30,r14
      0x62, 0x11, 0xff, 0x08, 0x2c, 0xfe,                          // vcvttsd2si r15,xmm30
      0x62, 0x63, 0x7d, 0x48, 0x39, 0xf9, 0x03,                    // vextracti32x4 xmm1,zmm31,0x3
      0xc5, 0xfa, 0x7f, 0x8b, 0x40, 0x01, 0x00, 0x00,              // vmovdqu XMMWORD PTR [rbx+0x140],xmm1
      0x62, 0x61, 0xfd, 0x48, 0x7f, 0x7b, 0x30,                    // vmovdqa64 ZMMWORD PTR [rbx+0xc00],zmm31
      0xf4,                                                        // hlt
  });
}

TEST_F(TranslatorTest, TimeStampHasItsOffset) {
  auto& vcpu = add_vcpu();
  start_long_mode(vcpu, {
                            0xf9,                       // stc
                            0x0f, 0x31,                 // rdtsc
                            0x48, 0xc1, 0xe2, 0x20,     // shl rdx, 32
                            0x48, 0x09, 0xd0,           // or rax, rdx
                            0x48, 0x89, 0xc3,           // mov rbx, rax
                            0xbe, 0x07, 0,    0,    0,  // mov esi, 7
                            0x0f, 0x01, 0xf9,           // rdtscp
                            0xf4,                       // hlt
                        });
  const u64 offset = u64(1) << 50;
  vcpu.set_tsc_offset(offset);
  kvm_msr_entry aux{.index = 0xc0000103, .reserved = 0, .data = 0x1234};
  ASSERT_EQ(vcpu.set_msrs({&aux, 1}), 1);
  ASSERT_EQ(vcpu.run(), 0);
  const u64 first = regs().rbx, second = regs().rdx << 32 | regs().rax;
  EXPECT_GE(first, offset);
  EXPECT_LT(first, offset * 2);
  EXPECT_GE(second, first);
  EXPECT_LT(second - first, 10'000'000'000u);
}

}  // namespace
}  // namespace anykvm
