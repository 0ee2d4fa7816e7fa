// A 32-bit program without a C library, for a 64-bit kernel's guest: system calls by INT 80h and by the vDSO, a
// thread-local segment, signals, children, arithmetic. Prints a line for each part, which is the same on every machine
// that works. Built with -m32 -nostdlib -static.
typedef unsigned int u32;
typedef unsigned long long u64;

enum { exit_call = 1, fork_call = 2, write_call = 4, getpid_call = 20, signal_call = 48, set_thread_area_call = 243 };
enum { segv = 11 };

static u32 by_interrupt(u32 number, u32 a, u32 b, u32 c) {
  u32 result;
  __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
  return result;
}

static u32 vdso_entry;  // AT_SYSINFO: SYSENTER or SYSCALL, as the kernel likes
static u32 by_vdso(u32 number, u32 a, u32 b, u32 c) {
  u32 result;
  __asm__ volatile("call *%1" : "=a"(result) : "m"(vdso_entry), "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
  return result;
}

static void say(const char* name, u32 value) {
  char line[64];
  unsigned at = 0;
  while (*name) line[at++] = *name++;
  line[at++] = ' ';
  for (int shift = 28; shift >= 0; shift -= 4) line[at++] = "0123456789abcdef"[value >> shift & 15];
  line[at++] = '\n';
  by_interrupt(write_call, 1, (u32)line, at);
}

static unsigned char composite[1 << 20];
static u32 sieve(void) {
  u32 count = 0;
  for (u32 n = 0; n < sizeof composite; ++n) composite[n] = 0;
  for (u32 n = 2; n < sizeof composite; ++n) {
    if (composite[n]) continue;
    ++count;
    for (u32 multiple = 2 * n; multiple < sizeof composite; multiple += n) composite[multiple] = 1;
  }
  return count;
}

static u32 __attribute__((noinline)) fibonacci(u32 n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

static u32 mix(u32 rounds) {
  u64 wide = 0x123456789abcdefull;
  u32 narrow = 1;
  for (u32 n = 0; n < rounds; ++n) {
    wide = wide * 6364136223846793005ull + narrow;
    narrow = (narrow << 7 | narrow >> 25) ^ (u32)(wide >> 32);
    narrow += (u32)(wide >> 40) % 1000003 / (narrow % 17 + 1);
  }
  return narrow;
}

static u32 floating(void) {
  volatile double sum = 0;
  long double product = 1;
  for (int n = 1; n < 20000; ++n) sum += 1.0 / n, product *= 1 + (long double)1 / ((long double)n * n);
  return (u32)(sum * 100000) ^ (u32)(product * 100000000);
}

static u32 thread_local_word(void) {
  static u32 area[4] = {0, 0, 0, 0xc0ffee};
  struct {
    u32 entry, base, limit, flags;
  } descriptor = {~0u, (u32)(area + 4), 0xfffff, 0x51};  // 32 bits, in pages, usable
  if (by_interrupt(set_thread_area_call, (u32)&descriptor, 0, 0)) return 0;
  u32 selector = descriptor.entry * 8 + 3, value;
  __asm__ volatile("mov %w1, %%gs\n\tmovl %%gs:-4, %0\n\taddl $1, %%gs:-4" : "=r"(value) : "r"(selector) : "memory");
  return value + area[3];
}

static volatile u32 faults;
static void handler(int number) {
  ++faults;
  say("signal", (u32)number);
  by_interrupt(exit_call, 7, 0, 0);
}

void start(u32* stack) {
  u32 times = 0;
  if (stack[0] > 1)
    for (const char* digit = (const char*)stack[2]; *digit; ++digit) times = times * 10 + (u32)(*digit - '0');
  volatile u32 result;
  for (; times > 1; --times) result = sieve(), result = fibonacci(27), result = mix(2000000), (void)result;
  u32* vector = stack + 1 + stack[0] + 1;  // behind the arguments
  while (*vector) ++vector;
  for (++vector; vector[0]; vector += 2)
    if (vector[0] == 32) vdso_entry = vector[1];
  say("sieve", sieve());
  say("fibonacci", fibonacci(27));
  say("mix", mix(2000000));
  say("floating", floating());
  say("thread", thread_local_word());
  const u32 pid = by_interrupt(getpid_call, 0, 0, 0);
  u32 same = 0;
  for (u32 n = 0; vdso_entry && n < 1000; ++n) same += by_vdso(getpid_call, 0, 0, 0) == pid;
  say("vdso", same);
  u32 status = 0;
  const u32 child = by_interrupt(fork_call, 0, 0, 0);
  if (!child) {
    by_interrupt(signal_call, segv, (u32)handler, 0);
    volatile u32* volatile nowhere = (u32*)16;
    *nowhere = 1;
  }
  by_interrupt(7 /* waitpid */, child, (u32)&status, 0);
  say("child", status);
  by_interrupt(exit_call, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %esp, %eax\n\tand $-16, %esp\n\tsub $12, %esp\n\tpush %eax\n\tcall start\n");
