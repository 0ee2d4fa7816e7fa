// The table of ioctls: what dispatch, `anykvm info` and docs/ioctls.md are made of.
#pragma once

#include <span>
#include <string_view>

#include "abi/fd_table.h"
#include "x86/types.h"

namespace anykvm::abi {

struct VmFile;

/// One call, its descriptor looked up. vm is set for VM descriptors, vcpu for vCPU descriptors.
struct Call {
  vm::Vm* vm;
  vcpu::Vcpu* vcpu;
  const std::shared_ptr<VmFile>& file;
  u64 arg;
};

/// What the argument is.
enum class Argument : u8 {
  none,    ///< ignored, or must be 0
  value,   ///< a number
  in,      ///< a pointer to a structure that is read
  out,     ///< a pointer to a structure that is written
  in_out,  ///< both
};

struct Ioctl {
  u32 number;
  std::string_view name;
  FdKind fd;
  Argument argument;
  std::string_view type;        ///< the argument's C type; empty for none
  u32 size;                     ///< bytes of a structure, without a flexible array at its end
  std::string_view capability;  ///< the extension that announces it
  long (*handler)(const Call&);
};

/// All of them, sorted by descriptor, then number.
std::span<const Ioctl> ioctls();

/// nullptr when there is none.
const Ioctl* find_ioctl(FdKind fd, u32 number);

/// What the kernel answers to a number that a descriptor of this kind does not have: a negative errno.
int unknown_ioctl_error(FdKind fd, u32 number);

std::string_view to_string(FdKind fd);
std::string_view to_string(Argument argument);

}  // namespace anykvm::abi
