// Exit codes are those of sysexits.h where it has one, and timeout(1)'s for the time-out.
#include "vmm/run_outcome.h"

#include <sysexits.h>

namespace anykvm::vmm {

int exit_code(const Outcome& outcome) {
  switch (outcome.kind) {
    case Outcome::Kind::power_off:
    case Outcome::Kind::reset:
    case Outcome::Kind::left: return 0;
    case Outcome::Kind::triple_fault:
    case Outcome::Kind::internal_error: return EX_SOFTWARE;
    case Outcome::Kind::timed_out: return 124;
    case Outcome::Kind::terminated: return 128 + outcome.signal;
  }
  return EX_SOFTWARE;
}

void OutcomeBox::set(Outcome outcome) {
  const std::scoped_lock lock(mutex_);
  if (outcome_) return;
  outcome_ = std::move(outcome);
  changed_.notify_all();
}

bool OutcomeBox::is_set() const {
  const std::scoped_lock lock(mutex_);
  return outcome_.has_value();
}

Outcome OutcomeBox::wait(std::optional<std::chrono::nanoseconds> limit) {
  std::unique_lock lock(mutex_);
  const auto known = [this] { return outcome_.has_value(); };
  if (!limit)
    changed_.wait(lock, known);
  else if (!changed_.wait_for(lock, *limit, known))
    outcome_ = {.kind = Outcome::Kind::timed_out, .detail = {}};
  return *outcome_;
}

}  // namespace anykvm::vmm
