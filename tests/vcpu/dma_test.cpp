// Guest code that others write, by every way that a client and its devices have: the guest sees it at its next fetch
// after it was told. On each engine.
#include <linux/io_uring.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "engine/engine.h"
#include "vcpu/test_machine.h"
#include "x86/cpuid.h"

namespace anykvm {
namespace {

enum class Writer { store, read, preadv, io_uring, process };

const char* name_of(Writer writer) {
  switch (writer) {
    case Writer::store: return "store";
    case Writer::read: return "read";
    case Writer::preadv: return "preadv";
    case Writer::io_uring: return "io_uring";
    default: return "process";
  }
}

/// One io_uring with room for one request, through the system calls themselves.
class Ring {
 public:
  Ring() {
    io_uring_params params{};
    fd_ = static_cast<int>(syscall(SYS_io_uring_setup, 1, &params));
    if (fd_ < 0) {
      error_ = errno;
      return;
    }
    sq_ = map(params.sq_off.array + params.sq_entries * sizeof(u32), IORING_OFF_SQ_RING);
    cq_ = map(params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    entries_ = map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    offsets_ = params;
  }
  ~Ring() {
    for (const Mapping& mapping : {sq_, cq_, entries_})
      if (mapping.at) munmap(mapping.at, mapping.bytes);
    if (fd_ >= 0) close(fd_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  /// errno of io_uring_setup, or 0.
  int error() const { return error_; }

  int read(int file, void* to, u32 bytes) {
    auto& entry = *reinterpret_cast<io_uring_sqe*>(entries_.at);
    entry = {};
    entry.opcode = IORING_OP_READ;
    entry.fd = file;
    entry.addr = reinterpret_cast<u64>(to);
    entry.len = bytes;
    word(sq_, offsets_.sq_off.array) = 0;
    __atomic_fetch_add(&word(sq_, offsets_.sq_off.tail), 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, fd_, 1, 1, IORING_ENTER_GETEVENTS, nullptr, 0) != 1) return -errno;
    u32& head = word(cq_, offsets_.cq_off.head);
    const u32 slot = head & word(cq_, offsets_.cq_off.ring_mask);
    const int result = reinterpret_cast<io_uring_cqe*>(cq_.at + offsets_.cq_off.cqes)[slot].res;
    __atomic_fetch_add(&head, 1, __ATOMIC_RELEASE);
    return result;
  }

 private:
  struct Mapping {
    u8* at = nullptr;
    std::size_t bytes = 0;
  };
  Mapping map(std::size_t bytes, u64 offset) const {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, static_cast<off_t>(offset));
    return at == MAP_FAILED ? Mapping{} : Mapping{static_cast<u8*>(at), bytes};
  }
  static u32& word(const Mapping& mapping, u32 offset) { return *reinterpret_cast<u32*>(mapping.at + offset); }

  int fd_ = -1, error_ = 0;
  Mapping sq_, cq_, entries_;
  io_uring_params offsets_{};
};

class DmaTest : public TestMachine, public testing::WithParamInterface<std::tuple<engine::Kind, Writer>> {
 protected:
  static constexpr Gpa function_at = 0x400000;
  static constexpr u64 shared_bytes = 0x200000;

  DmaTest() {
    engine::set_default_kind(std::get<0>(GetParam()));
    memory_ = memfd_create("ram", MFD_CLOEXEC);
    source_ = memfd_create("device", MFD_CLOEXEC);
    EXPECT_EQ(ftruncate(memory_, shared_bytes), 0);
    shared_ = static_cast<u8*>(mmap(nullptr, shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_, 0));
    EXPECT_NE(shared_, MAP_FAILED);
    EXPECT_EQ(machine->set_user_memory_region(slot(1, function_at, shared_bytes, shared_)), 0);
  }
  ~DmaTest() override {
    vcpus.clear();
    machine.reset();
    munmap(shared_, shared_bytes);
    close(memory_);
    close(source_);
    engine::set_default_kind(engine::Kind::interpret);
  }

