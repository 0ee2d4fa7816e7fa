// What can be measured inside one process, one measurement per run: guest instructions per second, in loops and where
// all code is new; the way from KVM_RUN to an exit and back; how soon a running and a halted vCPU heed another thread;
// the life of a thousand virtual machines. Prints "name value" lines; bench/run makes the table. ANYKVM_ENGINE chooses
// the engine.
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "anykvm/anykvm.h"
#include "loops.h"

namespace {

/// Of this thread, which does all the work: what else the machine does costs no time on it.
class CpuTime {
 public:
  double seconds() const { return now() - begin_; }

 private:
  static double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) + double(time.tv_nsec) / 1e9;
  }
  double begin_ = now();
};

// Guest-physical layout: page tables, entry code, the loops, a stack, scratch memory, code that runs once; no memory at
// `device`.
constexpr std::uint64_t memory_size = 8 << 20, straight = 2 << 20, device = 1 << 30, page_map = 0x1000,
                        page_directories = 0x2000, page_directory = 0x3000, entry = 0x4000, loops = 0x8000,
                        stack_top = 0x20000, scratch = 0x40000;

/// Anonymous memory, handed back at the end.
class Memory {
 public:
  explicit Memory(std::size_t size)
      : size_(size), bytes_(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (bytes_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  }
  ~Memory() { munmap(bytes_, size_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  unsigned char* at(std::uint64_t gpa) { return static_cast<unsigned char*>(bytes_) + gpa; }

 private:
  std::size_t size_;
  void* bytes_;
};

kvm_segment flat(std::uint16_t selector, std::uint8_t type, bool code) {
  kvm_segment segment{};
  segment.limit = 0xffffffff;
  segment.selector = selector;
  segment.type = type;
  segment.present = 1;
  segment.s = 1;
  segment.g = 1;
  segment.l = code;
  segment.db = !code;
  return segment;
}

/// From the reset state to 0:rip.
void begin_in_real_mode(anykvm::Vcpu& vcpu, std::uint16_t rip, std::uint16_t rsp) {
  kvm_sregs sregs = vcpu.sregs();
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  vcpu.set_sregs(sregs);
  kvm_regs regs{};
  regs.rip = rip;
  regs.rsp = rsp;
  regs.rflags = 2;
  vcpu.set_regs(regs);
}

/// One vCPU in long mode at `entry`, 2 MiB mapped where they are.
class LongModeGuest {
 public:
  explicit LongModeGuest(std::span<const unsigned char> code)
      : memory_(memory_size), vm_(kvm_.create_vm()), vcpu_((prepare(code), vm_.create_vcpu())) {
    kvm_sregs sregs = vcpu_.sregs();
    sregs.cr3 = page_map;
    sregs.cr4 = 1 << 5 | 1 << 9;  // PAE, OSFXSR
    sregs.cr0 = 0x80000033;       // PG, NE, ET, MP, PE
    sregs.efer = 0x500;           // LMA, LME
    sregs.cs = flat(8, 11, true);
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat(16, 3, false);
    vcpu_.set_sregs(sregs);
    vcpu_.set_cpuid(kvm_.supported_cpuid());
  }

  /// Enters the guest at `entry` with %rax = function, %rdi = iterations; it must leave by a write to a port.
  void call(std::uint64_t function, std::uint64_t iterations) {
    prepare_call(function, iterations);
    run_to_port();
  }
  void prepare_call(std::uint64_t function, std::uint64_t iterations) {
    kvm_regs regs{};
    regs.rip = entry;
    regs.rsp = stack_top;
    regs.rflags = 2;
    regs.rax = function;
    regs.rdi = iterations;
    regs.rsi = scratch;
    vcpu_.set_regs(regs);
  }

  void run_to_signal() { run_to<anykvm::exits::Interrupted>(); }
  void run_to_port() { run_to<anykvm::exits::IoOut>(); }
  void run_to_device() { run_to<anykvm::exits::MmioRead>(); }

  unsigned char* at(std::uint64_t gpa) { return memory_.at(gpa); }

 private:
  template <class Expected>
  void run_to() {
    const anykvm::Exit exit = vcpu_.run();
    if (!std::holds_alternative<Expected>(exit))
      throw std::runtime_error("the guest left with exit " + std::to_string(vcpu_.run_area().exit_reason));
  }

  void prepare(std::span<const unsigned char> code) {
    const auto store = [&](std::uint64_t gpa, std::uint64_t value) { std::memcpy(memory_.at(gpa), &value, 8); };
    store(page_map, page_directories | 7);
    store(page_directories, page_directory | 7);
    for (std::uint64_t at = 0; at < memory_size; at += 2 << 20) store(page_directory + (at >> 18), at | 0x87);
    store(page_directories + 8, device | 0x87);  // a page of 1 GiB
    std::ranges::copy(code, memory_.at(entry));
    std::copy(bench_loops_begin, bench_loops_end, memory_.at(loops));
    vm_.set_up_memory_slot(vm_.allocate_memory_slot(memory_size), memory_.at(0), 0);
  }

  Memory memory_;
  anykvm::Kvm kvm_;
  anykvm::Vm vm_;
  anykvm::Vcpu vcpu_;
};

using Loop = void (*)(std::uint64_t, void*);

/// Millions of instructions a second.
void measure_loop(const char* name, Loop loop, double instructions, std::uint64_t iterations) {
  const unsigned char code[] = {0xff, 0xd0,   // call *%rax
                                0xe6, 0x10};  // out %al, $0x10
  LongModeGuest guest(code);
  const std::uint64_t function = loops + (reinterpret_cast<const unsigned char*>(loop) - bench_loops_begin);
  guest.call(function, iterations / 10);
  const CpuTime time;
  guest.call(function, iterations);
  std::printf("guest_mips_%s %.1f\n", name, iterations * instructions / time.seconds() / 1e6);
}

template <class Run>
double nanoseconds_each(Run run) {
  constexpr int exits = 200'000;
  for (int i = 0; i < exits / 10; ++i) run();
  const CpuTime time;
  for (int i = 0; i < exits; ++i) run();
  return time.seconds() * 1e9 / exits;
}

void measure_exits() {
  const unsigned char port[] = {0xe6, 0x10,   // out %al, $0x10
                                0xeb, 0xfc};  // jmp back
  LongModeGuest port_guest(port);
  port_guest.call(0, 0);
  std::printf("port_exit_ns %.1f\n", nanoseconds_each([&] { port_guest.run_to_port(); }));

  const unsigned char mmio[] = {0xe6, 0x10,                    // out %al, $0x10
                                0xbb, 0x00, 0x00, 0x00, 0x40,  // mov $device, %ebx
                                0x8b, 0x03,                    // mov (%rbx), %eax
                                0xeb, 0xfc};                   // jmp back to it
  LongModeGuest mmio_guest(mmio);
  mmio_guest.call(0, 0);
  std::printf("mmio_exit_ns %.1f\n", nanoseconds_each([&] { mmio_guest.run_to_device(); }));
}

/// Millions of instructions a second where each is met for the first time: 4 MiB of short blocks that compilers might
/// make.
void measure_translation() {
  const unsigned char code[] = {0xff, 0xd0,                     // call *%rax
                                0xe6, 0x10};                    // out %al, $0x10
  const unsigned char block[] = {0x48, 0x8b, 0x06,              // mov (%rsi), %rax
                                 0x48, 0x01, 0xf8,              // add %rdi, %rax
                                 0x48, 0x8d, 0x54, 0x40, 0x04,  // lea 4(%rax,%rax,2), %rdx
                                 0x48, 0x89, 0x56, 0x08,        // mov %rdx, 8(%rsi)
                                 0x85, 0xc9,                    // test %ecx, %ecx
                                 0x0f, 0xb6, 0xc2,              // movzbl %dl, %eax
                                 0x83, 0xc1, 0x01,              // add $1, %ecx
                                 0x48, 0x39, 0xfa,              // cmp %rdi, %rdx
                                 0x75, 0x00,                    // jne to the next block
                                 0x90, 0x90, 0x90, 0x90};
  constexpr int block_instructions = 13, size = 4 << 20;
  LongModeGuest guest(code);
  for (int at = 0; at < size; at += sizeof block) std::ranges::copy(block, guest.at(straight + at));
  *guest.at(straight + size - 1) = 0xc3;
  const CpuTime time;
  guest.call(straight, 0);
  std::printf("translated_mips %.2f\n", size / sizeof block * block_instructions / time.seconds() / 1e6);
}

void print_percentiles(const char* name, std::vector<double> microseconds) {
  std::ranges::sort(microseconds);
  std::printf("%s_us_p50 %.1f\n%s_us_p99 %.1f\n", name, microseconds[microseconds.size() / 2], name,
              microseconds[microseconds.size() * 99 / 100]);
}

/// One measurement after another between this thread and one that runs a vCPU: from `act` here until `run` is back
/// there. `act` is called `pause` after `run` was.
template <class Run, class Act>
std::vector<double> reaction_microseconds(std::chrono::microseconds pause, Run run, Act act) {
  using Clock = std::chrono::steady_clock;  // the reaction is late also when the CPU is another's
  constexpr int rounds = 1000;
  std::vector<double> found;
  std::atomic<int> entered{0}, left{0};
  std::atomic<Clock::time_point> left_at{};
  std::thread runner([&] {
    for (int round = 1; round <= rounds; ++round) {
      entered.store(round);
      entered.notify_one();
      run();
      left_at.store(Clock::now());
      left.store(round);
      left.notify_one();
    }
  });
  for (int round = 1; round <= rounds; ++round) {
    entered.wait(round - 1);
    std::this_thread::sleep_for(pause);
    const Clock::time_point begin = Clock::now();
    act(runner.native_handle());
    left.wait(round - 1);
    found.push_back(std::chrono::duration<double, std::micro>(left_at.load() - begin).count());
  }
  runner.join();
  return found;
}

/// From pthread_kill() until KVM_RUN has returned EINTR, out of an endless loop of the guest's.
void measure_kick(const char* name, Loop loop) {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR1, &action, nullptr);
  const unsigned char code[] = {0xff, 0xd0};  // call *%rax
  LongModeGuest guest(code);
  guest.prepare_call(loops + (reinterpret_cast<const unsigned char*>(loop) - bench_loops_begin),
                     ~std::uint64_t{0} >> 1);
  print_percentiles(name, reaction_microseconds(
                              std::chrono::microseconds(300), [&] { guest.run_to_signal(); },
                              [](pthread_t runner) { pthread_kill(runner, SIGUSR1); }));
}

/// From an interrupt line's rise until the halted guest's handler has written to a port.
void measure_wake() {
  const unsigned char code[] = {0xb0, 0x20, 0xe6, 0x20,            // mov $0x20, %al; out %al, $0x20: end the last one
                                0xfb, 0xf4,                        // sti; hlt
                                0xeb, 0xfd};                       // jmp back to the hlt
  const unsigned char handler[] = {0xe6, 0x10,                     // out %al, $0x10
                                   0x83, 0xc4, 0x06,               // add $6, %sp
                                   0xea, 0x00, 0x10, 0x00, 0x00};  // ljmp 0:0x1000
  constexpr std::uint16_t code_at = 0x1000, handler_at = 0x1100, stack = 0x2000;
  constexpr std::uint32_t line = 1;  // an 8259 that nobody has set up gives it vector 1
  Memory memory(0x3000);
  std::ranges::copy(code, memory.at(code_at));
  std::ranges::copy(handler, memory.at(handler_at));
  std::memcpy(memory.at(line * 4), &handler_at, sizeof handler_at);
  anykvm::Kvm kvm;
  anykvm::Vm vm = kvm.create_vm();
  vm.set_up_memory_slot(vm.allocate_memory_slot(0x3000), memory.at(0), 0);
  vm.create_irq_chip();
  anykvm::Vcpu vcpu = vm.create_vcpu();
  begin_in_real_mode(vcpu, code_at, stack);
  print_percentiles("wake", reaction_microseconds(
                                std::chrono::milliseconds(1),
                                [&] {
                                  if (!std::holds_alternative<anykvm::exits::IoOut>(vcpu.run()))
                                    throw std::runtime_error("no port exit");
                                },
                                [&](pthread_t) {
                                  vm.set_irq_line(line, true);
                                  vm.set_irq_line(line, false);
                                }));
}

struct Footprint {
  long fds = 0, threads = 0, resident_kib = 0;
};

Footprint footprint() {
  Footprint found;
  for ([[maybe_unused]] const auto& fd : std::filesystem::directory_iterator("/proc/self/fd")) ++found.fds;
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "Threads:") status >> found.threads;
    if (word == "VmRSS:") status >> found.resident_kib;
  }
  return found;
}

