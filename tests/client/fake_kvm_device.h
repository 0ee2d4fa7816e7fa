// A KVM made of memfds and a script: what the client asks for is recorded, what it gets is set by the test.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <map>
#include <vector>

#include "anykvm/anykvm.h"

namespace anykvm {

class FakeKvmDevice final : public KvmDevice {
 public:
  struct Call {
    int fd;
    unsigned long request;
    unsigned long argument;
  };
  using Answer = std::function<long(unsigned long argument)>;

  FakeKvmDevice() {
    answers[KVM_GET_API_VERSION] = [](auto) { return 12; };
    answers[KVM_GET_VCPU_MMAP_SIZE] = [](auto) { return 3 * 4096; };
    answers[KVM_CHECK_EXTENSION] = [this](unsigned long capability) {
      const auto found = extensions.find(capability);
      return found == extensions.end() ? 0L : found->second;
    };
    answers[KVM_CREATE_VM] = [this](auto) { return make_fd(); };
    answers[KVM_CREATE_VCPU] = [this](auto) { return make_fd(); };
  }

  int open_system() override { return open_error ? -open_error : int(make_fd()); }
  long ioctl(int fd, unsigned long request, unsigned long argument) override {
    calls.push_back({fd, request, argument});
    const auto answer = answers.find(request);
    return answer == answers.end() ? -ENOTTY : answer->second(argument);
  }
  int close(int fd) override {
    ++closed;
    return ::close(fd);
  }
  std::string name() const override { return "fake"; }

  long make_fd() {
    const int fd = memfd_create("fake", MFD_CLOEXEC);
    if (ftruncate(fd, 3 * 4096) != 0) return -errno;
    ++opened;
    return fd;
  }

  std::map<unsigned long, Answer> answers;
  std::map<unsigned long, long> extensions;
  std::vector<Call> calls;
  int open_error = 0, opened = 0, closed = 0;
};

}  // namespace anykvm
