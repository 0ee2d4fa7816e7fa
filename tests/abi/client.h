// A client of abi/ for tests: descriptors that close themselves, calls that take any pointer.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <utility>
#include <vector>

#include "abi/abi.h"
#include "abi/limits.h"
#include "anykvm/kvm.h"
#include "x86/types.h"

namespace anykvm::abi {

class TestFd {
 public:
  TestFd() = default;
  explicit TestFd(long fd) : fd_(static_cast<int>(fd)) {}
  TestFd(TestFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  TestFd& operator=(TestFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~TestFd() { reset(); }
  void reset() {
    if (fd_ >= 0) abi::close(fd_);
    fd_ = -1;
  }
  int get() const { return fd_; }

  long call(unsigned long request, unsigned long arg = 0) const { return abi::ioctl(fd_, request, arg); }
  template <class T>
  long call(unsigned long request, T* arg) const {
    return abi::ioctl(fd_, request, reinterpret_cast<unsigned long>(arg));
  }

 private:
  int fd_ = -1;
};

/// A page that nobody may touch, and the end of the page before it.
class GuardedPage {
 public:
  GuardedPage() {
    base_ = static_cast<char*>(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + 4096, 4096, PROT_NONE);
  }
  ~GuardedPage() { munmap(base_, 8192); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;

  void* bad() const { return base_ + 4096; }
  /// size bytes that end where the bad page begins.
  template <class T>
  T* at_end(unsigned long size = sizeof(T)) const {
    return reinterpret_cast<T*>(base_ + 4096 - size);
  }

 private:
  char* base_;
};

/// A structure with a counted array behind it.
template <class Header, class Entry>
class Counted {
 public:
  explicit Counted(u32 count) : bytes_(sizeof(Header) + count * sizeof(Entry)) {}
  Header* header() { return reinterpret_cast<Header*>(bytes_.data()); }
  Entry* entries() { return reinterpret_cast<Entry*>(bytes_.data() + sizeof(Header)); }

 private:
  std::vector<u8> bytes_;
};

/// The system, a VM and its first vCPU.
struct TestMachine {
  TestFd system{open_system()};
  TestFd vm{system.call(KVM_CREATE_VM, 0ul)};
  TestFd vcpu;
  kvm_run* run = nullptr;

  void add_vcpu(unsigned long id = 0) {
    vcpu = TestFd(vm.call(KVM_CREATE_VCPU, id));
    if (vcpu.get() < 0) return;
    void* mapped = mmap(nullptr, vcpu_mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.get(), 0);
    run = mapped == MAP_FAILED ? nullptr : static_cast<kvm_run*>(mapped);
  }
  ~TestMachine() {
    if (run) munmap(run, vcpu_mmap_size);
  }
};

/// Real-mode code at guest-physical 0x1000 in 64 KiB of RAM, and a vCPU about to execute it.
class GuestMachine : public TestMachine {
 public:
  static constexpr unsigned long ram_size = 0x10000;

  template <unsigned long n>
  explicit GuestMachine(const unsigned char (&code)[n], bool irqchip = false) {
    if (irqchip) vm.call(KVM_CREATE_IRQCHIP);
    ram =
        static_cast<unsigned char*>(mmap(nullptr, ram_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    __builtin_memcpy(ram + 0x1000, code, n);
    kvm_userspace_memory_region region{
        .slot = 0, .flags = 0, .guest_phys_addr = 0, .memory_size = ram_size, .userspace_addr = (__u64)ram};
    vm.call(KVM_SET_USER_MEMORY_REGION, &region);
    add_vcpu();
    kvm_sregs sregs;
    vcpu.call(KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    vcpu.call(KVM_SET_SREGS, &sregs);
    kvm_regs regs{};
    regs.rip = 0x1000;
    regs.rflags = 2;
    vcpu.call(KVM_SET_REGS, &regs);
  }
  ~GuestMachine() {
    vcpu.reset();
    vm.reset();
    munmap(ram, ram_size);
  }

  unsigned char* ram;
};

}  // namespace anykvm::abi
