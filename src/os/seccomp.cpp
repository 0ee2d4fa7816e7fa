#include "os/seccomp.h"

#include <linux/seccomp.h>
#include <sys/prctl.h>

#include <cstdio>

#include "os/proc_lines.h"

namespace anykvm::os {

namespace {

/// That this thread has; Linux 5.9 tells their number.
int filters() {
  if (prctl(PR_GET_SECCOMP) != SECCOMP_MODE_FILTER) return 0;
  int count = -1;
  for_each_line("/proc/thread-self/status",
                [&](const char* line) { return std::sscanf(line, "Seccomp_filters: %d", &count) != 1; });
  return count;
}

int filters_at_start = 0;
[[gnu::constructor]] void count_filters() { filters_at_start = filters(); }

}  // namespace

bool seccomp_filter_added() {
  const int now = filters();
  return now < 0 || now != filters_at_start;
}

}  // namespace anykvm::os
