#include "preload/kvm_paths.h"

#include <cpuid.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>

#include "abi/abi.h"
#include "os/memory_file.h"

namespace anykvm::preload {
namespace {

struct Parameter {
  std::string_view name;
  std::string_view contents;
};

/// Parameters that clients read, with the values that describe this KVM.
constexpr Parameter kvm_parameters[] = {
    {"eager_page_split", "Y\n"},
    {"enable_pmu", "N\n"},
    {"enable_vmware_backdoor", "N\n"},
    {"force_emulation_prefix", "0\n"},
    {"halt_poll_ns", "0\n"},
    {"ignore_msrs", "N\n"},
    {"kvmclock_periodic_sync", "Y\n"},
    {"min_timer_period_us", "200\n"},
    {"nx_huge_pages", "N\n"},
    {"report_ignored_msrs", "Y\n"},
    {"tdp_mmu", "Y\n"},
};
constexpr Parameter kvm_intel_parameters[] = {
    {"allow_smaller_maxphyaddr", "Y\n"},
    {"enable_apicv", "N\n"},
    {"ept", "Y\n"},
    {"flexpriority", "N\n"},
    {"nested", "N\n"},
    {"sgx", "N\n"},
    {"vpid", "Y\n"},
    {"unrestricted_guest", "Y\n"},
};
constexpr Parameter kvm_amd_parameters[] = {
    {"avic", "N\n"},   {"nested", "0\n"}, {"npt", "Y\n"}, {"sev", "N\n"},
    {"sev_es", "N\n"}, {"vgif", "0\n"},   {"vls", "0\n"},
};

struct Module {
  std::string_view name;
  std::span<const Parameter> parameters;
};

/// The vendor's module of this host: a client that looks at CPUID expects the one that belongs to it.
const Module* vendor_module() {
  constexpr unsigned hygon_ebx = 0x6f677948;  // "Hygo"
  static constexpr Module intel = {"kvm_intel", kvm_intel_parameters};
  static constexpr Module amd = {"kvm_amd", kvm_amd_parameters};
  unsigned eax, ebx = 0, ecx, edx;
  __get_cpuid(0, &eax, &ebx, &ecx, &edx);
  if (ebx == signature_INTEL_ebx) return &intel;
  if (ebx == signature_AMD_ebx || ebx == hygon_ebx) return &amd;
  return nullptr;
}

KvmPath find_in_module(const Module& module, std::string_view rest) {
  if (rest.empty()) return {PathKind::folder, {}};
  constexpr std::string_view folder = "/parameters";
  if (!rest.starts_with(folder)) return {PathKind::missing, {}};
  rest.remove_prefix(folder.size());
  if (rest.empty()) return {PathKind::folder, {}};
  for (const Parameter& parameter : module.parameters)
    if (rest.front() == '/' && rest.substr(1) == parameter.name) return {PathKind::file, parameter.contents};
  return {PathKind::missing, {}};
}

KvmPath find_in_modules(std::string_view rest) {
  static constexpr Module kvm = {"kvm", kvm_parameters};
  const std::string_view name = rest.substr(0, rest.find('/'));
  if (name == kvm.name) return find_in_module(kvm, rest.substr(name.size()));
  if (name != "kvm_intel" && name != "kvm_amd") return {};
  const Module* module = vendor_module();
  if (!module || name != module->name) return {PathKind::missing, {}};
  return find_in_module(*module, rest.substr(name.size()));
}

/// Once a process, and never into a pipe: test runners read it. `anykvm run` has said it already, and says so.
void announce() {
  static constinit std::atomic_flag announced = ATOMIC_FLAG_INIT;
  if (announced.test_and_set() || std::getenv("ANYKVM_QUIET") || !isatty(STDERR_FILENO)) return;
  constexpr std::string_view text = "anykvm: /dev/kvm is the software engine\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

int open_file(std::string_view contents, int flags) {
  if ((flags & O_ACCMODE) != O_RDONLY) return -EACCES;
  const int fd = memfd_create("kvm-parameter", MFD_ALLOW_SEALING | (flags & O_CLOEXEC ? MFD_CLOEXEC : 0));
  if (fd < 0) return -errno;
  if (write(fd, contents.data(), contents.size()) != static_cast<ssize_t>(contents.size()) ||
      lseek(fd, 0, SEEK_SET) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    const int error = errno;
    os::close_file(fd);
    return -error;
  }
  return fd;
}

}  // namespace

namespace {

KvmPath find_absolute(const char* path) {
  // Most paths are somebody else's, and this tells after a byte or two.
  constexpr std::string_view modules = "/sys/module/";
  if (std::strcmp(path, "/dev/kvm") == 0) return {PathKind::device, {}};
  if (std::strncmp(path, modules.data(), modules.size()) == 0) return find_in_modules(path + modules.size());
  if (const char* device = std::getenv("ANYKVM_DEVICE"); device && std::strcmp(path, device) == 0)
    return {PathKind::device, {}};
  return {};
}

/// The absolute path of a folder, ended by a slash; its length, 0 when it cannot be told.
std::size_t path_of(int folder, std::span<char> out) {
  ssize_t length = 0;
  if (folder == AT_FDCWD) {
    length = syscall(SYS_getcwd, out.data(), out.size() - 1) - 1;
  } else {
    char link[32];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, out.data(), out.size() - 1);
  }
  if (length <= 0 || out[0] != '/' || std::size_t(length) >= out.size() - 1) return 0;
  out[std::size_t(length)] = '/';
  return std::size_t(length) + 1;
}

/// Takes "//" and "/./" out of a path.
void straighten(char* path) {
  char* end = path;
  for (const char* from = path; *from; ++from) {
    if (end != path && end[-1] == '/') {
      if (*from == '/') continue;
      if (*from == '.' && (from[1] == '/' || !from[1])) continue;
    }
    *end++ = *from;
  }
  *end = '\0';
}

}  // namespace

KvmPath find_kvm_path(int folder, const char* path) {
  if (!path) return {};
  const bool relative = path[0] != '/';
  if (!relative && !std::strstr(path, "//") && !std::strstr(path, "/./")) return find_absolute(path);
  if (!std::strstr(path, "kvm")) return {};  // what the names of KVM's paths have in common
  const int error = errno;
  char whole[PATH_MAX];
  const std::size_t begin = relative ? path_of(folder, whole) : 0;
  const std::size_t length = std::strlen(path);
  errno = error;
  if ((relative && begin == 0) || begin + length >= sizeof whole) return {};
  std::memcpy(whole + begin, path, length + 1);
  straighten(whole);
  return find_absolute(whole);
}

int open_kvm_path(const KvmPath& path, int flags) {
  if (path.kind == PathKind::missing) return -ENOENT;
  if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL)) return -EEXIST;
  if (path.kind == PathKind::folder) return -EISDIR;
  if (flags & O_DIRECTORY) return -ENOTDIR;
  if (path.kind == PathKind::file) return open_file(path.contents, flags);
  announce();
  return abi::open_system(flags);
}

int stat_kvm_path(const KvmPath& path, struct stat& out) {
  out = {};
  out.st_nlink = 1;
  out.st_blksize = 4096;
  switch (path.kind) {
    case PathKind::device:
      out.st_mode = S_IFCHR | 0666;
      out.st_rdev = makedev(10, 232);  // the number that Linux has for it
      return 0;
    case PathKind::file:
      out.st_mode = S_IFREG | 0444;
      out.st_size = 4096;  // of every file in sysfs
      return 0;
    case PathKind::folder: out.st_mode = S_IFDIR | 0555; return 0;
    default: return -ENOENT;
  }
}

int access_kvm_path(const KvmPath& path, int mode) {
  struct stat status;
  if (const int error = stat_kvm_path(path, status)) return error;
  return static_cast<unsigned>(mode) & ~(status.st_mode & 7) & 7 ? -EACCES : 0;
}

}  // namespace anykvm::preload