  /// The function: mov eax, value ; ret
  void write_function(Writer writer, u32 value) {
    u8 code[6] = {0xb8, u8(value), u8(value >> 8), u8(value >> 16), u8(value >> 24), 0xc3};
    ASSERT_EQ(pwrite(source_, code, sizeof code, 0), ssize_t(sizeof code));
    switch (writer) {
      case Writer::store: std::memcpy(shared_, code, sizeof code); break;
      case Writer::read:
        ASSERT_EQ(lseek(source_, 0, SEEK_SET), 0);
        ASSERT_EQ(::read(source_, shared_, sizeof code), ssize_t(sizeof code));
        break;
      case Writer::preadv: {
        const iovec parts[] = {{shared_, 2}, {shared_ + 2, 4}};
        ASSERT_EQ(preadv(source_, parts, 2, 0), ssize_t(sizeof code));
        break;
      }
      case Writer::io_uring: ASSERT_EQ(ring_->read(source_, shared_, sizeof code), int(sizeof code)); break;
      case Writer::process: {
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
          void* own = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_, 0);
          if (own == MAP_FAILED) _exit(1);
          std::memcpy(own, code, sizeof code);
          _exit(0);
        }
        int status = -1;
        ASSERT_EQ(waitpid(child, &status, 0), child);
        ASSERT_EQ(status, 0);
        break;
      }
    }
  }
  void start(vcpu::Vcpu& vcpu, std::initializer_list<u8> code) {
    start_long_mode(vcpu, code);
    store<u64>(tables_at + 0x2010, function_at | 0x83);
  }
  /// false: the host does not let this process have an io_uring.
  bool prepare(Writer writer) {
    if (writer != Writer::io_uring) return true;
    ring_ = std::make_unique<Ring>();
    return ring_->error() == 0;
  }

  void interrupt_and_see(vcpu::Vcpu& vcpu, const std::function<void()>& signal);

