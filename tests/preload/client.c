/* What a client in C does around /dev/kvm, knowing nothing of this library. Each case is one argument; a failed check
 * says which and ends the program with 1. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "line %d: %s (errno %d)\n", __LINE__, #condition, errno); \
      exit(1);                                                                  \
    }                                                                           \
  } while (0)

static int open_kvm(void) {
  int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  return fd;
}

static int is_kvm(int fd) { return ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION; }

static void device(void) {
  CHECK(is_kvm(open_kvm()));
  CHECK(is_kvm(open64("/dev/kvm", O_RDWR)));
  CHECK(is_kvm(openat(AT_FDCWD, "/dev/kvm", O_RDWR)));
  CHECK(is_kvm(openat64(5, "/dev/kvm", O_RDWR)));
  CHECK(fcntl(open_kvm(), F_GETFD) == FD_CLOEXEC);
  CHECK(fcntl(open("/dev/kvm", O_RDWR), F_GETFD) == 0);

  CHECK(setenv("ANYKVM_DEVICE", "/nowhere/kvm-of-mine", 1) == 0);
  CHECK(is_kvm(open("/nowhere/kvm-of-mine", O_RDWR)));
  CHECK(open("/nowhere/another", O_RDWR) == -1 && errno == ENOENT);
}

static void duplicates(void) {
  int fd = open_kvm(), vm = ioctl(fd, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);
  int copies[] = {dup(vm), dup2(vm, 100), dup3(vm, 101, O_CLOEXEC), fcntl(vm, F_DUPFD, 200),
                  fcntl(vm, F_DUPFD_CLOEXEC, 300)};
  CHECK(close(vm) == 0);
  CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) == -1 && errno == EBADF);
  for (int i = 0; i < 5; ++i) {
    CHECK(ioctl(copies[i], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
    if (i < 4) CHECK(close(copies[i]) == 0);
  }
  /* Something else takes the place of the last. */
  int pipes[2];
  CHECK(pipe(pipes) == 0);
  CHECK(dup2(pipes[0], copies[4]) == copies[4]);
  CHECK(ioctl(copies[4], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == ENOTTY);
  CHECK(dup2(fd, fd) == fd && is_kvm(fd));
  CHECK(dup2(-1, fd) == -1 && errno == EBADF && is_kvm(fd));
}

static void paths(void) {
  struct stat status;
  struct statx extended;
  CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
  CHECK(access("/dev/kvm", X_OK) == -1 && errno == EACCES);
  CHECK(stat("/dev/kvm", &status) == 0 && S_ISCHR(status.st_mode) && status.st_rdev == makedev(10, 232));
  CHECK(lstat("/dev/kvm", &status) == 0 && S_ISCHR(status.st_mode));
  CHECK(fstatat(AT_FDCWD, "/dev/kvm", &status, 0) == 0 && S_ISCHR(status.st_mode));
  CHECK(statx(AT_FDCWD, "/dev/kvm", 0, STATX_BASIC_STATS, &extended) == 0 && S_ISCHR(extended.stx_mode));
  CHECK(extended.stx_rdev_major == 10 && extended.stx_rdev_minor == 232);
  CHECK(stat("/sys/module/kvm", &status) == 0 && S_ISDIR(status.st_mode));
}

static void parameters(void) {
  char text[16] = "";
  int fd = open("/sys/module/kvm/parameters/force_emulation_prefix", O_RDONLY);
  CHECK(fd >= 0);
  CHECK(read(fd, text, sizeof text) == 2 && strcmp(text, "0\n") == 0);
  CHECK(read(fd, text, sizeof text) == 0);
  CHECK(write(fd, "1", 1) == -1);
  CHECK(close(fd) == 0);

  FILE* file = fopen("/sys/module/kvm/parameters/tdp_mmu", "r");
  CHECK(file && fgetc(file) == 'Y' && fgetc(file) == '\n' && fgetc(file) == EOF && fclose(file) == 0);

  CHECK(open("/sys/module/kvm/parameters/tdp_mmu", O_WRONLY) == -1 && errno == EACCES);
  CHECK(open("/sys/module/kvm/parameters/none", O_RDONLY) == -1 && errno == ENOENT);
  CHECK(!fopen("/sys/module/kvm/parameters/none", "r") && errno == ENOENT);
  CHECK(access("/sys/module/kvm/parameters/tdp_mmu", R_OK) == 0);
}

