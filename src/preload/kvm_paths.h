// The paths that mean KVM to a client: the device, and the kvm modules' parameters in sysfs, which a host without the
// module does not have. What stands there tells of this library's KVM, never of the host's, and so is answered alike on
// every host.
#pragma once

#include <sys/stat.h>

#include <string_view>

namespace anykvm::preload {

enum class PathKind {
  foreign,  ///< not ours
  device,   ///< /dev/kvm, or what ANYKVM_DEVICE names
  file,     ///< a module's parameter
  folder,   ///< a module, or its parameters
  missing,  ///< a place of a module's where this KVM has nothing
};

struct KvmPath {
  PathKind kind = PathKind::foreign;
  std::string_view contents;  ///< of a file
};

/// path as openat(folder, path) takes it; links and ".." in it are not followed. It may be null. No allocation; no
/// system call unless the path is relative.
KvmPath find_kvm_path(int folder, const char* path);

/// A descriptor as open(path, flags) would give it, or -errno. Not for foreign paths.
int open_kvm_path(const KvmPath& path, int flags);

/// What stat(2) tells: 0 or -errno. Not for foreign paths.
int stat_kvm_path(const KvmPath& path, struct stat& out);

/// 0 or -errno: access(2) for anybody. Not for foreign paths.
int access_kvm_path(const KvmPath& path, int mode);

}  // namespace anykvm::preload
