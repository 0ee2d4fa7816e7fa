// Sequences of calls on the ABI, with any arguments: descriptors of every kind (also closed, duplicated and foreign
// ones), every ioctl of the table and numbers that are none, structures that were read from a vCPU and changed a
// little, structures of any bytes, bad pointers, and KVM_RUN in between, on this thread and on a second one.
//
// The client of such a test must only keep from doing to itself what a kernel would let it do: pointers inside
// structures lead to an arena (or nowhere), descriptors are the test's own, and the signal that ends a KVM_RUN is not
// blocked.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <semaphore>
#include <thread>
#include <vector>

#include "abi/abi.h"
#include "abi/ioctl_table.h"
#include "abi/limits.h"
#include "anykvm/kvm.h"
#include "fuzz/guest_layout.h"
#include "fuzz/host_fpu.h"
#include "fuzz/input.h"
#include "fuzz/stop_timer.h"
#include "x86/cpuid.h"
#include "x86/msr.h"

namespace anykvm::fuzz {
namespace {

constexpr unsigned max_calls = 64, max_files = 8;
constexpr u64 run_microseconds = 1500;

[[noreturn]] void violated(const char* what, long value) {
  std::fprintf(stderr, "fuzz: %s: %ld\n", what, value);
  abort();
}

/// All memory that the calls may name. Argument buffers end where a page begins that nobody may touch.
struct Arena {
  // A slot is at most the 64 GiB from 64 GiB on; more does not always fit under the thread sanitizer.
  static constexpr u64 reserved = 1ull << 37, guest_size = 1 << 20, argument_size = 0x10000;
  u8* const base =
      static_cast<u8*>(mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  u8* const guest = base + 0x10000;
  u8* const argument = guest + guest_size + 0x10000;
  u8* const bad = argument + argument_size;
  Arena() {
    if (base == MAP_FAILED) abort();
    mprotect(guest, guest_size - 0x4000, PROT_READ | PROT_WRITE);
    mprotect(guest + guest_size - 0x4000, 0x2000, PROT_READ);  // then two pages that cannot even be read
    mprotect(argument, argument_size, PROT_READ | PROT_WRITE);
  }
};

/// Bytes that follow a structure with a flexible array.
u64 tail_of(u32 number) {
  switch (number) {
    case KVM_GET_MSRS:
    case KVM_SET_MSRS: return 20 * sizeof(kvm_msr_entry);
    case KVM_GET_CPUID2:
    case KVM_SET_CPUID2:
    case KVM_GET_SUPPORTED_CPUID:
    case KVM_GET_EMULATED_CPUID: return 80 * sizeof(kvm_cpuid_entry2);
    case KVM_SET_GSI_ROUTING: return 40 * sizeof(kvm_irq_routing_entry);
    case KVM_GET_MSR_INDEX_LIST:
    case KVM_GET_MSR_FEATURE_INDEX_LIST: return 1024;
    case KVM_SET_SIGNAL_MASK: return 8;
    default: return 0;
  }
}

/// KVM_RUN, ended after a while. Another thread may close the descriptor before it begins.
void run_vcpu(int fd, kvm_run* run, bool may_be_closed) {
  long result;
  const HostFpu fpu = HostFpu::now();
  {
    const StopTimer timer(run, run_microseconds);
    result = abi::ioctl(fd, KVM_RUN, 0);
  }
  if (HostFpu::now() != fpu) violated("floating-point environment after KVM_RUN, MXCSR", HostFpu::now().mxcsr);
  if (!run) return;
  const_cast<volatile u8&>(run->immediate_exit) = 0;
  switch (-result) {
    case 0:
    case EINTR:
    case EAGAIN:
    case EFAULT:
    case EINVAL: return;
    case EBADF:
    case ENOTTY:  // or the number is another file's
      if (may_be_closed) return;
      [[fallthrough]];
    default: violated("KVM_RUN", result);
  }
}

/// A thread that is in KVM_RUN while the other one goes on with its calls: on the same vCPU, on the VM, on what the
/// vCPU runs on.
class SecondThread {
 public:
  SecondThread() {
    std::thread([this] { serve(); }).detach();
  }

