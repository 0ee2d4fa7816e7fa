// AML by hand: Advanced Configuration and Power Interface 6.4, sections 6.4 (resources) and 20.2 (encoding).
#include "vmm/virtio/acpi.h"

#include <initializer_list>
#include <string_view>

#include "vmm/virtio/mmio.h"

namespace anykvm::vmm {

namespace {

constexpr u8 name_op = 0x08, byte_prefix = 0x0a, string_prefix = 0x0d, buffer_op = 0x11, ext_prefix = 0x5b,
             device_op = 0x82;

class Aml {
 public:
  Aml& bytes(std::initializer_list<u8> values) { return code_.insert(code_.end(), values), *this; }
  Aml& bytes(const std::vector<u8>& values) { return code_.insert(code_.end(), values.begin(), values.end()), *this; }
  Aml& text(std::string_view value) { return code_.insert(code_.end(), value.begin(), value.end()), *this; }
  Aml& dword(u32 value) { return bytes({u8(value), u8(value >> 8), u8(value >> 16), u8(value >> 24)}); }
  /// A package of less than 63 bytes: its length takes one byte, and counts it.
  Aml& package(const Aml& content) { return bytes({u8(content.code_.size() + 1)}).bytes(content.code_); }

  [[nodiscard]] const std::vector<u8>& code() const { return code_; }

 private:
  std::vector<u8> code_;
};

}  // namespace

std::vector<u8> virtio_mmio_aml(u8 index, u32 base, u32 gsi) {
  constexpr u8 read_write = 1, consumer_level_high_exclusive = 1;
  Aml resources;
  resources.bytes({0x86, 9, 0, read_write}).dword(base).dword(VirtioMmio::window_size);  // Memory32Fixed
  resources.bytes({0x89, 6, 0, consumer_level_high_exclusive, 1}).dword(gsi);            // Extended Interrupt
  resources.bytes({0x79, 0});                                                            // end, without a checksum

  constexpr std::string_view hex = "0123456789ABCDEF";
  const char name[] = {'V', 'R', hex[index >> 4], hex[index & 15]};
  Aml device;
  device.text({name, 4});
  device.bytes({name_op}).text("_HID").bytes({string_prefix}).text("LNRO0005").bytes({0});
  device.bytes({name_op}).text("_UID").bytes({byte_prefix, index});
  device.bytes({name_op}).text("_CRS").bytes({buffer_op});
  device.package(Aml().bytes({byte_prefix, u8(resources.code().size())}).bytes(resources.code()));
  return Aml().bytes({ext_prefix, device_op}).package(device).code();
}

}  // namespace anykvm::vmm
