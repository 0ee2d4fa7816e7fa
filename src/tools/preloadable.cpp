// As the kernel and the dynamic loader decide it: fs/binfmt_script.c, fs/binfmt_elf.c, ld.so(8) on secure execution.
#include "tools/preloadable.h"

#include <elf.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/xattr.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>

namespace anykvm::tools {

namespace {

/// 0, or why execve(2) refuses the file.
int check_executable(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0) return errno;
  if (S_ISDIR(status.st_mode)) return EISDIR;
  if (!S_ISREG(status.st_mode) || faccessat(AT_FDCWD, path.c_str(), X_OK, AT_EACCESS) != 0) return EACCES;
  return 0;
}

class File {
 public:
  explicit File(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }
  /// As much of it as there is.
  std::string read(std::size_t size, std::uint64_t at) const {
    std::string text(size, '\0');
    const ssize_t got = fd_ < 0 ? 0 : pread(fd_, text.data(), size, static_cast<off_t>(at));
    text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return text;
  }
  template <typename T>
  bool read(T& out, std::uint64_t at) const {
    const std::string bytes = read(sizeof out, at);
    if (bytes.size() == sizeof out) std::memcpy(&out, bytes.data(), sizeof out);
    return bytes.size() == sizeof out;
  }

 private:
  int fd_;
};

/// The interpreter that a script's first line names; empty for what is no script.
std::string script_interpreter(const File& file) {
  constexpr std::size_t longest_line = 256;
  const std::string head = file.read(longest_line, 0);
  if (!head.starts_with("#!")) return {};
  const std::string line = head.substr(2, head.find('\n') - 2);
  const auto begin = line.find_first_not_of(" \t");
  if (begin == std::string::npos) return {};
  return line.substr(begin, line.find_first_of(" \t", begin) - begin);
}

bool is_elf(const File& file) { return file.read(SELFMAG, 0) == std::string_view(ELFMAG, SELFMAG); }

std::string elf_interpreter(const File& file, const Elf64_Ehdr& header) {
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    if (!file.read(segment, header.e_phoff + std::uint64_t{i} * header.e_phentsize)) break;
    constexpr std::size_t longest_path = 4096;
    if (segment.p_type != PT_INTERP || segment.p_filesz > longest_path) continue;
    return file.read(segment.p_filesz, segment.p_offset).c_str();
  }
  return {};
}

std::optional<std::string> elf_obstacle(const File& file) {
  Elf64_Ehdr header;
  if (!file.read(header, 0) || header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64)
    return "is not a 64-bit x86 program";
  const std::string loader = elf_interpreter(file, header);
  if (loader.empty()) return "is statically linked";
  if (!std::filesystem::path(loader).filename().string().starts_with("ld-linux-x86-64.so"))
    return "is not linked with glibc, but loaded by " + loader;
  return {};
}

bool grants_capabilities(const File& file) {
  vfs_cap_data capabilities;
  const ssize_t size = fgetxattr(file.fd(), XATTR_NAME_CAPS, &capabilities, sizeof capabilities);
  if (size < static_cast<ssize_t>(XATTR_CAPS_SZ_1)) return size < 0 && errno == ERANGE;
  return capabilities.data[0].permitted ||
         (size >= static_cast<ssize_t>(XATTR_CAPS_SZ_2) && capabilities.data[1].permitted);
}

/// Secure execution: the loader ignores LD_PRELOAD when the file gives rights that the caller does not have.
std::optional<std::string> privilege_obstacle(const File& file) {
  struct stat status;
  struct statvfs mount;
  if (fstat(file.fd(), &status) != 0 || fstatvfs(file.fd(), &mount) != 0) return {};
  if ((mount.f_flag & ST_NOSUID) || prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1) return {};
  if ((status.st_mode & S_ISUID) && status.st_uid != getuid()) return "is setuid";
  if ((status.st_mode & S_ISGID) && (status.st_mode & S_IXGRP) && status.st_gid != getgid()) return "is setgid";
  if (getuid() != 0 && grants_capabilities(file)) return "has file capabilities";
  return {};
}

}  // namespace

FoundProgram find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) {
    const int error = check_executable(name);
    return error ? FoundProgram{{}, error} : FoundProgram{name};
  }
  const char* variable = std::getenv("PATH");
  const std::string_view folders = variable ? variable : "/bin:/usr/bin";
  int error = ENOENT;
  for (std::size_t begin = 0; begin <= folders.size() && !name.empty();) {
    const std::size_t end = std::min(folders.find(':', begin), folders.size());
    const std::string folder(folders.substr(begin, end - begin));
    const std::string path = (folder.empty() ? "." : folder) + "/" + name;
    const int problem = check_executable(path);
    if (problem == 0) return {path};
    if (problem == EACCES) error = EACCES;
    begin = end + 1;
  }
  return {{}, error};
}

std::optional<std::string> preload_obstacle(const std::string& path) {
  constexpr int most_interpreters = 5;  // of interpreters; the kernel gives up then
  std::string current = path;
  for (int depth = 0; depth <= most_interpreters; ++depth) {
    const File file(current);
    if (file.fd() < 0) return {};
    if (!is_elf(file)) {
      const std::string interpreter = script_interpreter(file);
      current = interpreter.empty() ? "/bin/sh" : interpreter;  // as execvp(3) does with a file of unknown format
      continue;
    }
    std::optional<std::string> obstacle = elf_obstacle(file);
    if (!obstacle) obstacle = privilege_obstacle(file);
    if (!obstacle) return {};
    return current == path ? path + " " + *obstacle : path + " is a script for " + current + ", which " + *obstacle;
  }
  return {};
}

}  // namespace anykvm::tools
