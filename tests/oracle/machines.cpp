#include "oracle/machines.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "engine/engine.h"
#include "oracle/long_monitor.h"
#include "oracle/monitor.h"
#include "x86/fake_machine.h"

namespace anykvm::oracle {

bool qemu_is_there() { return std::system("command -v qemu-system-x86_64 >/dev/null 2>&1") == 0; }

namespace {

using namespace x86;

/// A FakeMachine that tells its CPU's engine to return where an NMI may come in.
class MachineWithNmis final : public FakeMachine {
 public:
  explicit MachineWithNmis(u64 ram_bytes) : FakeMachine(ram_bytes) {}
  void interrupt_window_changed() override { cpu->attention = 1; }
  Cpu* cpu = nullptr;
};

/// Stops a guest that loops: one takes far less than a second of the CPU's time.
class Watchdog {
 public:
  explicit Watchdog(Cpu& cpu) : thread_([&cpu, this](std::stop_token stop) { watch(cpu, stop); }) {}
  bool has_barked() const { return barked_; }

 private:
  void watch(Cpu& cpu, std::stop_token stop) {
    std::mutex mutex;
    std::unique_lock lock(mutex);
    std::condition_variable_any ended;
    timespec used{};
    do {
      if (ended.wait_for(lock, stop, std::chrono::seconds(1), [&] { return stop.stop_requested(); })) return;
    } while (!clock_gettime(clock_, &used) && used.tv_sec - start_.tv_sec < 10);
    barked_ = true;
    cpu.attention = 1;
  }
  static clockid_t clock_of_this_thread() {
    clockid_t clock{};
    pthread_getcpuclockid(pthread_self(), &clock);
    return clock;
  }
  static timespec now(clockid_t clock) {
    timespec time{};
    clock_gettime(clock, &time);
    return time;
  }

