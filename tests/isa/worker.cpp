#include "isa/worker.h"

#include <cpuid.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "isa/segments.h"

// native_entry.S
extern "C" {
void anykvm_isa_enter();
void anykvm_isa_exit();
void anykvm_isa_signal(int, siginfo_t*, void*);
[[noreturn]] void anykvm_isa_abort();
void anykvm_isa_on_signal(int, siginfo_t*, void*);
}

namespace anykvm::isa {

namespace {

/// As native_entry.S knows it.
struct NativeState {
  u64 gpr[16];
  u64 rip, cs, rflags, rsp, ss;  ///< IRETQ's frame
  u64 host_rsp, host_fs;
  u64 base[2];
  u16 es, ds, fs, gs;
  u64 sets_bases;
  u64 features;
  u32 host_mxcsr;
  u32 trap, error;
  u64 address;
};
static_assert(offsetof(NativeState, rip) == 128 && offsetof(NativeState, ss) == 160 &&
              offsetof(NativeState, base) == 184 && offsetof(NativeState, es) == 200 &&
              offsetof(NativeState, features) == 216 && offsetof(NativeState, host_mxcsr) == 224);

}  // namespace

extern "C" {
NativeState anykvm_isa_state __attribute__((visibility("hidden")));
alignas(64) u8 anykvm_isa_image[page_size] __attribute__((visibility("hidden")));
}

namespace {

NativeState& state() { return anykvm_isa_state; }
u8* xsave_image() { return anykvm_isa_image; }

/// Where the components lie in the host's XSAVE area.
struct Layout {
  u32 ymm_high = 576, opmask = 0, zmm_high = 0, zmm_upper = 0, size = 832;
};
Layout layout;

void ask_layout(u64 features) {
  unsigned a, b, c, d;
  const auto offset = [&](unsigned component) {
    if (!(features >> component & 1)) return 0u;
    __cpuid_count(0xd, component, a, b, c, d);
    if (b + a > layout.size) layout.size = b + a;
    return b;
  };
  layout.ymm_high = offset(2);
  layout.opmask = offset(5);
  layout.zmm_high = offset(6);
  layout.zmm_upper = offset(7);
}

template <class T>
void component_in(u32 at, const T& from) {
  if (at) std::memcpy(xsave_image() + at, &from, sizeof from);
}
template <class T>
void component_out(u32 at, T& to) {
  if (at)
    std::memcpy(&to, xsave_image() + at, sizeof to);
  else
    std::memset(&to, 0, sizeof to);
}

/// The registers at a trap are the signal frame's.
void on_signal(const siginfo_t*, const ucontext_t& context) {
  NativeState& s = state();
  const auto& regs = context.uc_mcontext.gregs;
  static constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  for (unsigned n = 0; n < 16; ++n) s.gpr[n] = u64(regs[order[n]]);
  s.rsp = s.gpr[4];
  s.rip = u64(regs[REG_RIP]);
  s.rflags = u64(regs[REG_EFL]);
  s.cs = u64(regs[REG_CSGSFS]) & 0xffff;
  s.ss = u64(regs[REG_CSGSFS]) >> 48;
  s.trap = u32(regs[REG_TRAPNO]);
  s.error = u32(regs[REG_ERR]);
  s.address = u64(regs[REG_CR2]);
  std::memcpy(xsave_image(), context.uc_mcontext.fpregs, layout.size);
}

void* map_at(u64 address, std::size_t bytes, int protection, int flags = MAP_ANONYMOUS | MAP_PRIVATE, int fd = -1) {
  void* at = mmap(reinterpret_cast<void*>(address), bytes, protection,
                  flags | MAP_POPULATE | (address ? MAP_FIXED_NOREPLACE : 0), fd, 0);
  if (at == MAP_FAILED) _exit(3);
  return at;
}

/// IRETQ's frame, where no 32-bit address reaches it. Its address gives ESP its upper half; see narrow_stack_high.
constexpr u64 frame_address = 0x4a1200000000 | narrow_stack_high | 0x5000;

u8* code_alias;  ///< the code pages once more, to write to

void prepare(const Case& c, const u8* pattern) {
  NativeState& s = state();
  const Registers& r = c.in;
  u64* frame = reinterpret_cast<u64*>(frame_address);
  frame[0] = r.rip, frame[1] = r.selector[1], frame[2] = r.rflags, frame[3] = r.gpr[4], frame[4] = r.selector[2];
  std::memcpy(s.gpr, r.gpr, sizeof s.gpr);
  s.rip = r.rip;
  s.cs = r.selector[1];
  s.rflags = r.rflags;
  s.rsp = r.gpr[4];
  s.ss = r.selector[2];
  s.base[0] = r.base[0], s.base[1] = r.base[1];
  s.es = r.selector[0], s.ds = r.selector[3], s.fs = r.selector[4], s.gs = r.selector[5];
  s.sets_bases = c.mode == Mode::code64;
  s.trap = no_trap;
  s.error = 0;
  s.address = 0;
  u8* image = xsave_image();
  std::memcpy(image, r.fx, sizeof r.fx);
  std::memset(image + 464, 0, 48 + 64);
  std::memcpy(image + 512, &s.features, 8);
  component_in(layout.ymm_high, r.ymm_high);
  component_in(layout.opmask, r.opmask);
  component_in(layout.zmm_high, r.zmm_high);
  component_in(layout.zmm_upper, r.zmm_upper);
  u8* data = reinterpret_cast<u8*>(data_address);
  std::memcpy(data, pattern, data_bytes);
  for (unsigned n = 0; n < c.poke_count; ++n) std::memcpy(data + c.pokes[n].at, &c.pokes[n].value, 8);
}

void collect(const Case& c, Outcome& o) {
  const NativeState& s = state();
  Registers& r = o.out;
  std::memcpy(r.gpr, s.gpr, sizeof r.gpr);
  r.rip = s.trap == no_trap ? exit_address : s.rip;
  r.rflags = s.rflags;
  r.base[0] = s.base[0], r.base[1] = s.base[1];
  r.selector[0] = s.es, r.selector[1] = s.trap == no_trap ? code64_selector : u16(s.cs), r.selector[2] = u16(s.ss);
  r.selector[3] = s.ds, r.selector[4] = s.fs, r.selector[5] = s.gs;
  std::memcpy(r.fx, xsave_image(), sizeof r.fx);
  std::memcpy(&r.in_use, xsave_image() + 512, 8);
  component_out(layout.ymm_high, r.ymm_high);
  component_out(layout.opmask, r.opmask);
  component_out(layout.zmm_high, r.zmm_high);
  component_out(layout.zmm_upper, r.zmm_upper);
  // Of the components that are not in use, the image holds what was there before.
  o.trap = s.trap;
  o.error = s.error;
  o.address = s.trap == 14 ? s.address : 0;
  std::memcpy(o.data, reinterpret_cast<u8*>(data_address), data_bytes);
  (void)c;
}

}  // namespace

extern "C" void anykvm_isa_on_signal(int, siginfo_t* info, void* context) {
  on_signal(info, *static_cast<ucontext_t*>(context));
  anykvm_isa_abort();
}

struct Worker::Shared {
  alignas(64) u8 pattern[data_total];
  volatile unsigned first, count;  ///< what to run
  volatile unsigned current;       ///< what runs
  volatile bool has_local_segments;
  volatile unsigned cpu_limit;
  Case cases[batch];
  Outcome outcomes[batch];
};

namespace {

void run_one(const Case& c, const u8* pattern, Outcome& out) {
  prepare(c, pattern);
  u8 code[Case::max_code + 32];
  const unsigned length = lay_out(c, code);
  u8* at = code_alias + c.code_offset;
  std::memcpy(at, code, length);
  anykvm_isa_enter();
  std::memset(at, 0xf4, length);
  collect(c, out);
}

}  // namespace

namespace {
u64 cpu_milliseconds(int process) {
  clockid_t clock;
  timespec time{};
  if (clock_getcpuclockid(process, &clock) == 0) clock_gettime(clock, &time);
  return u64(time.tv_sec) * 1000 + u64(time.tv_nsec) / 1000000;
}
}  // namespace

Worker::Worker(u64 features, std::span<const u8, data_total> pattern) : features_(features), host_cpu_(sched_getcpu()) {
  void* at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (at == MAP_FAILED) abort();
  shared_ = static_cast<Shared*>(at);
  std::memcpy(shared_->pattern, pattern.data(), data_total);
  start();
}

Worker::~Worker() {
  stop();
  munmap(shared_, sizeof(Shared));
}

std::span<Case, Worker::batch> Worker::cases() { return shared_->cases; }
std::span<Outcome, Worker::batch> Worker::outcomes() { return shared_->outcomes; }
bool Worker::has_local_segments() const { return shared_->has_local_segments; }
unsigned Worker::cpu_limit() const { return shared_->cpu_limit; }

void Worker::start() {
  int down[2], up[2];
  if (pipe(down) || pipe(up)) abort();
  const int parent = getpid();
  std::fflush(stdout);
  process_ = fork();
  if (process_ < 0) abort();
  if (process_ > 0) {
    close(down[0]), close(up[1]);
    to_child_ = down[1], from_child_ = up[0];
    u8 ready;
    if (read(from_child_, &ready, 1) != 1) {
      std::fprintf(stderr, "isa: the worker process did not start\n");
      abort();
    }
    return;
  }

  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  const rlimit none{};
  setrlimit(RLIMIT_CORE, &none);
  ask_layout(features_);
  const int code = int(syscall(SYS_memfd_create, "isa-code", 0));
  if (ftruncate(code, code_bytes)) _exit(3);
  map_at(code_address, code_bytes, PROT_READ | PROT_EXEC, MAP_SHARED, code);
  code_alias = static_cast<u8*>(map_at(0, code_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, code));
  std::memset(code_alias, 0xf4, code_bytes);
  u8* data = static_cast<u8*>(map_at(data_address, data_total, PROT_READ | PROT_WRITE));
  std::memcpy(data, shared_->pattern, data_total);
  mprotect(data + data_bytes, readonly_bytes, PROT_READ);
  map_at(frame_address & page_mask, page_size, PROT_READ | PROT_WRITE);
  void* exit_page = map_at(exit_address, page_size, PROT_READ | PROT_WRITE);
  // As in the guest, but for the jump that takes the place of its HLT.
  static constexpr u8 jump[8] = {0xff, 0x25, 2};  // jmp [rip + 2]: aligned, whatever RFLAGS.AC says
  const u64 target = u64(&anykvm_isa_exit);
  std::memset(exit_page, 0xf4, page_size);
  std::memcpy(exit_page, jump, sizeof jump);
  std::memcpy(static_cast<u8*>(exit_page) + sizeof jump, &target, sizeof target);
  mprotect(exit_page, page_size, PROT_READ | PROT_EXEC);
  state().features = features_;
  state().host_mxcsr = 0x1f80;
  shared_->has_local_segments = install_local_segments();
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(unsigned(host_cpu_), &cpu);
  sched_setaffinity(0, sizeof cpu, &cpu);
  unsigned limit = 0;
  __asm__("lsl %1, %0" : "+r"(limit) : "r"(unsigned(cpu_number_selector)));
  shared_->cpu_limit = limit;

  constexpr std::size_t stack_bytes = 64 << 10;
  const stack_t stack{.ss_sp = map_at(0, stack_bytes, PROT_READ | PROT_WRITE), .ss_flags = 0, .ss_size = stack_bytes};
  sigaltstack(&stack, nullptr);
  // Not by sigaction(), which the library that is under test puts its own in front of.
  struct {
    void (*handler)(int, siginfo_t*, void*) = anykvm_isa_signal;
    u64 flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | 0x04000000 /* SA_RESTORER */;
    void (*restorer)() = anykvm_isa_abort;  // never returned to
    u64 mask = 0;
  } const action;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP})
    syscall(SYS_rt_sigaction, number, &action, nullptr, sizeof action.mask);
  for (int number : {SIGVTALRM, SIGINT}) signal(number, SIG_IGN);
  // From here on nothing but read, write and exit: whatever the code under test does, it does not get out.
  prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
  u8 token = 0;
  while (write(up[1], &token, 1) == 1 && read(down[0], &token, 1) == 1) {
    for (unsigned n = shared_->first; n < shared_->count; ++n) {
      shared_->current = n;
      run_one(shared_->cases[n], shared_->pattern, shared_->outcomes[n]);
    }
    shared_->current = shared_->count;
  }
  syscall(SYS_exit, 0);
  __builtin_unreachable();
}

