// A device inside KVM that has a descriptor and attributes of its own. (KVM API, KVM_CREATE_DEVICE.)
#pragma once

#include <cstdint>

#include "anykvm/kvm_device.h"

namespace anykvm {

/// Made by Vm::create_device(). Thread-safe. Attributes are named by a group and a number within it; what they are and
/// the type behind `value` is the device's documentation's to say.
class ANYKVM_API Device {
 public:
  explicit Device(KvmHandle handle) : handle_(std::move(handle)) {}

  /// KVM_HAS_DEVICE_ATTR.
  bool has_attribute(std::uint32_t group, std::uint64_t attribute) const;
  /// KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR. Throw KvmError: ENXIO for an attribute that is not there, EPERM, EINVAL.
  void get_attribute(std::uint32_t group, std::uint64_t attribute, void* value) const;
  void set_attribute(std::uint32_t group, std::uint64_t attribute, const void* value) const;

  const KvmHandle& handle() const { return handle_; }

 private:
  KvmHandle handle_;
};

}  // namespace anykvm