/// A VM as a VMM makes it, chips included, run to one exit.
void live_once() {
  const unsigned char code[] = {0xe6, 0x10};  // out %al, $0x10
  Memory memory(0x1000);
  std::ranges::copy(code, memory.at(0));
  anykvm::Kvm kvm;
  anykvm::Vm vm = kvm.create_vm();
  vm.set_up_memory_slot(vm.allocate_memory_slot(0x1000), memory.at(0), 0);
  vm.create_irq_chip();
  vm.create_pit();
  anykvm::Vcpu vcpu = vm.create_vcpu();
  begin_in_real_mode(vcpu, 0, 0);
  if (!std::holds_alternative<anykvm::exits::IoOut>(vcpu.run())) throw std::runtime_error("no port exit");
}

void measure_lives() {
  for (int i = 0; i < 20; ++i) live_once();
  const Footprint before = footprint();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) live_once();
  std::printf("thousand_vms_s %.3f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  const Footprint after = footprint();
  std::printf("left_fds %ld\nleft_threads %ld\nleft_kib %ld\n", after.fds - before.fds, after.threads - before.threads,
              after.resident_kib - before.resident_kib);
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string what = argc == 2 ? argv[1] : "";
  if (what == "mips") {
    measure_loop("integer", bench_integer_loop, integer_loop_instructions, 10'000'000);
    measure_loop("memory", bench_memory_loop, memory_loop_instructions, 8'000'000);
  } else if (what == "exits") {
    measure_exits();
  } else if (what == "translation") {
    measure_translation();
  } else if (what == "kick") {
    measure_kick("kick_integer", bench_integer_loop);
    measure_kick("kick_memory", bench_memory_loop);
    measure_wake();
  } else if (what == "lives") {
    measure_lives();
  } else {
    std::fprintf(stderr, "usage: anykvm_bench mips|exits|translation|kick|lives\n");
    return 64;
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "anykvm_bench: %s\n", error.what());
  return 1;
}
