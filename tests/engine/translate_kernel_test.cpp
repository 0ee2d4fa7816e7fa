// What a kernel does on the way in and out, in translated code and by the reference engine: system calls, IRETQ, access
// to user memory, string instructions, and the faults among them.
#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>

#include "engine/engine.h"
#include "x86/cpuid.h"
#include "x86/long_mode.h"

namespace anykvm::engine {
namespace {

using namespace x86;

constexpr Gva user_code = 0x400000, user_data = 0x402000, user_stack = 0x404000;
constexpr Gva kernel_code = 0x5000, system_call = 0x6800, buffer = 0xd800;

/// A kernel at kernel_code that returns to user code, and is called from there.
class Guest : public LongMode {
 public:
  explicit Guest(std::unique_ptr<Engine> with) : engine(std::move(with)) {
    cpu.cpuid.set(supported_cpuid());
    stop_at_exceptions();
    for (Gva page = user_code; page <= user_stack; page += page_size)
      map(page, 0x200000 + (page - user_code), pte::p | pte::w | pte::u);
    CpuState& s = cpu.state;
    s.msr.star = u64(0x18) << 48 | u64(kernel_cs) << 32;
    s.msr.lstar = system_call;
    s.msr.sfmask = flag::if_ | flag::df | flag::ac | flag::tf;
    const u64 frame[] = {user_code, user_cs, 0x202 | flag::rf | flag::cf, user_stack + 0x800, user_ss};
    std::memcpy(machine.base + 0x7000, frame, sizeof frame);
    s.gpr[rsp] = 0x7000;
    s.rip = kernel_code;
    put(kernel_code, {0x48, 0xcf});  // iretq
    start = s;
    for (unsigned n = 0; n < 3 * page_size; n += 8) machine.put<u64>(0x200000 + n, n * 0x9e3779b97f4a7c15);
  }

  void put(Gpa gpa, std::initializer_list<u8> bytes) { std::memcpy(machine.base + gpa, bytes.begin(), bytes.size()); }
  void put_user(std::initializer_list<u8> bytes) { put(0x200000, bytes); }
  void smap(bool on) {
    cpu.state.cr4 = on ? cpu.state.cr4 | cr4::smap : cpu.state.cr4 & ~cr4::smap;
    cpu.update_mode();
  }
  u64 steps(const char* mnemonic) const {
    struct Sum {
      const char* mnemonic;
      u64 count;
    } sum{mnemonic, 0};
    engine->for_each_step(
        [](void* arg, const char* name, u64 count) {
          auto& wanted = *static_cast<Sum*>(arg);
          if (!std::strcmp(wanted.mnemonic, name)) wanted.count += count;
        },
        &sum);
    return sum.count;
  }

  std::unique_ptr<Engine> engine;
  CpuState start;
};

class TranslateKernelTest : public testing::Test {
 protected:
  template <class Body>
  void both(Body body) {
    body(translator);
    body(reference);
  }
  void run_and_compare() {
    both([](Guest& guest) { guest.engine->run(guest.cpu); });
    const CpuState &left = translator.cpu.state, &right = reference.cpu.state;
    EXPECT_EQ(translator.cpu.exit.kind, reference.cpu.exit.kind);
    EXPECT_EQ(left.rip, right.rip);
    EXPECT_EQ(left.rflags(), right.rflags());
    EXPECT_EQ(left.cpl, right.cpl);
    for (unsigned n = 0; n < 16; ++n) EXPECT_EQ(left.gpr[n], right.gpr[n]) << n;
    for (unsigned n = 0; n < 6; ++n) {
      EXPECT_EQ(left.segment[n].selector, right.segment[n].selector) << n;
      EXPECT_EQ(left.segment[n].base, right.segment[n].base) << n;
      EXPECT_EQ(left.segment[n].type, right.segment[n].type) << n;
    }
    EXPECT_EQ(translator.cpu.data_privilege, reference.cpu.data_privilege);
    EXPECT_EQ(left.cr2, right.cr2);
    EXPECT_EQ(std::memcmp(translator.machine.base + 0x7000, reference.machine.base + 0x7000, 0x7000), 0);
    EXPECT_EQ(std::memcmp(translator.machine.base + 0x200000, reference.machine.base + 0x200000, 0x5000), 0);
  }

  static u64 load(const Guest& guest, Gpa gpa) {
    u64 value;
    std::memcpy(&value, guest.machine.base + gpa, sizeof value);
    return value;
  }

