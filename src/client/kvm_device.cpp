// Handles, errors, and the host's KVM as a KvmDevice. The software one is in software_device.cpp.
#include "anykvm/kvm_device.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace anykvm {

KvmDevice::~KvmDevice() = default;

void* KvmDevice::map(int fd, std::size_t size) {
  return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

void KvmDevice::unmap(void* address, std::size_t size) { munmap(address, size); }

namespace {

class HostDevice final : public KvmDevice {
 public:
  explicit HostDevice(std::string path) : path_(std::move(path)) {}

  int open_system() override {
    const int fd = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
  }
  long ioctl(int fd, unsigned long request, unsigned long argument) override {
    const int result = ::ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
  }
  int close(int fd) override { return ::close(fd) < 0 ? -errno : 0; }
  std::string name() const override { return path_; }

 private:
  std::string path_;
};

}  // namespace

std::shared_ptr<KvmDevice> KvmDevice::host(std::string path) { return std::make_shared<HostDevice>(std::move(path)); }

KvmError::KvmError(int error, const char* call)
    : std::system_error(error, std::generic_category(), call), call_(call) {}
KvmError::~KvmError() = default;

KvmHandle::~KvmHandle() {
  if (device_ && fd_ >= 0) device_->close(fd_);
}

KvmHandle::KvmHandle(KvmHandle&& other) noexcept
    : device_(std::move(other.device_)), fd_(std::exchange(other.fd_, -1)) {}

KvmHandle& KvmHandle::operator=(KvmHandle&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(fd_, other.fd_);
  return *this;
}

long KvmHandle::ioctl(const char* name, unsigned long request, unsigned long argument) const {
  const long result = try_ioctl(request, argument);
  if (result < 0) throw KvmError(int(-result), name);
  return result;
}

}  // namespace anykvm
