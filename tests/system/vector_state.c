// A guest's program: processes keep values of their own in zmm and opmask registers while they take turns, so that the
// kernel's XSAVE and XRSTOR move them, and compute with them. Says "vectors good", "vectors bad", or "vectors none" on
// a CPU without AVX-512.
#include <immintrin.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
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

int main(void) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw")) {
    puts("vectors none");
    return 0;
  }
  int bad = 0;
  for (unsigned id = 0; id < processes; ++id)
    if (fork() == 0) _exit(compute(id));
  for (unsigned id = 0; id < processes; ++id) {
    int status = 0;
    wait(&status);
    bad |= status;
  }
  puts(bad ? "vectors bad" : "vectors good");
  return bad != 0;
}
