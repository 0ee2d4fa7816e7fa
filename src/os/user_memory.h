// Copies between this library and memory that the client named by a pointer, which may be bad. What the kernel's
// functions of these names do: a fault ends the copy and is reported, never raised.
#pragma once

#include <cstddef>

#include "x86/types.h"

namespace anykvm::os {

/// false: part of the user's range is not accessible (the caller answers EFAULT); what came before it may have been
/// copied. No system call. Installs the fault handlers when nobody has.
bool copy_from_user(void* dst, const void* user, std::size_t size);
bool copy_to_user(void* user, const void* src, std::size_t size);

template <class T>
bool get_user(T& value, u64 user) {
  return copy_from_user(&value, reinterpret_cast<const void*>(user), sizeof(T));
}
template <class T>
bool put_user(u64 user, const T& value) {
  return copy_to_user(reinterpret_cast<void*>(user), &value, sizeof(T));
}

}  // namespace anykvm::os
