// A guest's program: processes keep values of their own in zmm and opmask registers while they take turns, so that the
// kernel's XSAVE and XRSTOR move them, and compute with them. Says "vectors good", "vectors bad", or "vectors none" on
// a CPU without AVX-512. So they do with the x87 unit and with MMX, and one divides by 0 there: "x87 good" or "x87
// bad".
#define _GNU_SOURCE
#include <immintrin.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { processes = 4, rounds = 300 };

__attribute__((target("avx512f,avx512bw"))) static int compute(unsigned id) {
  for (unsigned round = 0; round < rounds; ++round) {
    _Alignas(64) unsigned char in[64], out[64];
    memset(in, (int)(id * 16 + round % 16), sizeof in);
    const unsigned long mask = 0x0123456789abcdef * (id + 1) + round;
    unsigned long mask_behind;
    __asm__ volatile(
        "vmovdqu64 %2, %%zmm1\n\tvmovdqu64 %2, %%zmm17\n\tvmovdqu64 %2, %%zmm31\n\tkmovq %3, %%k3\n\t"
        "mov %4, %%eax\n\tsyscall\n\t"
        "vpaddb %%zmm1, %%zmm17, %%zmm5%{%%k3%}%{z%}\n\tvpaddb %%zmm31, %%zmm5, %%zmm5%{%%k3%}\n\t"
        "vmovdqu64 %%zmm5, %0\n\tkmovq %%k3, %1"
        : "=m"(out), "=r"(mask_behind)
        : "m"(in), "r"(mask), "i"(24 /* sched_yield */)
        : "rax", "rcx", "r11", "xmm1", "xmm5", "xmm17", "xmm31", "k3", "memory");
    if (mask != mask_behind) return 1;
    for (unsigned n = 0; n < 64; ++n)
      if (out[n] != (mask >> n & 1 ? (unsigned char)(3 * in[n]) : 0)) return 1;
  }
  return 0;
}

static int compute_x87(unsigned id) {
  for (unsigned round = 0; round < rounds; ++round) {
    const long double mine = 1.0L / (id + 3) + round;
    long double sum;
    const unsigned long bytes = 0x0101010101010101 * (id + 1);
    unsigned long twice;
    __asm__ volatile(
        "fldt %2\n\tfld1\n\tmov %3, %%eax\n\tsyscall\n\tfaddp\n\tfstpt %0\n\t"
        "movq %4, %%mm3\n\tmov %3, %%eax\n\tsyscall\n\tpaddb %%mm3, %%mm3\n\tmovq %%mm3, %1\n\temms"
        : "=m"(sum), "=m"(twice)
        : "m"(mine), "i"(24 /* sched_yield */), "m"(bytes)
        : "rax", "rcx", "r11", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)", "memory");
    if (sum != mine + 1 || twice != 2 * bytes) return 1;
  }
  return 0;
}

extern const char division[], wait_behind[];
static volatile int faults;

/// The exception is raised behind the division, which the x87 unit's pointer names.
static void on_fault(int signal, siginfo_t* info, void* context) {
  const mcontext_t* machine = &((ucontext_t*)context)->uc_mcontext;
  faults += signal == SIGFPE && info->si_code == FPE_FLTDIV && info->si_addr == wait_behind &&
            machine->fpregs->rip == (unsigned long)division && (machine->fpregs->swd & 0x84) == 0x84;
  machine->fpregs->swd = 0;
}

__attribute__((noinline, noclone)) static void divide_once(void) {
  const unsigned short unmasked = 0x37b, masked = 0x37f;
  __asm__ volatile(
      "fninit\n\tfldcw %0\n\tfldz\n\tfld1\n\t.globl division, wait_behind\ndivision:\n\tfdiv %%st(1), %%st\n\t"
      "nop\n\tmov %2, %%eax\n\tsyscall\nwait_behind:\n\tfwait\n\tfldcw %1\n\tfninit"
      :
      : "m"(unmasked), "m"(masked), "i"(24)
      : "rax", "rcx", "r11", "st", "st(1)", "memory");
}

static int divide(void) {
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
  sigaction(SIGFPE, &action, 0);
  for (unsigned round = 0; round < 10; ++round) divide_once();
  return faults != 10;
}

/// Lets each process do its part at the same time as the others.
static int run(int (*part)(unsigned)) {
  int bad = 0;
  for (unsigned id = 0; id < processes; ++id)
    if (fork() == 0) _exit(part(id));
  for (unsigned id = 0; id < processes; ++id) {
    int status = 0;
    wait(&status);
    bad |= status;
  }
  return bad;
}

int main(void) {
  puts(run(compute_x87) | divide() ? "x87 bad" : "x87 good");
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw")) {
    puts("vectors none");
    return 0;
  }
  puts(run(compute) ? "vectors bad" : "vectors good");
  return 0;
}
