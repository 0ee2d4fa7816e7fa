#include "isa/host_cpu.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/ucontext.h>

#include <initializer_list>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace anykvm::isa {

extern "C" {
void anykvm_isa_run();
void anykvm_isa_return();
void anykvm_isa_abort();
}

static_assert(state_address == 0x22000000);
static_assert(offsetof(HostState, rflags) == 128 && offsetof(HostState, entry) == 136 &&
              offsetof(HostState, host_rsp) == 144);
static_assert(offsetof(HostState, vector) == 192 && offsetof(HostState, fx) == 704);

__asm__(R"(
.text
.globl anykvm_isa_run, anykvm_isa_return, anykvm_isa_abort
.macro each_vector op
  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    \op \n
  .endr
.endm
.macro load_vector n
  vmovups 0x22000000+192+32*\n, %ymm\n
.endm
.macro store_vector n
  vmovups %ymm\n, 0x22000000+192+32*\n
.endm
anykvm_isa_run:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, 0x22000000+144
  fxrstor64 0x22000000+704
  each_vector load_vector
  pushq 0x22000000+128
  popfq
  mov 0x22000000+0, %rax
  mov 0x22000000+8, %rcx
  mov 0x22000000+16, %rdx
  mov 0x22000000+24, %rbx
  mov 0x22000000+32, %rsp
  mov 0x22000000+40, %rbp
  mov 0x22000000+48, %rsi
  mov 0x22000000+56, %rdi
  mov 0x22000000+64, %r8
  mov 0x22000000+72, %r9
  mov 0x22000000+80, %r10
  mov 0x22000000+88, %r11
  mov 0x22000000+96, %r12
  mov 0x22000000+104, %r13
  mov 0x22000000+112, %r14
  mov 0x22000000+120, %r15
  jmp *0x22000000+136
anykvm_isa_return:
  mov %rax, 0x22000000+0
  mov %rcx, 0x22000000+8
  mov %rdx, 0x22000000+16
  mov %rbx, 0x22000000+24
  mov %rsp, 0x22000000+32
  mov %rbp, 0x22000000+40
  mov %rsi, 0x22000000+48
  mov %rdi, 0x22000000+56
  mov %r8, 0x22000000+64
  mov %r9, 0x22000000+72
  mov %r10, 0x22000000+80
  mov %r11, 0x22000000+88
  mov %r12, 0x22000000+96
  mov %r13, 0x22000000+104
  mov %r14, 0x22000000+112
  mov %r15, 0x22000000+120
  mov 0x22000000+144, %rsp
  pushfq
  popq 0x22000000+128
  each_vector store_vector
  fxsave64 0x22000000+704
anykvm_isa_abort:
  cld
  mov 0x22000000+144, %rsp
  fninit
  movl $0x1f80, -8(%rsp)
  ldmxcsr -8(%rsp)
  vzeroupper
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");

namespace {

void on_fault(int, siginfo_t* info, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  auto& regs = context->uc_mcontext.gregs;
  HostState& s = *reinterpret_cast<HostState*>(state_address);
  if (u64(regs[REG_RIP]) < code_address || u64(regs[REG_RIP]) >= code_address + page_size) {
    std::fprintf(stderr, "trap %lld outside the instruction under test, at %llx\n", regs[REG_TRAPNO], regs[REG_RIP]);
    abort();
  }
  s.trap = u64(regs[REG_TRAPNO]);
  s.fault_address = u64(info->si_addr);
  static constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  for (unsigned n = 0; n < 16; ++n) s.gpr[n] = u64(regs[order[n]]);
  s.rflags = u64(regs[REG_EFL]);
  regs[REG_RIP] = greg_t(&anykvm_isa_abort);
  regs[REG_EFL] &= ~0x40500;  // TF, DF, AC
}

void* map_at(u64 address, std::size_t bytes, int protection) {
  void* at = mmap(reinterpret_cast<void*>(address), bytes, protection,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (at == MAP_FAILED) abort();
  return at;
}

}  // namespace

HostCpu::HostCpu() {
  map_at(code_address, page_size, PROT_READ | PROT_WRITE | PROT_EXEC);
  map_at(data_address, data_bytes, PROT_READ | PROT_WRITE);
  map_at(state_address, page_size, PROT_READ | PROT_WRITE);
  constexpr std::size_t stack_bytes = 64 << 10;
  signal_stack_ = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const stack_t stack{.ss_sp = signal_stack_, .ss_flags = 0, .ss_size = stack_bytes};
  sigaltstack(&stack, nullptr);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigaction(number, &action, nullptr);
}

HostCpu::~HostCpu() {
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) signal(number, SIG_DFL);
  const stack_t off{.ss_sp = nullptr, .ss_flags = SS_DISABLE, .ss_size = 0};
  sigaltstack(&off, nullptr);
  munmap(signal_stack_, 64 << 10);
  munmap(reinterpret_cast<void*>(code_address), page_size);
  munmap(reinterpret_cast<void*>(data_address), data_bytes);
  munmap(reinterpret_cast<void*>(state_address), page_size);
}

void HostCpu::run(const u8* code, unsigned length) {
  HostState& s = state();
  u8* at = reinterpret_cast<u8*>(code_address);
  std::memcpy(at, code, length);
  static constexpr u8 jump[6] = {0xff, 0x25, 0, 0, 0, 0};  // jmp [rip + 0]
  std::memcpy(at + length, jump, sizeof jump);
  const u64 target = u64(&anykvm_isa_return);
  std::memcpy(at + length + sizeof jump, &target, sizeof target);
  s.entry = code_address;
  s.trap = no_trap;
  anykvm_isa_run();
}

}  // namespace anykvm::isa
