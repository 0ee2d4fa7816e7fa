// Runs workloads one after the other and reports each: in a guest, where it is /task's program, and natively alike.
//
//     runner LIST FOLDER
//
// A line of LIST is NAME, standard input ("-": none), then the program and its arguments, all separated by tabs. The
// programs' output goes to a file in FOLDER, which is in memory. For each the runner prints
//     @begin NAME
//     @end NAME NANOSECONDS CPU-NANOSECONDS STATUS HASH
// with the wall time by CLOCK_MONOTONIC from before fork to after wait, the CPU time that the system counted for it,
// and an FNV-1a hash of the output.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char* const environment[] = {
    "PATH=bin",      "LC_ALL=C",         "PYTHONHOME=python",      "PYTHONHASHSEED=0", "PYTHONDONTWRITEBYTECODE=1",
    "PERL5LIB=perl", "PERL_HASH_SEED=0", "OPENSSL_CONF=/dev/null", "HOME=/",           NULL};

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/// Of the children that were waited for.
static uint64_t cpu_ns(void) {
  struct rusage usage;
  getrusage(RUSAGE_CHILDREN, &usage);
  return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000ull +
         (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000ull;
}

static uint64_t hash_of(const char* path) {
  static unsigned char bytes[65536];
  uint64_t hash = 0xcbf29ce484222325;
  const int file = open(path, O_RDONLY);
  for (ssize_t got; file >= 0 && (got = read(file, bytes, sizeof bytes)) > 0;)
    for (ssize_t i = 0; i < got; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  close(file);
  return hash;
}

/// Point descriptor `number` at the file.
static void redirect(int number, const char* path, int flags) {
  const int file = open(path, flags, 0600);
  if (file < 0 || dup2(file, number) < 0) {
    perror(path);
    _exit(126);
  }
  close(file);
}

static void run(const char* name, const char* input, char** arguments, const char* output) {
  unlink(output);
  printf("@begin %s\n", name);
  fflush(stdout);
  const uint64_t begin = now_ns(), cpu_begin = cpu_ns();
  const pid_t child = fork();
  if (child == 0) {
    redirect(0, strcmp(input, "-") ? input : "/dev/null", O_RDONLY);
    redirect(1, output, O_WRONLY | O_CREAT | O_TRUNC);
    execve(arguments[0], arguments, environment);
    perror(arguments[0]);
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  const uint64_t end = now_ns();
  printf("@end %s %llu %llu %d %016llx\n", name, (unsigned long long)(end - begin),
         (unsigned long long)(cpu_ns() - cpu_begin), status, (unsigned long long)(status ? 0 : hash_of(output)));
  fflush(stdout);
}

int main(int argc, char** argv) {
  FILE* list = argc == 3 ? fopen(argv[1], "r") : NULL;
  if (!list) {
    fprintf(stderr, "usage: runner LIST FOLDER\n");
    return 64;
  }
  char output[4096], line[4096];
  snprintf(output, sizeof output, "%s/output", argv[2]);
  while (fgets(line, sizeof line, list)) {
    char* words[64] = {0};
    int count = 0;
    for (char *rest = line, *word; count < 63 && (word = strsep(&rest, "\t\n")) && *word;) words[count++] = word;
    if (count >= 3) run(words[0], words[1], words + 2, output);
  }
  unlink(output);
  return 0;
}
