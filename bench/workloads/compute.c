// Integer and memory kernels.
#include "workload.h"

static uint64_t integer(long repetitions) {
  uint64_t a = 1, b = 2;
  uint32_t c = 3;
  for (long i = 0; i < repetitions; ++i) {
    a = (a + i) * 0x9e3779b97f4a7c15;
    b ^= a >> 29 | a << 35;
    c = c * 1664525 + (uint32_t)b;
    if (c & 0x10000) b += c % 1000;
  }
  return a ^ b ^ c;
}

static uint64_t sieve(long repetitions) {
  enum { limit = 1 << 18 };
  static uint8_t composite[limit];
  uint64_t primes = 0;
  while (repetitions-- > 0) {
    memset(composite, 0, limit);
    for (long i = 2; i < limit; ++i) {
      if (composite[i]) continue;
      primes += i;
      for (long j = 2 * i; j < limit; j += i) composite[j] = 1;
    }
  }
  return primes;
}

static int compare(const void* left, const void* right) {
  const uint32_t a = *(const uint32_t*)left, b = *(const uint32_t*)right;
  return (a > b) - (a < b);
}

static uint64_t sort(long repetitions) {
  enum { count = 100000 };
  static uint32_t numbers[count];
  uint64_t random = 88172645463325252, sum = 0;
  while (repetitions-- > 0) {
    for (int i = 0; i < count; ++i) numbers[i] = next_random(&random);
    qsort(numbers, count, sizeof *numbers, compare);
    for (int i = 0; i < count; ++i) sum = sum * 31 + numbers[i];
  }
  return sum;
}

__attribute__((noinline, optimize("no-optimize-sibling-calls", "no-inline"))) static uint64_t fibonacci(unsigned n) {
  return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static uint64_t calls(long repetitions) {
  uint64_t sum = 0;
  while (repetitions-- > 0) sum += fibonacci(27 + (repetitions & 1));
  return sum;
}

static uint64_t chase(long repetitions) {
  enum { count = 1 << 19 };  // 4 MiB: past the second-level cache, and past any TLB
  static uint64_t next[count];
  uint64_t random = 88172645463325252;
  for (int i = 0; i < count; ++i) next[i] = i;
  for (int i = count - 1; i > 0; --i) {  // Sattolo: a single cycle
    const int j = next_random(&random) % i;
    const uint64_t other = next[j];
    next[j] = next[i];
    next[i] = other;
  }
  uint64_t at = 0, sum = 0;
  for (long i = 0; i < repetitions; ++i) sum += at = next[at];
  return sum;
}

static uint64_t copy(long repetitions) {
  enum { size = 1 << 20 };
  static char from[size], to[size];
  for (int i = 0; i < size; ++i) from[i] = i * 7;
  uint64_t sum = 0;
  for (long i = 0; i < repetitions; ++i) {
    memcpy(to, from, size);  // by the library's way for large blocks
    for (int at = 0; at < size / 8; at += 64 + (i & 63)) {
      memcpy(from + at + (i & 7), to + size / 2 + at, 64 + (i & 63));  // and for small ones
      __asm__ volatile("" ::: "memory");
    }
    sum += (unsigned char)to[i * 4099 % size];
  }
  for (int i = 0; i < size; ++i) sum = sum * 31 + (unsigned char)from[i];
  return sum;
}

int main(int argc, char** argv) {
  static const struct workload workloads[] = {{"integer", integer}, {"sieve", sieve}, {"sort", sort},
                                              {"calls", calls},     {"chase", chase}, {"memcpy", copy}};
  return RUN_WORKLOAD(workloads);
}