  std::unique_ptr<Ring> ring_;
  bool has_chips_ = false;
  int memory_ = -1, source_ = -1;
  u8* shared_ = nullptr;
};

TEST_P(DmaTest, CodeIsSeenAfterAnExit) {
  const Writer writer = std::get<1>(GetParam());
  if (!prepare(writer)) GTEST_SKIP() << "io_uring is refused here: " << std::strerror(ring_->error());
  auto& vcpu = add_vcpu();
  start(vcpu, {
                  0xb9, 0x64, 0x00, 0x00, 0x00,  // again: mov ecx, 100
                  0xe8, 0xf6, 0xff, 0x3e, 0x00,  // loop: call 0x400000
                  0xff, 0xc9,                    // dec ecx
                  0x75, 0xf7,                    // jnz loop
                  0xe7, 0x10,                    // out 0x10, eax
                  0xeb, 0xee,                    // jmp again
              });
  write_function(Writer::store, 0);
  for (u32 value = 1; value < 20; ++value) {
    ASSERT_EQ(vcpu.run(), 0);
    ASSERT_EQ(run().exit_reason, KVM_EXIT_IO);
    u32 returned;
    std::memcpy(&returned, pio_data(), sizeof returned);
    ASSERT_EQ(returned, value - 1);
    write_function(writer, value);
    if (HasFatalFailure()) return;
  }
}

/// signal() has the handler at 0x11000 run, which calls the function and tells what it returned.
void DmaTest::interrupt_and_see(vcpu::Vcpu& vcpu, const std::function<void()>& signal) {
  const Writer writer = std::get<1>(GetParam());
  start(vcpu, {
                  0xfb,                                      // sti
                  0xe8, 0xfa, 0xff, 0x3e, 0x00,              // again: call 0x400000
                  0xff, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00,  // inc dword [0x9000]
                  0xeb, 0xf2,                                // jmp again
              });
  put(0x11000, {
                   0x50, 0x51, 0x52,                          // push rax ; push rcx ; push rdx
                   0xe8, 0xf8, 0xef, 0x3e, 0x00,              // call 0x400000
                   0x89, 0x04, 0x25, 0x00, 0x91, 0x00, 0x00,  // mov [0x9100], eax
                   0xff, 0x04, 0x25, 0x04, 0x91, 0x00, 0x00,  // inc dword [0x9104]
                   0xb9, 0x0b, 0x08, 0x00, 0x00,              // mov ecx, x2APIC's EOI
                   0x31, 0xc0, 0x31, 0xd2,                    // xor eax, eax ; xor edx, edx
                   0x85, 0xdb, 0x74, 0x02, 0x0f, 0x30,        // test ebx, ebx ; jz +2 ; wrmsr
                   0x5a, 0x59, 0x58,                          // pop rdx ; pop rcx ; pop rax
                   0x48, 0xcf,                                // iretq
               });
  kvm_regs regs{};
  ASSERT_EQ(vcpu.get_regs(regs), 0);
  regs.rbx = has_chips_;
  ASSERT_EQ(vcpu.set_regs(regs), 0);
  if (has_chips_) {
    kvm_sregs sregs{};
    ASSERT_EQ(vcpu.get_sregs(sregs), 0);
    sregs.apic_base |= irqchip::LocalApic::base_x2apic;
    ASSERT_EQ(vcpu.set_sregs(sregs), 0);
  }
  write_function(Writer::store, 0);
  const auto word = [&](Gpa gpa) { return __atomic_load_n(reinterpret_cast<u32*>(ram + gpa), __ATOMIC_ACQUIRE); };
  std::thread guest([&] { EXPECT_EQ(vcpu.run(), -EINTR); });
  for (u32 value = 1; value < 20 && !HasFailure(); ++value) {
    const u32 before = word(0x9000);
    EXPECT_TRUE(eventually([&] { return word(0x9000) > before + 100; }));  // it is in a loop of its own
    write_function(writer, value);
    signal();
    EXPECT_TRUE(eventually([&] { return word(0x9104) == value; }));
    EXPECT_EQ(word(0x9100), value);
  }
  set_immediate_exit();
  vcpu.wake();
  guest.join();
}

TEST_P(DmaTest, CodeIsSeenByAnNmisHandler) {
  if (!prepare(std::get<1>(GetParam()))) GTEST_SKIP() << "io_uring is refused here: " << std::strerror(ring_->error());
  auto& vcpu = add_vcpu();
  set_gate(2, 0x11000);
  interrupt_and_see(vcpu, [&] { vcpu.signal_nmi(); });
}

TEST_P(DmaTest, CodeIsSeenByADevicesHandler) {
  if (!prepare(std::get<1>(GetParam()))) GTEST_SKIP() << "io_uring is refused here: " << std::strerror(ring_->error());
  ASSERT_EQ(machine->create_irqchip(), 0);
  has_chips_ = true;
  auto& vcpu = add_vcpu();
  ASSERT_EQ(vcpu.set_cpuid2(x86::supported_cpuid()), 0);
  set_gate(0x30, 0x11000);
  kvm_lapic_state apic{};
  ASSERT_EQ(vcpu.get_lapic(apic), 0);
  apic.regs[0xf1] = 1;  // SVR: software enable
  ASSERT_EQ(vcpu.set_lapic(apic), 0);
  interrupt_and_see(vcpu, [&] { EXPECT_EQ(machine->signal_msi({.address_lo = 0xfee00000, .data = 0x30}), 1); });
}

INSTANTIATE_TEST_SUITE_P(Engines, DmaTest,
                         testing::Combine(testing::Values(engine::Kind::interpret, engine::Kind::translate),
                                          testing::Values(Writer::store, Writer::read, Writer::preadv, Writer::io_uring,
                                                          Writer::process)),
                         [](const auto& info) {
                           return std::string(engine::name_of(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace anykvm
