// Every instruction form, executed by the host CPU and by an engine from the same state: all that they leave must be
// the same. docs/isa-tests.md says what is compared, and which variables of the environment choose a run.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "engine/engine.h"
#include "engine/patient_translator.h"
#include "isa/compare.h"
#include "isa/engine_cpu.h"
#include "isa/generator.h"
#include "isa/minimise.h"
#include "isa/report.h"
#include "isa/worker.h"
#include "x86/cpuid.h"

namespace anykvm::isa {
namespace {

u64 from_environment(const char* name, u64 otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

/// Ends a case that the engine does not come back from: a timer looks whether the case is still the same.
EngineCpu* watched;
u64 watched_case;
void on_alarm(int) {
  if (!watched) return;
  if (watched->cases() == watched_case) watched->interrupt();
  watched_case = watched->cases();
}
class Watch {
 public:
  explicit Watch(EngineCpu& engine) {
    watched = &engine;
    struct sigaction action {};
    action.sa_handler = on_alarm;
    action.sa_flags = SA_RESTART;
    sigaction(SIGVTALRM, &action, nullptr);
    const itimerval each{{0, 400000}, {0, 400000}};
    setitimer(ITIMER_VIRTUAL, &each, nullptr);  // the machine may be busy
  }
  ~Watch() {
    const itimerval off{};
    setitimer(ITIMER_VIRTUAL, &off, nullptr);
    watched = nullptr;
  }
};

class Comparison {
 public:
  /// blocks: Generator::make_block() makes the cases.
  Comparison(u64 seed, std::vector<Mode> modes, bool blocks)
      : blocks_(blocks),
        generator_(seed, features(), modes),
        worker_(features(), generator_.pattern()),
        engine_(make_engine(), features(), generator_.pattern(), worker_.cpu_limit()),
        watch_(engine_) {
    generator_.sort_out(worker_);
  }

  const Generator& generator() const { return generator_; }
  const Worker& worker() const { return worker_; }
  const EngineCpu& engine() const { return engine_; }
  u64 instances() const { return instances_; }
  u64 cases() const { return cases_; }
  u64 traps() const { return traps_; }
  u64 endless_cases() const { return endless_; }
  u64 failures() const { return failures_; }

  /// Runs cases [from, from + count).
  void run(u64 from, unsigned count) {
    for (unsigned n = 0; n < count; ++n) {
      Case& c = worker_.cases()[n];
      blocks_ ? generator_.make_block(from + n, c) : generator_.make(from + n, c);
    }
    worker_.run(count);
    for (unsigned n = 0; n < count; ++n) {
      const Case& c = worker_.cases()[n];
      const Outcome& host = worker_.outcomes()[n];
      const u64 before = engine_.instructions();
      engine_.run(c, outcome_);
      ++cases_;
      // Each iteration of a REP counts as executed, the exit as one more. A translator does not count.
      const u64 executed = engine_.counts_instructions() ? engine_.instructions() - before + 1 : reached(c, host);
      instances_ += std::min<u64>(executed, c.instructions);
      traps_ += host.trap != no_trap;
      if (std::getenv("ANYKVM_ISA_TRAPS")) ++trap_counts_[host.trap];
      if (host.trap == endless && outcome_.trap == endless) {  // a loop that both went on with until they were stopped
        ++endless_;
        continue;
      }
      if (same(c, host, outcome_)) continue;
      failed_.push_back(c);
      reports_.push_back(report(c, host, outcome_, engine_.name()));
    }
    failures_ += failed_.size();
    for (std::size_t n = 0; n < failed_.size(); ++n) explain(failed_[n], reports_[n]);
    failed_.clear();
    reports_.clear();
  }

  /// One line for each kind of failure, and a report of the first of them.
  void print() const {
    for (const auto& [trap, count] : trap_counts_)
      std::printf("exception %d: %llu times\n", int(trap), (unsigned long long)count);
    for (const auto& [kind, group] : groups_)
      std::printf("%llu x %s\n%s\n", (unsigned long long)group.count, kind.c_str(), group.report.c_str());
  }
  std::size_t kinds() const { return groups_.size(); }

 private:
  /// How many instructions lie between a case's first and where it ended.
  static unsigned reached(const Case& c, const Outcome& host) {
    if (host.trap == no_trap) return c.instructions;
    unsigned count = 1;
    engine::Decoded d;
    for (u64 at = 0, end = host.out.rip - c.in.rip; at < end && end < c.code_length;
         at += d.instruction.length, ++count)
      if (!decode(c.mode, c.code + at, unsigned(c.code_length - at), d)) break;
    return count;
  }
  static u64 features() { return x86::supported_xcr0() & compared_state; }
  static std::unique_ptr<engine::Engine> make_engine() {
    engine::Kind kind = engine::Kind::interpret;
    (void)engine::default_kind(kind);
    if (kind == engine::Kind::interpret) return engine::make(kind);
    return engine::make_patient_translator(kind == engine::Kind::translate_exact);
  }
  /// Runs one case alone; its differences.
  std::vector<Difference> judge(const Case& c) {
    worker_.cases()[0] = c;
    worker_.run(1);
    engine_.run(c, outcome_);
    if (same(c, worker_.outcomes()[0], outcome_)) return {};
    return differences(c, worker_.outcomes()[0], outcome_);
  }
  void explain(const Case& c, const std::string& whole) {
    if (groups_.size() >= 60) return;
    const std::vector<Difference> first = judge(c);
    if (first.empty()) {
      Group& group = groups_["not again when run alone: " + mnemonics(c)];
      if (!group.count++) group.report = whole;
      return;
    }
    const std::string field = first[0].field.substr(0, 6);
    if (worker_.outcomes()[0].trap == endless || worker_.outcomes()[0].trap == lost) {  // to try much takes too long
      Group& group = groups_[mnemonics(c) + ": ends the worker"];
      if (!group.count++) group.report = report(c, worker_.outcomes()[0], outcome_, engine_.name());
      return;
    }
    const Case small = minimise(c, [&](const Case& next) {
      const std::vector<Difference> now = judge(next);
      return !now.empty() && now[0].field.substr(0, 6) == field && now[0].host != std::string("fffffffe");
    });
    const std::vector<Difference> now = judge(small);
    if (now.empty()) return;
    std::string kind = mnemonics(small) + ": " + field + (small.mode == Mode::code64 ? "" : " (legacy code)");
    if (field == "except") kind += " " + now[0].host + " " + now[0].engine;
    Group& group = groups_[kind];
    if (!group.count++) group.report = report(small, worker_.outcomes()[0], outcome_, engine_.name());
  }

  struct Group {
    u64 count = 0;
    std::string report;
  };
  bool blocks_;
  Generator generator_;
  Worker worker_;
  EngineCpu engine_;
  Watch watch_;
  Outcome outcome_{};
  std::vector<Case> failed_;
  std::vector<std::string> reports_;  ///< of the same, as they were met
  std::map<u32, u64> trap_counts_;
  std::map<std::string, Group> groups_;
  u64 cases_ = 0, instances_ = 0, traps_ = 0, endless_ = 0, failures_ = 0;
};

void compare(std::vector<Mode> modes, u64 otherwise, bool blocks = false) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP()
      << "not compared under a sanitizer: the worker's strict seccomp ends what its runtime asks of the kernel";
#endif
  const u64 seed = from_environment("ANYKVM_ISA_SEED", 1);
  const u64 wanted = from_environment("ANYKVM_ISA_COUNT", otherwise);
  const u64 only = from_environment("ANYKVM_ISA_CASE", ~0ull);
  Comparison comparison(seed, modes, blocks);
  if (modes[0] != Mode::code64 && !comparison.worker().has_local_segments())
    GTEST_SKIP() << "16- and 32-bit code is not compared: the host does not allow modify_ldt()";
  std::printf("seed %llu, engine %s\n", (unsigned long long)seed, comparison.engine().name());
  for (Mode mode : modes) {
    const Generator::Coverage forms = comparison.generator().coverage(mode);
    std::printf("%u-bit code: %zu forms, %zu of them undefined\n", bits_of(mode), forms.forms, forms.undefined);
  }
  const auto start = std::chrono::steady_clock::now();
  if (only != ~0ull) {
    comparison.run(only, 1);
  } else {
    for (u64 number = 0; comparison.instances() < wanted && comparison.kinds() < 60; number += Worker::batch)
      comparison.run(number, Worker::batch);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "%llu instances in %llu cases, %llu exceptions, %llu endless on both, %u restarts, %.1f s: %.0f instances a "
      "second\n",
      (unsigned long long)comparison.instances(), (unsigned long long)comparison.cases(),
      (unsigned long long)comparison.traps(), (unsigned long long)comparison.endless_cases(),
      comparison.worker().restarts(), seconds, double(comparison.instances()) / seconds);
  comparison.print();
  EXPECT_EQ(comparison.failures(), 0u);
}

TEST(AgainstHost, Code64) { compare({Mode::code64}, 300000); }
TEST(AgainstHost, Code32) { compare({Mode::code32}, 150000); }
TEST(AgainstHost, Code16) { compare({Mode::code16}, 150000); }
TEST(AgainstHost, Blocks) { compare({Mode::code64}, 150000, true); }
TEST(AgainstHost, Blocks32) { compare({Mode::code32}, 150000, true); }

}  // namespace
}  // namespace anykvm::isa
