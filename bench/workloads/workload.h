// What the workloads share: `PROGRAM NAME REPETITIONS` runs one of them; what it prints depends on every result, so
// that a wrong one shows in the output, which the benchmark compares with the native run's.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct workload {
  const char* name;
  uint64_t (*run)(long repetitions);
};

/// Marsaglia's xorshift64: the same numbers on every contestant.
static inline uint64_t next_random(uint64_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}

static inline int run_workload(int argc, char** argv, const struct workload* workloads, int count) {
  for (int i = 0; argc == 3 && i < count; ++i)
    if (strcmp(argv[1], workloads[i].name) == 0) {
      printf("%016llx\n", (unsigned long long)workloads[i].run(atol(argv[2])));
      return 0;
    }
  fprintf(stderr, "usage: %s NAME REPETITIONS\n", argv[0]);
  return 64;
}
#define RUN_WORKLOAD(workloads) run_workload(argc, argv, workloads, sizeof workloads / sizeof *workloads)
