#include "vcpu/trace.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "os/memory_file.h"
#include "os/process_identity.h"
#include "os/signals_blocked.h"
#include "os/write_all.h"

namespace anykvm::vcpu {

void Trace::add(const Record& record) {
  const u64 at = written_.load(std::memory_order_relaxed);
  if (at - read_.load(std::memory_order_acquire) == room) {
    dropped_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  records_[at % room] = record;
  written_.store(at + 1, std::memory_order_release);
}

/// One of the process; never destroyed, since vCPUs may outlive static objects.
class TraceWriter {
 public:
  static TraceWriter& instance() {
    static TraceWriter* const writer = new TraceWriter;
    return *writer;
  }

  bool add(const std::shared_ptr<Trace>& trace) {
    const std::lock_guard lock(mutex_);
    if (!start()) return false;
    traces_.push_back(trace);
    event(R"({"name":"thread_name","ph":"M","pid":%d,"tid":%u,"args":{"name":"vcpu-%u"}})", getpid(), trace->vcpu_,
          trace->vcpu_);
    return true;
  }

 private:
  /// The file and the thread, once a process; a forked child begins its own.
  bool start() {
    if (process_ == os::process_identity()) return fd_ >= 0;
    const bool forked = process_ != 0;
    process_ = os::process_identity();
    traces_.clear();
    text_.clear();
    if (!forked) fd_ = open(std::getenv("ANYKVM_TRACE"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd_ < 0) return false;
    struct stat status;
    if (fstat(fd_, &status) == 0 && status.st_size == 0) text_ = "[{}\n";
    if (!forked) std::atexit([] { instance().drain(); });
    const os::SignalsBlocked blocked;
    std::thread([] {
      for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        instance().drain();
      }
    }).detach();
    return true;
  }

  /// Each on a line of its own, behind the comma that separates it from the one before.
  [[gnu::format(printf, 2, 3)]] void event(const char* format, ...) {
    char line[320];
    va_list rest;
    va_start(rest, format);
    std::vsnprintf(line, sizeof line, format, rest);
    va_end(rest);
    text_ += ',';
    text_ += line;
    text_ += '\n';
  }

  static double us(u64 ns) { return static_cast<double>(ns) * 1e-3; }

  void write_record(u32 vcpu, const Trace::Record& record) {
    char what[96] = "";
    if (record.what)
      std::snprintf(what, sizeof what, R"("%s":"%#llx",)", record.what, static_cast<unsigned long long>(record.value));
    const auto rip = static_cast<unsigned long long>(record.rip);
    if (record.end_ns != record.begin_ns)
      event(R"({"name":"%s","ph":"X","ts":%.3f,"dur":%.3f,"pid":%d,"tid":%u,"args":{%s"rip":"%#llx"}})", record.name,
            us(record.begin_ns), us(record.end_ns - record.begin_ns), getpid(), vcpu, what, rip);
    else
      event(R"({"name":"%s","ph":"i","s":"t","ts":%.3f,"pid":%d,"tid":%u,"args":{%s"rip":"%#llx"}})", record.name,
            us(record.begin_ns), getpid(), vcpu, what, rip);
  }

  void drain(Trace& trace) {
    const u64 end = trace.written_.load(std::memory_order_acquire);
    u64 at = trace.read_.load(std::memory_order_relaxed);
    const u64 last_ns = at != end ? trace.records_[(end - 1) % Trace::room].end_ns : 0;
    for (; at != end; ++at) write_record(trace.vcpu_, trace.records_[at % Trace::room]);
    trace.read_.store(end, std::memory_order_release);
    const u64 dropped = trace.dropped_.load(std::memory_order_relaxed);
    if (dropped == trace.dropped_told_) return;
    event(R"({"name":"%llu events dropped","ph":"i","s":"t","ts":%.3f,"pid":%d,"tid":%u})",
          static_cast<unsigned long long>(dropped - trace.dropped_told_), us(last_ns), getpid(), trace.vcpu_);
    trace.dropped_told_ = dropped;
  }

  void drain() {
    const std::lock_guard lock(mutex_);
    if (process_ != os::process_identity()) return;
    for (auto each = traces_.begin(); each != traces_.end();) {
      const bool over = each->use_count() == 1;  // before the last look: nobody writes any more
      drain(**each);
      each = over ? traces_.erase(each) : each + 1;
    }
    os::write_all(fd_, text_);
    text_.clear();
  }

  std::mutex mutex_;
  u64 process_ = 0;
  int fd_ = -1;
  std::vector<std::shared_ptr<Trace>> traces_;
  std::string text_;
};

std::shared_ptr<Trace> Trace::begin(u32 vcpu) {
  static const bool wanted = std::getenv("ANYKVM_TRACE") != nullptr;
  if (!wanted) return nullptr;
  std::shared_ptr<Trace> trace(new Trace(vcpu));
  return TraceWriter::instance().add(trace) ? trace : nullptr;
}

}  // namespace anykvm::vcpu