void Worker::stop() {
  close(to_child_);
  close(from_child_);
  kill(process_, SIGKILL);
  waitpid(process_, nullptr, 0);
}

void Worker::run(unsigned count) {
  shared_->first = 0;
  while (shared_->first < count) {
    shared_->count = count;
    u8 token = 0;
    bool done = false, died = write(to_child_, &token, 1) != 1;
    while (!died) {
      // Progress counts, and the worker's own time: the machine may be busy.
      const unsigned before = shared_->current;
      const u64 started = cpu_milliseconds(process_);
      pollfd wait{.fd = from_child_, .events = POLLIN, .revents = 0};
      int ready;
      unsigned waited = 0;
      do {
        ready = poll(&wait, 1, 250);
        waited += 250;
      } while (ready == 0 && before == shared_->current && waited < 20000 &&
               cpu_milliseconds(process_) - started < 400);
      if (ready < 0) continue;  // a signal
      if (ready > 0) {
        done = read(from_child_, &token, 1) == 1;
        died = !done;
        break;
      }
      if (before == shared_->current) break;
    }
    if (done) return;
    const unsigned culprit = shared_->current;
    shared_->outcomes[culprit].trap = died ? lost : endless;
    stop();
    start();
    ++restarts_;
    shared_->first = culprit + 1;
  }
}

}  // namespace anykvm::isa
