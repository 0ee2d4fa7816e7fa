#include "os/process_identity.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

namespace anykvm::os {
namespace detail {

constinit std::atomic<WipedOnFork*> wiped_on_fork{nullptr};

namespace {

/// The last identity given out; a child counts on from its parent's.
std::atomic<u64> last_identity{0};

WipedOnFork* page() {
  if (auto* known = wiped_on_fork.load(std::memory_order_acquire)) return known;
  void* memory = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();  // one page: nothing else would work either
  auto* fresh = new (memory) WipedOnFork{};
  WipedOnFork* expected = nullptr;
  if (!wiped_on_fork.compare_exchange_strong(expected, fresh, std::memory_order_acq_rel)) {
    munmap(memory, page_size);
    return expected;
  }
  // Before Linux 4.14 the C library's fork has to do it.
  if (madvise(memory, page_size, MADV_WIPEONFORK) != 0)
    pthread_atfork(nullptr, nullptr, [] { new (wiped_on_fork.load()) WipedOnFork{}; });
  return fresh;
}

}  // namespace

u64 new_process_identity() {
  auto* wiped = page();
  wiped->pid.store(getpid(), std::memory_order_relaxed);
  u64 expected = 0;
  const u64 next = last_identity.fetch_add(1, std::memory_order_relaxed) + 1;
  return wiped->identity.compare_exchange_strong(expected, next, std::memory_order_acq_rel) ? next : expected;
}

}  // namespace detail

bool in_vfork_child() {
  const auto* page = detail::wiped_on_fork.load(std::memory_order_acquire);
  const s32 pid = page ? page->pid.load(std::memory_order_relaxed) : 0;
  return pid != 0 && pid != getpid();
}

ForkSafeSection::ForkSafeSection() {
  process_identity();
  auto& lock = detail::wiped_on_fork.load(std::memory_order_acquire)->lock;
  while (lock.exchange(1, std::memory_order_acquire) != 0) sched_yield();
}

ForkSafeSection::~ForkSafeSection() {
  detail::wiped_on_fork.load(std::memory_order_relaxed)->lock.store(0, std::memory_order_release);
}

void*& ForkSafeSection::value() { return detail::wiped_on_fork.load(std::memory_order_relaxed)->value; }

}  // namespace anykvm::os
