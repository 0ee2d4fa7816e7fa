#include "engine/direct/host_process.h"

#include <linux/audit.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <mutex>
#include <utility>

#include "os/attention.h"
#include "os/clock.h"
#include "os/memory_file.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

namespace anykvm::engine::direct {

namespace {

constexpr u64 user_address_end = 0x7ffffffff000;
constexpr std::size_t memory_bytes = STUB_CODE_SIZE + (Zygote::areas + 1) * (STUB_COMMANDS_SIZE + STUB_BLOCK_SIZE);

constexpr u64 file_offset(unsigned area) { return STUB_CODE_SIZE + area * u64(STUB_COMMANDS_SIZE + STUB_BLOCK_SIZE); }
u64 address_of(const unsigned char* symbol) { return area_address + u64(symbol - anykvm_stub_begin); }

long futex(u32& word, int operation, u32 value, const timespec* timeout = nullptr) {
  return syscall(SYS_futex, &word, operation, value, timeout, nullptr, 0);
}
/// All who wait: one that was killed may still stand in the queue, in front of the process that has its area now.
void wake(u32& word) { futex(word, FUTEX_WAKE, INT_MAX); }
u32 load(const u32& word) { return __atomic_load_n(&word, __ATOMIC_SEQ_CST); }

timespec in_future(u64 ns) {
  const u64 then = os::monotonic_ns() + ns;
  return {time_t(then / 1'000'000'000), long(then % 1'000'000'000)};
}

/// For a new process to change a word. false: it takes too long.
bool wait_while(u32& word, u32 value) {
  const u64 deadline = os::monotonic_ns() + 2'000'000'000;
  while (load(word) == value) {
    if (os::monotonic_ns() > deadline) return false;
    const timespec timeout{0, 50'000'000};
    futex(word, FUTEX_WAIT, value, &timeout);
  }
  return true;
}

/// What the kernel takes for an action, not libc's struct.
struct KernelAction {
  u64 handler, flags, restorer, mask;
};
constexpr u64 kernel_sa_restorer = 0x04000000;
constexpr u64 bit_of(int signal) { return 1ull << (signal - 1); }
constexpr int stopping_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, HostProcess::kick_signal};
static_assert(HostProcess::kick_signal == SIGUSR1);

/// Lets pass what the signal handler needs, from nowhere but the stub's code; all else is SIGSYS.
constexpr sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 8),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, instruction_pointer) + 4),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, u32(area_address >> 32), 0, 6),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, instruction_pointer)),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~u32(STUB_CODE_SIZE - 1)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, u32(area_address), 0, 3),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 2, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigreturn, 1, 0),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};

/// What the runner's calls point to; lies in Commands::data.
struct RunnerData {
  u64 blocked;
  stack_t stack;
  KernelAction action;
  sock_fprog program;
  sock_filter filter[std::size(direct::filter)];
};
static_assert(sizeof(RunnerData) <= sizeof(Commands::data));
u64 address_in_data(std::size_t offset) { return area_address + STUB_COMMANDS + offsetof(Commands, data) + offset; }

/// A system call of a list in the making.
void append(Commands& commands, s64 number, u64 a = 0, u64 b = 0, u64 c = 0, u64 d = 0, u64 e = 0, u64 f = 0) {
  commands.calls[commands.count++] = {number, {a, b, c, d, e, f}};
}

/// FSGSBASE, which the stub uses, and a wait for two futexes at once (Linux 5.16).
bool host_has_what_it_takes() {
  return getauxval(AT_HWCAP2) & 2 && (syscall(SYS_futex_waitv, nullptr, 0, 0, nullptr, 0) == 0 || errno != ENOSYS);
}

/// Two processes of one client cannot have their areas at that address in it at once.
std::mutex starting;

}  // namespace

Zygote::Area& Zygote::area(unsigned n) const {
  static_assert(sizeof(Area) == STUB_COMMANDS_SIZE + STUB_BLOCK_SIZE);
  return *reinterpret_cast<Area*>(static_cast<u8*>(memory_.data()) + file_offset(n));
}

