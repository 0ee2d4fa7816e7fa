#include "engine/translate/shared_code.h"

#include <sched.h>

#include <cstring>

#include "os/attention.h"

namespace anykvm::engine::translate {

namespace {

// The state of the pages whose addresses agree in the low bits: writable, or code, with the upper bits of the one that
// is.
constexpr u32 is_writable = 1, is_code = 2, of_several = ~0u;
constexpr u32 code_of(u64 page) { return u32(page >> 32) << 2 | is_code; }
constexpr bool is_any_code(u32 state) { return state & is_code; }
constexpr unsigned most_members = 4096, page_states = (SharedCode::address_bits >> 12) + 1, requests_kept = 256;
constexpr u64 number_bits = page_size - 1;

std::atomic<u32> states[page_states];
/// Pages that somebody began to watch, each with its number's low bits in those of the address.
std::atomic<u64> requests[requests_kept];
std::atomic<u64> request_count{0};
/// How often a page of code has become writable.
std::atomic<u64> write_count{0};

std::atomic<u32>& state_of(u64 page) { return states[(page >> 12) % page_states]; }

}  // namespace

/// Outlives its vCPU: others may be about to tell it something.
struct SharedCode::Member {
  std::atomic<bool> taken{false};
  std::atomic<bool> running{false};
  std::atomic<u32> callers{0};  ///< how many use `attention` just now
  std::atomic<std::atomic<u32>*> attention{nullptr};
  std::atomic<u64> served{0};        ///< requests that its TLB knows of
  std::atomic<bool> waiting{false};  ///< for the others to serve a request of its own

  static Member all[most_members];
  static std::atomic<unsigned> used;  ///< numbers up to here have been taken at some time
};

SharedCode::Member SharedCode::Member::all[most_members];
std::atomic<unsigned> SharedCode::Member::used{0};

SharedCode::~SharedCode() {
  if (!member_) return;
  member_->running.store(false);
  member_->attention.store(nullptr);
  while (member_->callers.load()) sched_yield();
  member_->waiting.store(false);
  member_->taken.store(false);
}

void SharedCode::enter(std::atomic<u32>& attention) {
  if (!member_) [[unlikely]] {
    for (unsigned n = 0; n < most_members && !member_; ++n) {
      if (Member::all[n].taken.exchange(true)) continue;
      member_ = &Member::all[n];
      unsigned used = Member::used.load();
      while (used <= n && !Member::used.compare_exchange_weak(used, n + 1)) {
      }
    }
    // Without a place nobody tells it anything: it finds out when something else makes it look.
    if (!member_) return;
    member_->attention.store(&attention);
  }
  // Either it sees a request from here on, or who makes one sees it run.
  member_->running.store(true);
}

void SharedCode::leave() {
  if (!member_) return;
  member_->running.store(false);
  // A store that was under way is over.
  if (request_count.load() != member_->served.load(std::memory_order_relaxed)) tell_waiting();
}

template <class Wanted>
void SharedCode::tell(Wanted wanted) const {
  const unsigned used = Member::used.load();
  for (unsigned n = 0; n < used; ++n) {
    Member& member = Member::all[n];
    if (&member == member_ || !wanted(member)) continue;
    member.callers.fetch_add(1);
    if (std::atomic<u32>* attention = member.attention.load()) os::raise_attention(*attention);
    member.callers.fetch_sub(1);
  }
}

void SharedCode::tell_others() const {
  tell([](const Member& member) { return member.running.load(); });
}

void SharedCode::tell_waiting() const {
  tell([](const Member& member) { return member.waiting.load(); });
}

void SharedCode::written(u64 page) {
  own_[own_bit(page) / 64] |= 1ull << own_bit(page) % 64;
  std::atomic<u32>& state = state_of(page);
  if (state.load() == is_writable) return;
  const u32 before = state.exchange(is_writable);
  if (!is_any_code(before)) return;
  // Its own is nothing to be told of, but there may have been others before, or other pages that are watched no more.
  const bool is_next = write_count.fetch_add(1) == writes_seen_;
  if (is_next && before == code_of(page)) ++writes_seen_;
  tell_others();
}

bool SharedCode::is_watched(u64 page) {
  const u32 state = state_of(page).load();
  return state == code_of(page) || state == of_several;
}

bool SharedCode::watch(u64 page) {
  std::atomic<u32>& state = state_of(page);
  u32 before = state.load(), now;
  do {
    if (before == code_of(page) || before == of_several) return false;
    now = is_any_code(before) ? of_several : code_of(page);
  } while (!state.compare_exchange_weak(before, now));
  if (before != is_writable) return false;
  if (member_) member_->waiting.store(true);  // before anybody can have served it
  const u64 number = request_count.fetch_add(1);
  requests[number % requests_kept].store((page & page_mask) | (number & number_bits));
  const bool waits_already = last_watch_;
  last_watch_ = number + 1;
  tell_others();
  // Its own TLB is the caller's business. When no other has anything to serve, what is read from now on is right.
  if (member_ && member_->served.load(std::memory_order_relaxed) == number) member_->served.store(number + 1);
  if (!waits_already && settled()) stop_waiting();
  return own_[own_bit(page) / 64] >> own_bit(page) % 64 & 1;
}

bool SharedCode::is_quiet() const {
  return member_ && request_count.load() == member_->served.load(std::memory_order_relaxed) &&
         write_count.load() == writes_seen_ && !last_watch_;
}

unsigned SharedCode::newly_watched(u64 (&pages)[few]) {
  if (!member_) return 0;
  const u64 count = request_count.load(), served = member_->served.load(std::memory_order_relaxed);
  if (count == served) [[likely]]
    return 0;
  unsigned found = count - served > requests_kept ? few + 1 : 0;
  for (u64 number = served; number != count && found <= few; ++number) {
    const u64 request = requests[number % requests_kept].load();
    // One that is not there yet, or not any more, may be of any page.
    if ((request & number_bits) != (number & number_bits))
      found = few + 1;
    else if (own_[own_bit(request) / 64] >> own_bit(request) % 64 & 1 && ++found <= few)
      pages[found - 1] = request & page_mask;
  }
  if (found > few) std::memset(own_, 0, sizeof own_);
  member_->served.store(count);
  tell_waiting();
  return found;
}

bool SharedCode::settled() const {
  const unsigned used = Member::used.load();
  for (unsigned n = 0; n < used; ++n) {
    const Member& member = Member::all[n];
    if (&member != member_ && member.running.load() && member.served.load() < last_watch_) return false;
  }
  return true;
}

void SharedCode::stop_waiting() {
  last_watch_ = 0;
  if (member_) member_->waiting.store(false);
}

bool SharedCode::is_stale(bool serialized) {
  const u64 writes = write_count.load();
  bool stale = writes != writes_seen_;
  writes_seen_ = writes;
  if (last_watch_) [[unlikely]] {
    // Until the others have served it, a store may slip through behind a comparison.
    const bool over = settled();
    stale |= over || serialized;
    if (over) stop_waiting();
  }
  return stale;
}

}  // namespace anykvm::engine::translate