static void errors(void) {
  int fd = open_kvm(), vm = ioctl(fd, KVM_CREATE_VM, 0);
  CHECK(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600) == -1 && errno == EEXIST);
  CHECK(open("/dev/kvm", O_RDONLY | O_DIRECTORY) == -1 && errno == ENOTDIR);
  CHECK(ioctl(fd, KVM_RUN, 0) == -1 && errno == EINVAL);
  /* EBADF of a call of KVM's, about a descriptor inside its argument. */
  CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
  struct kvm_irqfd irqfd = {.fd = 999, .gsi = 1};
  CHECK(ioctl(vm, KVM_IRQFD, &irqfd) == -1 && errno == EBADF);
}

/* Everything that is not KVM's is as it would be without the library. */
static void foreign(void) {
  char name[] = "/tmp/anykvm-preload-XXXXXX";
  CHECK(close(mkstemp(name)) == 0 && unlink(name) == 0);
  mode_t before = umask(0);
  int fd = open(name, O_RDWR | O_CREAT, 0640);
  umask(before);
  struct stat status;
  CHECK(fd >= 0 && stat(name, &status) == 0 && (status.st_mode & 0777) == 0640);
  CHECK(write(fd, "1234", 4) == 4);
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  CHECK(fcntl(fd, F_SETLK, &lock) == 0);
  int available = 0;
  CHECK(lseek(fd, 1, SEEK_SET) == 1 && ioctl(fd, FIONREAD, &available) == 0 && available == 3);
  FILE* file = fopen(name, "r+");
  CHECK(file && fgetc(file) == '1' && fclose(file) == 0);
  CHECK(access(name, R_OK) == 0 && unlink(name) == 0 && access(name, R_OK) == -1 && errno == ENOENT);
  CHECK(close(fd) == 0 && close(fd) == -1 && errno == EBADF);
  CHECK(ioctl(fd, FIONREAD, &available) == -1 && errno == EBADF);
  CHECK(ioctl(0x7ffffff0, KVM_RUN, 0) == -1 && errno == EBADF);
  const char* volatile nowhere = NULL;
  CHECK(open(nowhere, O_RDONLY) == -1 && errno == EFAULT);
}

/* A guest in real mode: out 0x10, al; hlt. */
static void run(void) {
  static const unsigned char code[] = {0xb0, 0x2a, 0xe6, 0x10, 0xf4};
  int fd = open_kvm(), vm = ioctl(fd, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  void* ram = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(ram, code, sizeof code);
  struct kvm_userspace_memory_region slot = {.memory_size = 4096, .userspace_addr = (unsigned long)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
  int size = ioctl(fd, KVM_GET_VCPU_MMAP_SIZE, 0);
  struct kvm_run* kvm_run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(kvm_run != MAP_FAILED);
  struct kvm_sregs sregs;
  struct kvm_regs regs = {.rflags = 2};
  CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = sregs.cs.selector = 0;
  CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && kvm_run->exit_reason == KVM_EXIT_IO && kvm_run->io.port == 0x10);
  CHECK(*((unsigned char*)kvm_run + kvm_run->io.data_offset) == 0x2a);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && kvm_run->exit_reason == KVM_EXIT_HLT);
  CHECK(close(vcpu) == 0 && close(vm) == 0 && close(fd) == 0);
}

static int wait_for(pid_t child) {
  int status;
  CHECK(waitpid(child, &status, 0) == child);
  return status;
}

static void forked(void) {
  int fd = open_kvm(), vm = ioctl(fd, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);
  pid_t child = fork();
  if (child == 0) {
    /* The parent's VM belongs to its address space; the child makes its own. */
    CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == EIO);
    CHECK(is_kvm(fd));
    run();
    exit(0);
  }
  CHECK(wait_for(child) == 0);
  CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
}

static void exec(void) {
  pid_t child = fork();
  if (child == 0) {
    execl("/proc/self/exe", "client", "run", NULL);
    exit(1);
  }
  CHECK(wait_for(child) == 0);
}

int main(int count, char** arguments) {
  static const struct {
    const char* name;
    void (*run)(void);
  } cases[] = {{"device", device},         {"duplicates", duplicates}, {"paths", paths},
               {"parameters", parameters}, {"fork", forked},           {"exec", exec},
               {"errors", errors},         {"foreign", foreign},       {"run", run}};
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    if (count == 2 && strcmp(arguments[1], cases[i].name) == 0) {
      cases[i].run();
      return 0;
    }
  fprintf(stderr, "no such case\n");
  return 64;
}
