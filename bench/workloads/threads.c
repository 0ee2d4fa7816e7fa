// Threads: two that fight for one lock and hand each other turns, and one or two that compute independently.
#include <pthread.h>

#include "workload.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static uint64_t shared;
static long turn, rounds, finished;

/// Short critical sections, and every 4096th time the other thread's turn, so that neither can run ahead for long.
static void* contend(void* argument) {
  const long which = (long)argument;
  for (long i = 0; i < rounds; ++i) {
    pthread_mutex_lock(&lock);
    shared += which + i;
    if ((i & 4095) == 4095) {
      turn = 1 - which;
      pthread_cond_signal(&turned);
      while (turn != which && !finished) pthread_cond_wait(&turned, &lock);
    }
    pthread_mutex_unlock(&lock);
  }
  pthread_mutex_lock(&lock);
  finished = 1;
  pthread_cond_signal(&turned);
  pthread_mutex_unlock(&lock);
  return NULL;
}

static void* compute(void* argument) {
  uint64_t a = *(uint64_t*)argument;
  uint32_t table[1024] = {0};
  for (long i = 0; i < rounds; ++i) {
    a = (a + i) * 0x9e3779b97f4a7c15;
    table[a >> 54] += (uint32_t)a;
  }
  for (int i = 0; i < 1024; ++i) a = a * 31 + table[i];
  *(uint64_t*)argument = a;
  return NULL;
}

static void start(pthread_t* thread, void* (*run)(void*), void* argument) {
  if (pthread_create(thread, NULL, run, argument)) {
    fputs("pthread_create failed\n", stderr);
    exit(1);
  }
}

static uint64_t locks(long repetitions) {
  pthread_t threads[2];
  rounds = repetitions;
  for (long i = 0; i < 2; ++i) start(&threads[i], contend, (void*)i);
  for (long i = 0; i < 2; ++i) pthread_join(threads[i], NULL);
  return shared;
}

static uint64_t independent(int count, long repetitions) {
  pthread_t threads[2];
  uint64_t seeds[2] = {1, 1}, sum = 0;
  rounds = repetitions;
  for (int i = 0; i < count; ++i) start(&threads[i], compute, &seeds[i]);
  for (int i = 0; i < count; ++i) pthread_join(threads[i], NULL), sum += seeds[i];
  return sum;
}
static uint64_t one(long repetitions) { return independent(1, repetitions); }
static uint64_t two(long repetitions) { return independent(2, repetitions); }

int main(int argc, char** argv) {
  static const struct workload workloads[] = {{"locks", locks}, {"one", one}, {"two", two}};
  return RUN_WORKLOAD(workloads);
}
