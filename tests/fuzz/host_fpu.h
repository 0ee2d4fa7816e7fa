// What a KVM_RUN must leave as it was: the caller's floating-point environment, which the guest's takes the place of
// meanwhile.
#pragma once

#include "x86/types.h"

namespace anykvm::fuzz {

struct HostFpu {
  u32 mxcsr;
  u16 x87_control, x87_tags;  ///< tags: 0xffff is an empty stack

  static HostFpu now() {
    HostFpu fpu;
    struct {
      u32 control, status, tags, rest[4];
    } environment;
    // FNSTENV masks all exceptions, FLDENV brings them back.
    asm volatile("stmxcsr %0; fnstenv %1; fldenv %1" : "=m"(fpu.mxcsr), "=m"(environment));
    fpu.mxcsr &= ~0x3fu;  // flags: sticky, and the ABI does not keep them
    fpu.x87_control = u16(environment.control);
    fpu.x87_tags = u16(environment.tags);
    return fpu;
  }
  bool operator==(const HostFpu&) const = default;
};

}  // namespace anykvm::fuzz