  void start(int fd, kvm_run* run) {
    wait();
    fd_ = fd;
    run_ = run;
    busy_ = true;
    start_.release();
  }
  void wait() {
    if (!busy_) return;
    done_.acquire();
    busy_ = false;
  }

 private:
  [[noreturn]] void serve() {
    for (;;) {
      start_.acquire();
      run_vcpu(fd_, run_, true);
      done_.release();
    }
  }

  std::binary_semaphore start_{0}, done_{0};
  bool busy_ = false;
  int fd_ = -1;
  kvm_run* run_ = nullptr;
};

class Caller {
 public:
  explicit Caller(std::span<const u8> bytes) : input_(bytes) {
    const u8 setup = input_.byte();
    std::memset(arena_.argument, 0, Arena::argument_size);
    for (int& fd : event_fds_) fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    add_file(abi::open_system());
    if (setup & 1) return;
    // Most sequences begin with a machine that could run.
    add_file(abi::ioctl(files_[0].fd, KVM_CREATE_VM, 0));
    if (setup & 2) (void)abi::ioctl(files_[1].fd, KVM_CREATE_IRQCHIP, 0);
    if (setup & 4) {
      kvm_pit_config pit{};
      (void)call(files_[1].fd, KVM_CREATE_PIT2, &pit);
    }
    write_tables({arena_.guest, layout::ram_size}, Mode::long64);
    const kvm_userspace_memory_region region{.slot = 0,
                                             .flags = setup & 8 ? u32(KVM_MEM_LOG_DIRTY_PAGES) : 0u,
                                             .guest_phys_addr = 0,
                                             .memory_size = Arena::guest_size,
                                             .userspace_addr = reinterpret_cast<u64>(arena_.guest)};
    (void)call(files_[1].fd, KVM_SET_USER_MEMORY_REGION, &region);
    for (unsigned n = 0; n <= (setup >> 4 & 1); ++n) add_file(abi::ioctl(files_[1].fd, KVM_CREATE_VCPU, n));
    kvm_sregs sregs;
    kvm_regs regs;
    (void)call(files_[2].fd, KVM_GET_SREGS, &sregs);
    set_mode(static_cast<Mode>((setup >> 5) * 2 % unsigned(Mode::count)), sregs, regs);
    (void)call(files_[2].fd, KVM_SET_SREGS, &sregs);
    (void)call(files_[2].fd, KVM_SET_REGS, &regs);
    if (setup & 8) (void)set_supported_cpuid(files_[2].fd);
  }
  ~Caller() {
    for (File& file : files_) close_file(file);
    second_thread().wait();
    for (const int fd : event_fds_) close(fd);
  }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  void play() {
    for (unsigned n = 0; n < max_calls && !input_.empty(); ++n) take_step();
  }

 private:
  struct File {
    int fd = -1;
    kvm_run* run = nullptr;
  };

  template <class T>
  static long call(int fd, unsigned long number, T* argument) {
    return abi::ioctl(fd, number, reinterpret_cast<unsigned long>(argument));
  }

  static long set_supported_cpuid(int fd) {
    const auto entries = x86::supported_cpuid();
    std::vector<u8> bytes(sizeof(kvm_cpuid2) + entries.size_bytes());
    reinterpret_cast<kvm_cpuid2*>(bytes.data())->nent = static_cast<u32>(entries.size());
    std::memcpy(bytes.data() + sizeof(kvm_cpuid2), entries.data(), entries.size_bytes());
    return call(fd, KVM_SET_CPUID2, bytes.data());
  }

  void add_file(long fd) {
    if (fd < 0) return;
    if (!abi::owns(static_cast<int>(fd))) {
      close(static_cast<int>(fd));  // an ordinary descriptor, as of statistics
      return;
    }
    if (files_.size() == max_files) {
      close_file(files_.back());
      files_.pop_back();
    }
    File file{.fd = static_cast<int>(fd)};
    void* run = mmap(nullptr, abi::vcpu_mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, 0);
    // A memfd without pages (system, VM) maps, but must not be touched.
    if (run != MAP_FAILED) {
      if (lseek(file.fd, 0, SEEK_END) >= long(abi::vcpu_mmap_size))
        file.run = static_cast<kvm_run*>(run);
      else
        munmap(run, abi::vcpu_mmap_size);
    }
    files_.push_back(file);
  }