  Guest translator{make_translator()}, reference{make_interpreter()};
};

TEST_F(TranslateKernelTest, SystemCallsCopyFromAndToUserMemory) {
  both([](Guest& guest) {
    guest.smap(true);
    guest.put_user({
        0xbb, 0x64, 0,    0,    0,              // mov ebx, 100
        0x48, 0xc7, 0xc6, 0xf0, 0x2f, 0x40, 0,  // again: mov rsi, 0x402ff0: the copy goes across pages
        0x48, 0xc7, 0xc2, 0x21, 0,    0,    0,  // mov rdx, 33
        0x44, 0x8d, 0x04, 0x1b,                 // lea r8d, [rbx + rbx]
        0xf9,                                   // stc
        0x0f, 0x05,                             // syscall
        0x73, 0x06,                             // jnc: the flags did not come back
        0xff, 0xcb,                             // dec ebx
        0x75, 0xe5,                             // jnz again
        0x0f, 0x0b,                             // ud2
        0x0f, 0x0b,                             // ud2
    });
    guest.put(system_call, {
                               0x49, 0x89, 0xe1,                          // mov r9, rsp
                               0xbc, 0x00, 0x80, 0,    0,                 // mov esp, 0x8000
                               0x41, 0x51,                                // push r9
                               0x51,                                      // push rcx
                               0x41, 0x53,                                // push r11
                               0x48, 0xc7, 0xc7, 0xfb, 0xdf, 0,    0,     // mov rdi, 0xdffb
                               0x48, 0x89, 0xd1,                          // mov rcx, rdx
                               0x0f, 0x01, 0xcb,                          // stac
                               0xf3, 0xa4,                                // rep movsb
                               0x44, 0x89, 0x06,                          // mov [rsi], r8d
                               0x0f, 0x01, 0xca,                          // clac
                               0x31, 0xc0,                                // xor eax, eax
                               0xb9, 0x07, 0,    0,    0,                 // mov ecx, 7
                               0xf3, 0x48, 0xab,                          // rep stosq
                               0xf3, 0x48, 0xab,                          // rep stosq: nothing
                               0x9c,                                      // pushfq
                               0x58,                                      // pop rax
                               0x41, 0x5b,                                // pop r11
                               0x59,                                      // pop rcx
                               0x5c,                                      // pop rsp
                               0x0f, 0x00, 0x2c, 0x25, 0xf8, 0xde, 0, 0,  // verw [0xdef8]
                               0x48, 0x0f, 0x07,                          // sysretq
                           });
    for (Gva page = 0xc000; page < 0x10000; page += page_size) guest.map(page, page, pte::p | pte::w);
  });
  run_and_compare();
  EXPECT_EQ(translator.cpu.state.rip, 0x6000u + exception::ud * 16 + 1);
  EXPECT_EQ(translator.cpu.state.gpr[rbx], 0u);
  for (const char* quick : {"syscall", "sysret", "stac", "clac", "verw", "iretq"})
    EXPECT_LT(translator.steps(quick), 10u) << quick;
}

TEST_F(TranslateKernelTest, AccessIsCheckedBehindClac) {
  for (const bool smap : {true, false}) {
    both([smap](Guest& guest) {
      guest.cpu.state.rip = kernel_code;
      guest.cpu.state.gpr[rsp] = 0x7000;
      guest.enter(0);
      guest.smap(smap);
      guest.put(kernel_code, {
                                 0xf9,                                // stc
                                 0x0f, 0x01, 0xcb,                    // stac
                                 0x0f, 0x01, 0xcb,                    // stac
                                 0xff, 0x04, 0x25, 0, 0x20, 0x40, 0,  // inc dword [0x402000]
                                 0x9c,                                // pushfq
                                 0x0f, 0x01, 0xca,                    // clac
                                 0x72, 0x01,                          // jc: inc keeps CF
                                 0xf4,                                // hlt
                                 0x9c,                                // pushfq
                                 0xff, 0x04, 0x25, 0, 0x20, 0x40, 0,  // inc dword [0x402000]
                                 0xf4,                                // hlt
                             });
    });
    run_and_compare();
    EXPECT_EQ(translator.cpu.state.rip, smap ? 0x6000u + exception::pf * 16 + 1 : kernel_code + 30);
  }
}

TEST_F(TranslateKernelTest, StringsStopWhereTheyFault) {
  both([](Guest& guest) {
    guest.put_user({
        0xbf, 0x00, 0x28, 0x40, 0,  // mov edi, 0x402800
        0xb8, 0x5a, 0, 0, 0,        // mov eax, 0x5a
        0xb9, 0x00, 0x40, 0, 0,     // mov ecx, 0x4000
        0xf3, 0xab,                 // rep stosd: to the end of the stack's page
    });
  });
  run_and_compare();
  EXPECT_EQ(translator.cpu.state.rip, 0x6000u + exception::pf * 16 + 1);
  EXPECT_EQ(translator.cpu.state.gpr[rdi], user_stack + page_size);
  both([](Guest& guest) {
    guest.cpu.state.rip = kernel_code;
    guest.cpu.state.gpr[rsp] = 0x7000;
    guest.cpu.state.gpr[rdi] = 0x7ff0;
    guest.cpu.state.gpr[rsi] = 0x8ffd;
    guest.cpu.state.gpr[rcx] = 0x20;
    guest.put(kernel_code, {
                               0xf3, 0x48, 0xa5,  // rep movsq: elements across pages
                               0xfd,              // std
                               0xb1, 0x11,        // mov cl, 0x11
                               0xf3, 0xa4,        // rep movsb
                               0xf4,              // hlt
                           });
  });
  run_and_compare();
  EXPECT_EQ(translator.cpu.state.rip, kernel_code + 9);
}

TEST_F(TranslateKernelTest, KernelSavesUsersX87Pointers) {
  both([](Guest& guest) {
    guest.put_user({
        0xdb, 0xe3,                                // fninit
        0xd9, 0xe8,                                // fld1
        0xd9, 0x14, 0x25, 0x00, 0x20, 0x40, 0x00,  // fst dword [0x402000]
        0xd8, 0xf0,                                // fdiv st0, st0
        0x0f, 0x05,                                // syscall
    });
    guest.put(system_call, {0x0f, 0xae, 0x04, 0x25, 0x00, 0x80, 0, 0, 0x0f, 0x0b});  // fxsave [0x8000] ; ud2
  });
  run_and_compare();
  EXPECT_EQ(translator.cpu.state.fpu.x87_code_selector, reference.cpu.state.fpu.x87_code_selector);
  EXPECT_EQ(translator.cpu.state.fpu.x87_data_selector, reference.cpu.state.fpu.x87_data_selector);
  EXPECT_EQ(std::memcmp(translator.cpu.state.fpu.x87, reference.cpu.state.fpu.x87, 24), 0);
}

// Each return takes other flags; now and then the kernel changes what a call clears, and the selectors.
TEST_F(TranslateKernelTest, SystemCallsChangeFlagsAndSelectors) {
  constexpr unsigned calls = 1000;
  constexpr Gpa table = 0x100000, seen = 0x110000;
  constexpr u64 any = 0x257ed5;  // but TF
  for (const bool alignment_mask : {false, true}) {
    both([alignment_mask](Guest& guest) {
      std::mt19937_64 random(7);
      for (Gpa page = table; page < seen + calls * 64; page += page_size)
        guest.map(page, page, pte::p | pte::w | pte::u);
      guest.cpu.state = guest.start;
      guest.cpu.state.cr4 |= cr4::smap;
      guest.cpu.state.msr.sfmask |= flag::ac;
      if (alignment_mask) guest.cpu.state.cr0 |= cr0::am;
      guest.cpu.update_mode();
      for (unsigned n = 0; n < calls; ++n) {
        const Gpa entry = table + n * 16;
        guest.machine.put<u64>(entry, random() & any & ~(random() % 16 ? flag::ac : 0));
        const u32 mask = u32(random() % 32 ? 0 : 2 | (random() & any) | (random() % 4 ? flag::tf | flag::ac : 0));
        guest.machine.put<u32>(entry + 8, mask);
        guest.machine.put<u32>(entry + 12, u32(random()) & 0xfff8fff8);
      }
      guest.put_user({
          0x31, 0xdb,                       // xor ebx, ebx
          0xbd, 0x00, 0x00, 0x10, 0x00,     // mov ebp, table
          0xbf, 0x00, 0x00, 0x11, 0x00,     // mov edi, seen
          0x0f, 0x05,                       // again: syscall
          0x9c,                             // pushfq
          0x58,                             // pop rax
          0x48, 0x89, 0x07,                 // mov [rdi], rax
          0x48, 0x89, 0x4f, 0x08,           // mov [rdi + 8], rcx
          0x4c, 0x89, 0x5f, 0x10,           // mov [rdi + 16], r11
          0x8c, 0xc8,                       // mov eax, cs
          0x89, 0x47, 0x18,                 // mov [rdi + 24], eax
          0x8c, 0xd0,                       // mov eax, ss
          0x89, 0x47, 0x1c,                 // mov [rdi + 28], eax
          0x48, 0x83, 0xc7, 0x40,           // add rdi, 64
          0x48, 0x83, 0xc5, 0x10,           // add rbp, 16
          0xff, 0xc3,                       // inc ebx
          0x81, 0xfb, 0xe8, 0x03, 0,    0,  // cmp ebx, calls
          0x75, 0xd5,                       // jne again
          0x0f, 0x0b,                       // ud2
      });
      guest.put(system_call, {
                                 0x49, 0x89, 0xe1,              // mov r9, rsp
                                 0xbc, 0x00, 0x80, 0,    0,     // mov esp, 0x8000
                                 0x9c,                          // pushfq
                                 0x5e,                          // pop rsi
                                 0x0f, 0x01, 0xcb,              // stac
                                 0x48, 0x89, 0x77, 0x20,        // mov [rdi + 32], rsi
                                 0x48, 0x89, 0x4f, 0x28,        // mov [rdi + 40], rcx
                                 0x4c, 0x89, 0x5f, 0x30,        // mov [rdi + 48], r11
                                 0x8c, 0xc8,                    // mov eax, cs
                                 0x89, 0x47, 0x38,              // mov [rdi + 56], eax
                                 0x8c, 0xd0,                    // mov eax, ss
                                 0x89, 0x47, 0x3c,              // mov [rdi + 60], eax
                                 0x49, 0x89, 0xca,              // mov r10, rcx
                                 0x8b, 0x45, 0x08,              // mov eax, [rbp + 8]
                                 0x8b, 0x75, 0x0c,              // mov esi, [rbp + 12]
                                 0x4c, 0x8b, 0x5d, 0x00,        // mov r11, [rbp]
                                 0x0f, 0x01, 0xca,              // clac
                                 0x85, 0xc0,                    // test eax, eax
                                 0x74, 0x14,                    // jz: change nothing
                                 0xb9, 0x84, 0,    0,    0xc0,  // mov ecx, SFMASK
                                 0x31, 0xd2,                    // xor edx, edx
                                 0x0f, 0x30,                    // wrmsr
                                 0xb9, 0x81, 0,    0,    0xc0,  // mov ecx, STAR
                                 0x31, 0xc0,                    // xor eax, eax
                                 0x89, 0xf2,                    // mov edx, esi
                                 0x0f, 0x30,                    // wrmsr
                                 0x4c, 0x89, 0xd1,              // mov rcx, r10
                                 0x4c, 0x89, 0xcc,              // mov rsp, r9
                                 0x48, 0x0f, 0x07,              // sysretq
                             });
    });
    run_and_compare();
    EXPECT_EQ(translator.cpu.state.rip, 0x6000u + exception::ud * 16 + 1);
    EXPECT_EQ(translator.cpu.state.gpr[rbx], calls);
    for (unsigned n = 0; n < calls; ++n)
      for (unsigned word = 0; word < 8; ++word)
        ASSERT_EQ(load(translator, seen + n * 64 + word * 8), load(reference, seen + n * 64 + word * 8))
            << n << ' ' << word << (alignment_mask ? " with" : " without") << " CR0.AM";
  }
}

// A return sets AC: the next access checks its alignment, or the next call lets the kernel reach user memory.
TEST_F(TranslateKernelTest, SystemCallsMindAc) {
  for (const bool alignment_mask : {false, true}) {
    both([alignment_mask](Guest& guest) {
      guest.cpu.state = guest.start;
      guest.cpu.state.cr4 |= cr4::smap;
      if (alignment_mask)
        guest.cpu.state.cr0 |= cr0::am;
      else
        guest.cpu.state.msr.sfmask &= ~flag::ac;
      guest.cpu.update_mode();
      guest.put_user({
          0x31, 0xdb,                                // xor ebx, ebx
          0xff, 0xc3,                                // again: inc ebx
          0x0f, 0x05,                                // syscall
          0x8b, 0x04, 0x25, 0x01, 0x20, 0x40, 0x00,  // mov eax, [0x402001]
          0x83, 0xfb, 0x04,                          // cmp ebx, 4
          0x75, 0xf0,                                // jne again
          0x0f, 0x0b,                                // ud2
      });
      guest.put(system_call, {
                                 0x83, 0xfb, 0x03,                          // cmp ebx, 3
                                 0x75, 0x07,                                // jne
                                 0x89, 0x1c, 0x25, 0x00, 0x20, 0x40, 0x00,  // mov [0x402000], ebx
                                 0x83, 0xfb, 0x02,                          // cmp ebx, 2
                                 0x75, 0x07,                                // jne
                                 0x49, 0x81, 0xcb, 0x00, 0x00, 0x04, 0x00,  // or r11, AC
                                 0x48, 0x0f, 0x07,                          // sysretq
                             });
    });
    run_and_compare();
    const u8 vector = alignment_mask ? exception::ac : exception::ud;
    EXPECT_EQ(translator.cpu.state.rip, 0x6000u + vector * 16 + 1);
    EXPECT_EQ(translator.cpu.state.gpr[rbx], alignment_mask ? 2u : 4u);
  }
}

TEST_F(TranslateKernelTest, SystemCallsMayBeTurnedOff) {
  both([](Guest& guest) {
    guest.put_user({0x0f, 0x05});
    guest.cpu.state.msr.efer &= ~efer::sce;
  });
  run_and_compare();
  EXPECT_EQ(translator.cpu.state.rip, 0x6000u + exception::ud * 16 + 1);
}

}  // namespace
}  // namespace anykvm::engine
