// The engine of this library as a KvmDevice: the same calls an interposed program ends in.
#include <stdexcept>

#include "abi/abi.h"
#include "anykvm/kvm_device.h"
#include "engine/engine.h"

namespace anykvm {

namespace {

class SoftwareDevice final : public KvmDevice {
 public:
  int open_system() override { return abi::open_system(); }
  long ioctl(int fd, unsigned long request, unsigned long argument) override {
    return abi::ioctl(fd, request, argument);
  }
  int close(int fd) override { return abi::close(fd); }
  std::string name() const override { return "software"; }
};

}  // namespace

std::shared_ptr<KvmDevice> KvmDevice::software(std::string_view engine) {
  engine::Kind kind;
  if (!engine::parse_kind(engine, kind))
    throw std::invalid_argument("anykvm: no engine that runs on this processor is called '" + std::string(engine) +
                                "' (all but interpret need BMI2)");
  if (!engine.empty()) engine::set_default_kind(kind);
  return std::make_shared<SoftwareDevice>();
}

}  // namespace anykvm
