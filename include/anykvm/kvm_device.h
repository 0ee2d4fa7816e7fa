// Where KVM's file descriptors come from: the engine inside this process, or the host's kernel.
//
// Everything in this API is built on the four operations of KvmDevice, so a client runs on either unchanged, and a test
// can put a fake in its place.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>

#include "anykvm/export.h"

namespace anykvm {

/// The system calls of a KVM. Thread-safe. Results are those of the system calls, an error as -errno; nothing throws.
class ANYKVM_API KvmDevice {
 public:
  virtual ~KvmDevice();

  /// As open("/dev/kvm"): a system descriptor.
  virtual int open_system() = 0;
  /// As ioctl(2), for descriptors of this KVM.
  virtual long ioctl(int fd, unsigned long request, unsigned long argument) = 0;
  virtual int close(int fd) = 0;
  /// As mmap(2) of a vCPU's descriptor at offset 0, shared, for reading and writing. MAP_FAILED sets errno.
  virtual void* map(int fd, std::size_t size);
  virtual void unmap(void* address, std::size_t size);
  /// For messages: "software" or the path of the device.
  virtual std::string name() const = 0;

  /// The CPU engine of this library. Needs no privilege, no kernel module and no virtualisation in the CPU.
  /// `engine`: "interpret", "translate", "translate-exact", "direct" (which forks on the vCPU's thread: docs/direct.md),
  /// "lockstep", or "auto" for the fastest that any program may have; it counts for every vCPU that the process creates
  /// from now on. Empty: what the environment variable ANYKVM_ENGINE says, else auto. Throws std::invalid_argument for
  /// any other name.
  static std::shared_ptr<KvmDevice> software(std::string_view engine = {});
  /// The host's KVM. Does not open anything yet: Kvm's constructor does, and throws when it cannot.
  static std::shared_ptr<KvmDevice> host(std::string path = "/dev/kvm");
};

/// What every failing call throws: code() is the errno, what() names the ioctl.
class ANYKVM_API KvmError : public std::system_error {
 public:
  /// `call` is a string literal such as "KVM_CREATE_VM".
  KvmError(int error, const char* call);
  ~KvmError() override;

  int error() const { return code().value(); }
  const char* call() const { return call_; }

 private:
  const char* call_;
};

/// One owned descriptor of a KVM. The base of Kvm, Vm, Vcpu and Device, and the way to an ioctl they do not wrap.
class ANYKVM_API KvmHandle {
 public:
  KvmHandle(std::shared_ptr<KvmDevice> device, int fd) : device_(std::move(device)), fd_(fd) {}
  ~KvmHandle();
  KvmHandle(KvmHandle&& other) noexcept;
  KvmHandle& operator=(KvmHandle&& other) noexcept;

  int fd() const { return fd_; }
  const std::shared_ptr<KvmDevice>& device() const { return device_; }

  /// The call's result, or -errno.
  long try_ioctl(unsigned long request, unsigned long argument = 0) const {
    return device_->ioctl(fd_, request, argument);
  }
  long try_ioctl(unsigned long request, const void* argument) const {
    return device_->ioctl(fd_, request, reinterpret_cast<unsigned long>(argument));
  }
  /// The call's result; throws KvmError with `name` when it fails.
  long ioctl(const char* name, unsigned long request, unsigned long argument = 0) const;
  long ioctl(const char* name, unsigned long request, const void* argument) const {
    return ioctl(name, request, reinterpret_cast<unsigned long>(argument));
  }

 private:
  std::shared_ptr<KvmDevice> device_;
  int fd_;
};

}  // namespace anykvm