  static void close_file(File& file) {
    if (file.fd >= 0) (void)abi::close(file.fd);
    if (file.run) {
      second_thread().wait();
      munmap(file.run, abi::vcpu_mmap_size);
    }
    file = {};
  }

  /// Never destroyed: its thread waits for the next input, and the process ends without it.
  static SecondThread& second_thread() {
    static SecondThread& thread = *new SecondThread;
    return thread;
  }

  File& any_file() { return files_[input_.below(static_cast<unsigned>(files_.size()))]; }

  void take_step() {
    if (files_.empty()) return add_file(abi::open_system());
    switch (input_.below(16)) {
      case 0: {
        File& file = any_file();
        close_file(file);
        files_.erase(files_.begin() + (&file - files_.data()));
        return;
      }
      case 1: {
        const int original = any_file().fd, copy = dup(original);
        if (abi::adopt_duplicate(original, copy) != 0) violated("adopting a duplicate", copy);
        add_file(copy);
        return;
      }
      case 2: {  // the guest's memory
        u64 at = input_.flag() ? layout::code : input_.take<u32>() % layout::ram_size;
        const auto bytes = input_.chunk(64);
        std::memcpy(arena_.guest + at, bytes.data(), bytes.size());
        return;
      }
      case 3: {  // kvm_run
        const File& file = any_file();
        if (!file.run) return;
        const u32 at = input_.take<u16>() % sizeof(kvm_run);
        const auto bytes = input_.chunk(64);
        std::memcpy(reinterpret_cast<u8*>(file.run) + at, bytes.data(), bytes.size());
        return;
      }
      case 4: {  // the argument of the calls to come
        const u32 at = input_.take<u16>() % 2048;
        const auto bytes = input_.chunk(64);
        std::memcpy(arena_.argument + at, bytes.data(), bytes.size());
        return;
      }
      case 5: {
        const u64 value = input_.number();
        std::memcpy(arena_.argument + (input_.byte() & ~3u), &value, 8);
        return;
      }
      case 6: return run(any_file());
      case 7: {
        const File& file = any_file();
        if (file.run) second_thread().start(file.fd, file.run);
        return;
      }
      case 8: {  // not from the table
        const u32 number = input_.flag() ? _IO(KVMIO, input_.byte()) : input_.take<u32>();
        if ((number & 0xff00) != KVMIO << 8) return;  // the kernel's own are not ours to fuzz
        if (find(number)) return;
        (void)abi::ioctl(any_file().fd, number, reinterpret_cast<unsigned long>(arena_.bad));
        return;
      }
      case 9: {  // one more vCPU or VM
        if (input_.flag())
          return add_file(abi::ioctl(any_file().fd, KVM_CREATE_VM, input_.flag() ? 0 : input_.number()));
        return add_file(abi::ioctl(any_file().fd, KVM_CREATE_VCPU, input_.byte() & 3));
      }
      case 10: {  // a timer interrupt, an NMI: whatever is due
        (void)abi::ioctl(any_file().fd, KVM_NMI, 0);
        return;
      }
      case 11: {
        const kvm_irq_level level{.irq = input_.byte() & 31u, .level = input_.byte() & 1u};
        (void)call(any_file().fd, KVM_IRQ_LINE, &level);
        return;
      }
      case 12: {
        const u64 one = 1;
        [[maybe_unused]] const ssize_t size = write(event_fds_[input_.flag()], &one, sizeof one);
        return;
      }
      default: return call_one();
    }
  }

  static bool find(u32 number) {
    for (const abi::FdKind kind : {abi::FdKind::system, abi::FdKind::vm, abi::FdKind::vcpu})
      if (abi::find_ioctl(kind, number)) return true;
    return false;
  }

