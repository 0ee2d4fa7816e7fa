// The KVM API as the client meets it: descriptors, request numbers, untyped pointers, errno. What the library's own
// client (src/client), an embedding program and the interposer call in place of open, ioctl and close on /dev/kvm.
#pragma once

#include <fcntl.h>

namespace anykvm::abi {

/// A new descriptor of the system, as open("/dev/kvm", flags) gives; only O_CLOEXEC of the flags matters. -errno:
/// EMFILE, ENFILE, ENOMEM.
int open_system(int flags = O_RDWR | O_CLOEXEC);

/// ioctl(2) on a descriptor of this library's: >= 0, or -errno as KVM's. -EBADF when fd is not one. The kernel looks
/// at 32 bits of the request, and so does this. Thread-safe; on one vCPU, calls wait for each other.
long ioctl(int fd, unsigned long request, unsigned long arg);

/// Whether fd is a system, VM or vCPU descriptor of this library. No system call.
bool owns(int fd);

/// close(2) on a descriptor of this library's. A call in flight on another thread finishes first; the VM goes with its
/// last descriptor. -EBADF when fd is not one.
int close(int fd);

/// Tells the library that copy, made by dup(2) or one of its kind from fd, names the same object. -EBADF when fd is not
/// one of the library's; then copy is none of its business either.
int adopt_duplicate(int fd, int copy);

/// A descriptor that owns() does not know but KVM's ioctls are called on: inherited through execve(2), received over a
/// socket, duplicated past this library. 0: it is one of the library's now. -EIO: it belongs to a VM of another
/// process. -EBADF: it is not KVM's.
int adopt_unknown(int fd);

/// Tells the library that the descriptors in [first, last] are about to be closed by somebody else.
void forget(unsigned first, unsigned last);

/// Whether fd is a descriptor of this library's that stands for the system, as /dev/kvm does.
bool is_system(int fd);

}  // namespace anykvm::abi

// The same for programs in any language, and for the interposer. On failure -1 with errno set, as the system calls.
extern "C" {
[[gnu::visibility("default")]] int anykvm_open(int flags);
[[gnu::visibility("default")]] long anykvm_ioctl(int fd, unsigned long request, unsigned long arg);
[[gnu::visibility("default")]] int anykvm_close(int fd);
[[gnu::visibility("default")]] int anykvm_owns(int fd);
}