  clockid_t clock_ = clock_of_this_thread();
  timespec start_ = now(clock_);
  std::atomic<bool> barked_ = false;
  std::jthread thread_;
};

/// A store to the local APIC's command register that sends the CPU an NMI.
bool sends_nmi(const MmioPort::Fragment& store) {
  return store.gpa == (LONG_APIC_ICR & 0xffffffff) && (store.data[1] & 7) == 4;
}

}  // namespace

Memory run_in_engine(const Guest& guest, End& end, std::string& why) {
  MachineWithNmis machine(guest_ram);
  std::memcpy(machine.base, guest.image.data(), guest.image.size());
  machine.ports[0x80] = 0;
  Cpu cpu(machine);
  machine.cpu = &cpu;
  cpu.cpuid.set(guest.cpuid);
  cpu.reset();
  u8 pio[page_size];
  cpu.pio_data = pio;
  cpu.state.segment[cs].selector = 0;
  cpu.state.segment[cs].base = 0;
  cpu.state.rip = MONITOR_BOOT;
  cpu.update_mode();
  engine::Kind kind = engine::Kind::interpret;  // unless somebody asks for another one; not what "auto" means
  if (std::getenv("ANYKVM_ENGINE")) (void)engine::default_kind(kind);
  const auto engine = engine::make(kind);
  // A 16-bit task's stack may lie in QEMU's firmware, which is filled with HLT.
  static constexpr u8 firmware[8] = {0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4};
  const Watchdog watchdog(cpu);
  bool nmi_waits = false, goes_on = true;
  while (goes_on) {
    EventState& event = cpu.state.event;
    if (nmi_waits && !event.nmi_masked && !event.shadow) {
      nmi_waits = false;
      if (cpu.deliver_nmi() == Result::exit) break;
    }
    cpu.window_wanted = nmi_waits;
    cpu.window_wanted&& event.shadow ? engine->step(cpu) : engine->run(cpu);
    for (; cpu.mmio.has_writes(); cpu.mmio.pop_write()) nmi_waits |= sends_nmi(cpu.mmio.next_write());
    switch (cpu.exit.kind) {
      case ExitKind::none:
      case ExitKind::mmio_write: break;
      case ExitKind::mmio_read: cpu.mmio.reply(firmware); break;
      case ExitKind::attention:
        cpu.attention = 0;
        goes_on = !watchdog.has_barked();
        break;
      default: goes_on = false; break;
    }
  }
  const bool ended = cpu.exit.kind == ExitKind::pio && cpu.exit.port == MONITOR_EXIT_PORT;
  end = ended ? End::guests : cpu.exit.kind == ExitKind::shutdown ? End::shutdown : End::none;
  why = ended ? "" : "exit " + std::to_string(int(cpu.exit.kind)) + " at " + std::to_string(cpu.state.rip);
  if (!ended && cpu.exit.reason) why += std::string(": ") + cpu.exit.reason;
  return {machine.base, machine.base + guest_ram};
}

namespace {

Memory read_ram(const std::string& path) {
  Memory memory(guest_ram);
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(memory.data()), s64(memory.size()));
  return memory;
}

/// Runs a command for at most `seconds`, or until a second after `has_ended` says that there is nothing to wait for: a
/// QEMU now and then does not come to its own exit. Returns the exit status, -1 when it was killed.
int run_command(const std::string& command, unsigned seconds, auto has_ended) {
  using std::chrono::steady_clock;
  const pid_t child = fork();
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(127);
  }
  if (child < 0) return -1;
  auto deadline = steady_clock::now() + std::chrono::seconds(seconds);
  auto next_look = steady_clock::now() + std::chrono::seconds(2);
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const auto now = steady_clock::now();
    if (now >= deadline) kill(child, SIGKILL);
    if (now < next_look) continue;
    next_look = now + std::chrono::seconds(1);
    if (has_ended()) deadline = std::min(deadline, next_look);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// QEMU with a file of the guest's memory as its RAM.
Memory run_qemu_once(const Guest& guest, unsigned seconds, End& end) {
  char directory[] = "/tmp/anykvm-oracle-XXXXXX";
  if (!mkdtemp(directory)) return {};
  const std::string base = directory;
  std::ofstream(base + "/ram", std::ios::binary)
      .write(reinterpret_cast<const char*>(guest.image.data()), s64(guest.image.size()));
  Memory bios(65536, 0xf4);  // one jump
  const u8 jump[] = {0xea, MONITOR_BOOT & 0xff, MONITOR_BOOT >> 8, 0, 0};
  std::memcpy(&bios[0xfff0], jump, sizeof jump);
  std::ofstream(base + "/bios", std::ios::binary).write(reinterpret_cast<const char*>(bios.data()), s64(bios.size()));
  const std::string command =
      "ulimit -t 20; exec qemu-system-x86_64 -accel tcg -cpu " + guest.qemu_cpu +
      " -nodefaults -no-user-config -display none -no-reboot -m 8M "
      "-machine pc,memory-backend=ram -object memory-backend-file,id=ram,size=8M,share=on,mem-path=" +
      base + "/ram -bios " + base + "/bios -device isa-debug-exit,iobase=0xf4,iosize=1 </dev/null >" + base +
      "/output 2>&1";
  const int status =
      run_command(command, seconds, [&] { return tests_done(guest, read_ram(base + "/ram")) == guest.tests; });
  end = status == 1 ? End::guests : status == 0 ? End::shutdown : End::none;
  const Memory memory = read_ram(base + "/ram");
  std::filesystem::remove_all(base);
  return memory;
}

}  // namespace

Memory run_in_qemu(const Guest& guest, int halts_in, End& end) {
  Memory memory;
  for (unsigned attempt = 0; attempt < 2; ++attempt) {
    const bool may_halt = halts_in >= 0 && attempt == 0;
    memory = run_qemu_once(guest, may_halt ? 10 : 120, end);
    const unsigned done = memory.size() == guest_ram ? tests_done(guest, memory) : 0;
    if (done == guest.tests) end = End::guests;
    if (end != End::none || (may_halt && done == unsigned(halts_in))) break;
  }
  return memory;
}

}  // namespace anykvm::oracle