bool Zygote::start(std::span<const int> files) {
  if (!host_has_what_it_takes()) return false;
  memory_fd_ = os::create_memory_file("anykvm user code", memory_bytes);
  if (memory_fd_ < 0) return false;
  memory_ = os::Mapping(memory_fd_, memory_bytes);
  int sockets[2];
  if (!memory_.data() || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
    stop();
    return false;
  }
  socket_ = sockets[0];
  std::memcpy(memory_.data(), anykvm_stub_begin, std::size_t(anykvm_stub_end - anykvm_stub_begin));

  // It begins by getting rid of all that it has of this process.
  Commands& commands = area(0).commands;
  int kept[72];
  unsigned count = 0;
  for (int fd : files)
    if (count < std::size(kept) - 2) kept[count++] = fd;
  kept[count++] = memory_fd_;
  kept[count++] = sockets[1];
  std::sort(kept, kept + count);
  u64 next = 0;
  for (unsigned n = 0; n < count; ++n) {
    if (u64(kept[n]) > next) append(commands, SYS_close_range, next, u64(kept[n]) - 1);
    next = u64(kept[n]) + 1;
  }
  append(commands, SYS_close_range, next, ~0u);
  // The kernel writes to what libc has registered as this thread's restartable sequences. It wants the length, which
  // libc does not tell.
  if (__rseq_size)
    for (u64 length = 32; length <= 256; length += 32)
      append(commands, SYS_rseq, u64(__builtin_thread_pointer()) + u64(__rseq_offset), length, RSEQ_FLAG_UNREGISTER,
             RSEQ_SIG);
  append(commands, SYS_munmap, 0, area_address);
  append(commands, SYS_munmap, area_address + STUB_AREA_SIZE, user_address_end - area_address - STUB_AREA_SIZE);
  const KernelAction ignore{u64(SIG_IGN), 0, 0, 0};
  static_assert(sizeof ignore <= sizeof commands.data);
  std::memcpy(commands.data, &ignore, sizeof ignore);
  append(commands, SYS_rt_sigaction, SIGCHLD, address_in_data(0), 0, 8);

  const std::scoped_lock lock(starting);
  const auto at = [](u64 offset) { return reinterpret_cast<void*>(area_address + offset); };
  const bool placed =
      mmap(at(0), STUB_AREA_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at(0);
  bool ready =
      placed && mmap(at(0), STUB_CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, memory_fd_, 0) != MAP_FAILED;
  ready = ready && mmap(at(STUB_COMMANDS), STUB_COMMANDS_SIZE + STUB_BLOCK_SIZE, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED, memory_fd_, off_t(file_offset(0))) != MAP_FAILED;
  if (ready) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    register long result asm("rax") = SYS_clone;
    register long socket asm("r15") = sockets[1];
    register long tid asm("r10") = 0;
    register long tls asm("r8") = 0;
    // No signal tells of its end, and wait() for any child does not find it.
    asm volatile(
        "syscall\n\t"
        "testq %%rax, %%rax\n\t"
        "jnz 1f\n\t"
        "jmp *%[zygote]\n"
        "1:"
        : "+r"(result)
        : "D"(0L), "S"(0L), "d"(0L), "r"(tid), "r"(tls), "r"(socket), [zygote] "b"(address_of(anykvm_stub_zygote))
        : "rcx", "r11", "memory", "cc");
    const long child = result;
    pid_ = child > 0 ? int(child) : 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ready = pid_ > 0 && wait_while(area(0).block.done, 0);
  }
  if (placed) munmap(at(0), STUB_AREA_SIZE);
  os::close_file(sockets[1]);
  if (ready) return true;
  stop();
  return false;
}

void Zygote::stop() {
  if (socket_ >= 0) os::close_file(std::exchange(socket_, -1));
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, __WCLONE);
    pid_ = 0;
  }
  memory_ = {};
  if (memory_fd_ >= 0) os::close_file(std::exchange(memory_fd_, -1));
}

