// Device attributes.
#include "anykvm/device.h"

#include "anykvm/kvm.h"

namespace anykvm {

namespace {

kvm_device_attr describe(std::uint32_t group, std::uint64_t attribute, const void* value) {
  return {.flags = 0, .group = group, .attr = attribute, .addr = reinterpret_cast<std::uint64_t>(value)};
}

}  // namespace

bool Device::has_attribute(std::uint32_t group, std::uint64_t attribute) const {
  const auto query = describe(group, attribute, nullptr);
  return handle_.try_ioctl(KVM_HAS_DEVICE_ATTR, &query) == 0;
}

void Device::get_attribute(std::uint32_t group, std::uint64_t attribute, void* value) const {
  const auto query = describe(group, attribute, value);
  handle_.ioctl("KVM_GET_DEVICE_ATTR", KVM_GET_DEVICE_ATTR, &query);
}

void Device::set_attribute(std::uint32_t group, std::uint64_t attribute, const void* value) const {
  const auto query = describe(group, attribute, value);
  handle_.ioctl("KVM_SET_DEVICE_ATTR", KVM_SET_DEVICE_ATTR, &query);
}

}  // namespace anykvm