  /// The file on which a number of this kind means something; any file, now and then.
  File& file_of(abi::FdKind kind) {
    const u8 choice = input_.byte();
    if (choice >= 240) return any_file();
    std::vector<File*> candidates;
    for (File& file : files_) {
      const bool is_vcpu = file.run != nullptr;
      const bool is_system = !is_vcpu && abi::ioctl(file.fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION;
      if (kind == (is_vcpu ? abi::FdKind::vcpu : is_system ? abi::FdKind::system : abi::FdKind::vm))
        candidates.push_back(&file);
    }
    return candidates.empty() ? any_file() : *candidates[choice % candidates.size()];
  }

  void call_one() {
    const auto table = abi::ioctls();
    const abi::Ioctl& row = table[input_.byte() % table.size()];
    File& file = file_of(row.fd);
    if (row.number == KVM_RUN && row.fd == abi::FdKind::vcpu) return run(file);
    if (row.argument == abi::Argument::value || row.argument == abi::Argument::none) {
      const u64 value = row.argument == abi::Argument::none && input_.byte() < 240 ? 0 : input_.number();
      const long result = abi::ioctl(file.fd, row.number, value);
      if (returns_descriptor(row.number)) add_file(result);
      return;
    }

    const u64 size = std::min<u64>(row.size + tail_of(row.number), Arena::argument_size);
    const u8 form = input_.byte();
    if (form >= 248) {
      static const u64 bad[] = {0,     1,     reinterpret_cast<u64>(arena_.bad),    0x800000000000, 0xffff888000000000,
                                ~0ull, ~7ull, reinterpret_cast<u64>(arena_.bad) - 4};
      (void)abi::ioctl(file.fd, row.number, bad[form & 7]);
      return;
    }
    // The structure ends with its page, but for XSAVE's, which has no fixed size. What a call has read is where the
    // next one finds it, so that the pair of get and set sees plausible values.
    u8* argument = arena_.bad - size;
    if (row.number == KVM_GET_XSAVE2 || row.number == KVM_SET_XSAVE || row.number == KVM_GET_XSAVE)
      argument = arena_.argument;
    if (form & 1) std::memset(argument, 0, size);
    if (form & 2) {  // made up
      const auto bytes = input_.chunk(255);
      std::memcpy(argument, bytes.data(), std::min<u64>(bytes.size(), size));
    }
    if (form & 4) (void)read_first(file.fd, row.number, argument);
    for (unsigned changes = form >> 3 & 3; changes > 0; --changes) {
      const u64 value = input_.number();
      const u64 at = input_.take<u16>() % size;
      std::memcpy(argument + at, &value, std::min<u64>(sizeof value, size - at));
    }
    harmless(row.number, argument, size);
    const long result = abi::ioctl(file.fd, row.number, reinterpret_cast<unsigned long>(argument));
    if (result > 0 && returns_descriptor(row.number)) add_file(result);
  }

  static bool returns_descriptor(u32 number) {
    return number == KVM_CREATE_VM || number == KVM_CREATE_VCPU || number == KVM_GET_STATS_FD;
  }

  /// The call that reads what this one sets.
  static long read_first(int fd, u32 number, u8* argument) {
    static constexpr u32 pairs[][2] = {
        {KVM_SET_REGS, KVM_GET_REGS},
        {KVM_SET_SREGS, KVM_GET_SREGS},
        {KVM_SET_SREGS2, KVM_GET_SREGS2},
        {KVM_SET_FPU, KVM_GET_FPU},
        {KVM_SET_XSAVE, KVM_GET_XSAVE2},
        {KVM_SET_XCRS, KVM_GET_XCRS},
        {KVM_SET_LAPIC, KVM_GET_LAPIC},
        {KVM_SET_MP_STATE, KVM_GET_MP_STATE},
        {KVM_SET_VCPU_EVENTS, KVM_GET_VCPU_EVENTS},
        {KVM_SET_DEBUGREGS, KVM_GET_DEBUGREGS},
        {KVM_SET_IRQCHIP, KVM_GET_IRQCHIP},
        {KVM_SET_PIT2, KVM_GET_PIT2},
        {KVM_SET_CLOCK, KVM_GET_CLOCK},
    };
    for (const auto& [set, get] : pairs)
      if (set == number) return abi::ioctl(fd, get, reinterpret_cast<unsigned long>(argument));
    return -ENOENT;
  }

  /// Takes out of a structure what would hurt the test itself.
  void harmless(u32 number, u8* argument, u64 size) {
    switch (number) {
      case KVM_SET_USER_MEMORY_REGION: memory_region(argument, size); return;
      case KVM_GET_DIRTY_LOG: pointer(argument, size, offsetof(kvm_dirty_log, dirty_bitmap)); return;
      case KVM_IRQFD:
        descriptor(argument, size, offsetof(kvm_irqfd, fd));
        descriptor(argument, size, offsetof(kvm_irqfd, resamplefd));
        return;
      case KVM_CLEAR_DIRTY_LOG: pointer(argument, size, offsetof(kvm_clear_dirty_log, dirty_bitmap)); return;
      case KVM_X86_SET_MSR_FILTER:
        for (unsigned n = 0; n < KVM_MSR_FILTER_MAX_RANGES; ++n)
          pointer(argument, size,
                  offsetof(kvm_msr_filter, ranges) + n * sizeof(kvm_msr_filter_range) +
                      offsetof(kvm_msr_filter_range, bitmap));
        return;
      case KVM_GET_DEVICE_ATTR:
      case KVM_SET_DEVICE_ATTR:
      case KVM_HAS_DEVICE_ATTR: pointer(argument, size, offsetof(kvm_device_attr, addr)); return;
      case KVM_IOEVENTFD: descriptor(argument, size, offsetof(kvm_ioeventfd, fd)); return;
      case KVM_SET_SIGNAL_MASK: {
        // Neither our own signal nor those that a fault or the fuzzer needs.
        u64 mask;
        if (size < 12) return;
        std::memcpy(&mask, argument + 4, sizeof mask);
        for (const int signal : {StopTimer::signal_number(), SIGALRM, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGINT})
          mask &= ~(1ull << (signal - 1));
        std::memcpy(argument + 4, &mask, sizeof mask);
        return;
      }
      default: return;
    }
  }

  /// Into the guest's memory, or anywhere in the reserved range behind it.
  void memory_region(u8* argument, u64 size) {
    kvm_userspace_memory_region region;
    if (size < sizeof region) return;
    std::memcpy(&region, argument, sizeof region);
    const u64 limit = region.userspace_addr & 1 << 20 ? 64ull << 30 : Arena::guest_size;
    u8* const base = limit == Arena::guest_size ? arena_.guest : arena_.base + (64ull << 30);
    const u64 offset = region.userspace_addr % limit;
    const u64 room = limit - offset;
    region.userspace_addr = reinterpret_cast<u64>(base) + offset;
    if (region.memory_size > room && region.memory_size < 1ull << 62) region.memory_size %= room;
    if (region.memory_size > 1ull << 62) region.memory_size = ~0ull << 12;  // refused
    std::memcpy(argument, &region, sizeof region);
  }
  void pointer(u8* argument, u64 size, u64 at) {
    u64 value;
    if (size < at + sizeof value) return;
    std::memcpy(&value, argument + at, sizeof value);
    value = reinterpret_cast<u64>(value & 1 ? arena_.bad : arena_.guest) + (value & 0xfff0);
    std::memcpy(argument + at, &value, sizeof value);
  }
  void descriptor(u8* argument, u64 size, u64 at) {
    u32 value;
    if (size < at + sizeof value) return;
    std::memcpy(&value, argument + at, sizeof value);
    const int choices[] = {event_fds_[0], event_fds_[1], files_.empty() ? -1 : files_[0].fd, -1, 4000, event_fds_[0]};
    value = static_cast<u32>(choices[value % std::size(choices)]);
    std::memcpy(argument + at, &value, sizeof value);
  }

  static void run(const File& file) { run_vcpu(file.fd, file.run, false); }

  static inline Arena arena_;
  Input input_;
  std::vector<File> files_;
  int event_fds_[2];
};

}  // namespace

void ioctl_sequence(std::span<const u8> bytes) { Caller(bytes).play(); }

}  // namespace anykvm::fuzz