bool HostProcess::start(Zygote& zygote) {
  end();
  do {
    number_ = zygote.next_area_++ % Zygote::areas;
  } while (zygote.used_areas_ >> number_ & 1);
  zygote.used_areas_ |= 1u << number_;
  zygote_ = &zygote;
  area_ = &zygote.area(number_ + 1);
  std::memset(static_cast<void*>(area_), 0, sizeof *area_);
  Commands& setup = zygote.area(0).commands;
  setup.count = 0;
  append(setup, SYS_mmap, area_address + STUB_BLOCK, STUB_BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
         u64(zygote.memory_fd_), file_offset(number_ + 1) + STUB_COMMANDS_SIZE);
  append(setup, SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
  append(setup, SYS_mmap, area_address + STUB_COMMANDS, STUB_COMMANDS_SIZE, PROT_READ, MAP_SHARED | MAP_FIXED,
         u64(zygote.memory_fd_), file_offset(number_ + 1));

  RunnerData data{};
  for (int signal : stopping_signals) data.blocked |= bit_of(signal);
  data.blocked = ~data.blocked;
  data.stack.ss_sp = reinterpret_cast<void*>(area_address + STUB_BLOCK + signal_stack);
  data.stack.ss_size = STUB_BLOCK_SIZE - signal_stack;
  data.action = {address_of(anykvm_stub_handler), SA_SIGINFO | SA_ONSTACK | kernel_sa_restorer,
                 address_of(anykvm_stub_handler), ~0ull};
  std::memcpy(data.filter, filter, sizeof filter);
  data.program = {u16(std::size(filter)),
                  reinterpret_cast<sock_filter*>(address_in_data(offsetof(RunnerData, filter)))};
  std::memcpy(commands().data, &data, sizeof data);
  append(commands(), SYS_rt_sigprocmask, SIG_SETMASK, address_in_data(offsetof(RunnerData, blocked)), 0, 8);
  append(commands(), SYS_sigaltstack, address_in_data(offsetof(RunnerData, stack)));
  for (int signal : stopping_signals)
    append(commands(), SYS_rt_sigaction, u64(signal), address_in_data(offsetof(RunnerData, action)), 0, 8);
  append(commands(), SYS_prctl, PR_SET_TSC, PR_TSC_SIGSEGV);
  append(commands(), SYS_prctl, PR_SET_NO_NEW_PRIVS, 1);
  append(commands(), SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, address_in_data(offsetof(RunnerData, program)));

  sequence_ = stops_seen_ = calls_ = 0;
  cpu_ = -1;
  if (write(zygote.socket_, "", 1) != 1) return false;
  wait_while(block().stops, 0);
  pid_ = int(load(zygote.area(0).block.process));
  runner_ = int(load(block().runner));
  stops_seen_ = 1;
  commands().count = 0;
  if (load(block().stops) == 1 && block().signal == SIGILL && block().error == 0 && pid_ > 0 && runner_ > 0 &&
      context())
    return true;
  end();
  return false;
}

void HostProcess::end() {
  if (pid_ > 0) kill(pid_, SIGKILL);
  pid_ = 0;
  if (zygote_) std::exchange(zygote_, nullptr)->used_areas_ &= ~(1u << number_);
}

bool HostProcess::is_alive() const { return syscall(SYS_tgkill, pid_, runner_, 0) == 0; }

void HostProcess::call(s64 number, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f) {
  if (calls_ == Commands::most) make_calls();
  commands().calls[calls_++] = {number, {a, b, c, d, e, f}};
}

void HostProcess::map(u64 address, u64 size, int protection, int fd, u64 offset) {
  call(SYS_mmap, address, size, u64(protection), MAP_SHARED | MAP_FIXED | MAP_POPULATE, u64(fd), offset);
}

void HostProcess::unmap(u64 address, u64 size) { call(SYS_munmap, address, size); }

void HostProcess::send_calls(bool then_go) {
  commands().count = std::exchange(calls_, 0);
  commands().then_go = then_go;
  __atomic_store_n(&commands().sequence, ++sequence_, __ATOMIC_SEQ_CST);
  wake(commands().sequence);
}

/// And waits until they have been made.
void HostProcess::make_calls() {
  send_calls(false);
  for (u32 done; (done = load(block().done)) != sequence_ && is_alive();) {
    const timespec timeout{0, 50'000'000};
    futex(block().done, FUTEX_WAIT, done, &timeout);
  }
}

void HostProcess::go() {
  if (calls_) return send_calls(true);
  __atomic_add_fetch(&block().go, 1, __ATOMIC_SEQ_CST);
  wake(block().go);
}

HostProcess::Stop HostProcess::wait(std::atomic<u32>& attention, const volatile u8* immediate_exit) {
  constexpr u64 patience_ns = 200'000'000;
  constexpr unsigned most_timeouts = 25;
  bool kicked = false;
  for (unsigned timeouts = 0;;) {
    if (const u32 stops = load(block().stops); stops != stops_seen_) {
      stops_seen_ = stops;
      return Stop::signal;
    }
    u32 none = 0;
    const bool sleeps = !kicked && !*immediate_exit && attention.compare_exchange_strong(none, os::attention_sleeps);
    if (!sleeps && !std::exchange(kicked, true)) syscall(SYS_tgkill, pid_, runner_, kick_signal);
    futex_waitv words[2] = {};
    words[0] = {.val = stops_seen_, .uaddr = u64(&block().stops), .flags = FUTEX_32};
    words[1] = {.val = os::attention_sleeps, .uaddr = u64(&attention), .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG};
    const timespec timeout = in_future(patience_ns);
    const bool timed_out =
        syscall(SYS_futex_waitv, words, sleeps ? 2 : 1, 0, &timeout, CLOCK_MONOTONIC) < 0 && errno == ETIMEDOUT;
    if (sleeps) {
      u32 still = os::attention_sleeps;
      attention.compare_exchange_strong(still, 0);
    }
    if (!timed_out) continue;
    // A guest may have had it block the signal that stops it.
    if (!is_alive() || (kicked && ++timeouts == most_timeouts)) return Stop::gone;
  }
}

ucontext_t* HostProcess::context() const {
  const u64 offset = __atomic_load_n(&block().context, __ATOMIC_RELAXED) - area_address - STUB_BLOCK;
  if (offset % 8 || offset < signal_stack || offset > STUB_BLOCK_SIZE - sizeof(ucontext_t)) return nullptr;
  return reinterpret_cast<ucontext_t*>(reinterpret_cast<u8*>(&block()) + offset);
}

std::span<u8> HostProcess::xsave_image(const ucontext_t& context) const {
  const u64 offset = u64(__atomic_load_n(&context.uc_mcontext.fpregs, __ATOMIC_RELAXED)) - area_address - STUB_BLOCK;
  if (offset % 64 || offset < signal_stack || offset > STUB_BLOCK_SIZE - 576) return {};
  u8* const image = reinterpret_cast<u8*>(&block()) + offset;
  // struct _fpx_sw_bytes: the size of the image is its fifth word.
  u32 size;
  std::memcpy(&size, image + 464 + 16, sizeof size);
  if (size < 576 || size > STUB_BLOCK_SIZE - offset) return {};
  return {image, size};
}

u64 HostProcess::cpu_ns() const {
  clockid_t clock;
  timespec time{};
  if (clock_getcpuclockid(pid_, &clock) != 0 || clock_gettime(clock, &time) != 0) return 0;
  return u64(time.tv_sec) * 1'000'000'000 + u64(time.tv_nsec);
}

void HostProcess::bind(int cpu) {
  if (cpu == std::exchange(cpu_, cpu) || cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(std::size_t(cpu), &set);
  sched_setaffinity(pid_, sizeof set, &set);
  sched_setaffinity(runner_, sizeof set, &set);
}

void HostProcess::unbind(const cpu_set_t& cpus) {
  if (std::exchange(cpu_, -1) < 0) return;
  sched_setaffinity(pid_, sizeof cpus, &cpus);
  sched_setaffinity(runner_, sizeof cpus, &cpus);
}

}  // namespace anykvm::engine::direct
