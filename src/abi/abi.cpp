#include "abi/abi.h"

#include <asm/ioctls.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <new>

#include "abi/descriptor_file.h"
#include "abi/fd_table.h"
#include "abi/ioctl_table.h"
#include "anykvm/kvm.h"
#include "engine/engine.h"
#include "os/fault_guard.h"
#include "os/memory_file.h"
#include "os/process_identity.h"
#include "vcpu/vcpu.h"

namespace anykvm::abi {
namespace {

/// What the kernel does for any descriptor before it asks the driver.
bool is_generic(u32 number) { return number == FIOCLEX || number == FIONCLEX || number == FIONBIO; }

long dispatch(const OpenFile& file, int fd, u32 number, u64 arg) {
  if (is_generic(number)) return syscall(SYS_ioctl, fd, number, arg) < 0 ? -errno : 0;
  if (file.kind != FdKind::system && file.process != os::process_identity()) return -EIO;
  const Ioctl* row = find_ioctl(file.kind, number);
  if (!row) return unknown_ioctl_error(file.kind, number);
  try {
    return row->handler({file.vm, file.vcpu, file.keeps, arg});
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

}  // namespace

int open_system(int flags) {
  engine::Kind kind;
  if (const char* invalid = nullptr; !engine::default_kind(kind, &invalid)) {
    std::string names = "auto";
    for (const engine::Kind each : engine::every_kind)
      if (engine::runs_here(each)) names += std::string(", ") + engine::name_of(each);
    std::fprintf(stderr, "anykvm: ANYKVM_ENGINE is '%s'; on this processor it may be %s\n", invalid, names.c_str());
    return -EINVAL;
  }
  os::install_fault_handlers();
  const int fd = create_descriptor_file("kvm", FdKind::system);
  if (fd < 0) return fd;
  if (!(flags & O_CLOEXEC)) syscall(SYS_fcntl, fd, F_SETFD, 0);
  if (const int error = install_descriptor(fd, {FdKind::system}); error < 0) {
    os::close_file(fd);
    return error;
  }
  return fd;
}

long ioctl(int fd, unsigned long request, unsigned long arg) {
  FileReference file(fd);
  if (!file) return -EBADF;
  const u32 number = static_cast<u32>(request);
  // The one that is called millions of times: nothing between the client and the vCPU but the look-up.
  if (number == KVM_RUN && file->kind == FdKind::vcpu && arg == 0) [[likely]] {
    if (file->process != os::process_identity()) return -EIO;
    // A client's signal handler may leave by siglongjmp(), and the reference must not stay behind.
    return file->vcpu->run([](void* reference) { static_cast<FileReference*>(reference)->reset(); }, &file);
  }
  return dispatch(*file, fd, number, arg);
}

bool owns(int fd) { return static_cast<bool>(FileReference(fd)); }

int close(int fd) { return close_descriptor(fd); }

int adopt_duplicate(int fd, int copy) { return install_duplicate(fd, copy); }

int adopt_unknown(int fd) {
  FdKind kind;
  if (!read_mark(fd, kind)) return -EBADF;
  if (const int error = install_by_number(fd, file_number(fd)); error != -EBADF) return error;
  if (kind != FdKind::system) return -EIO;
  os::install_fault_handlers();
  return install_descriptor(fd, {FdKind::system});
}

void forget(unsigned first, unsigned last) { forget_descriptors(first, last); }

bool is_system(int fd) {
  const FileReference file(fd);
  return file && file->kind == FdKind::system;
}

}  // namespace anykvm::abi

namespace {

long as_system_call(long result) {
  if (result >= 0) return result;
  errno = static_cast<int>(-result);
  return -1;
}

}  // namespace

extern "C" {
int anykvm_open(int flags) { return static_cast<int>(as_system_call(anykvm::abi::open_system(flags))); }
long anykvm_ioctl(int fd, unsigned long request, unsigned long arg) {
  return as_system_call(anykvm::abi::ioctl(fd, request, arg));
}
int anykvm_close(int fd) { return static_cast<int>(as_system_call(anykvm::abi::close(fd))); }
int anykvm_owns(int fd) { return anykvm::abi::owns(fd); }
}
