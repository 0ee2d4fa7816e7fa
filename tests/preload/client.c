/* What a client in C does around /dev/kvm, knowing nothing of this library. Each case is one argument; a failed check
 * says which and ends the program with 1. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
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
  CHECK(faccessat(AT_FDCWD, "/dev/kvm", R_OK | W_OK, 0) == 0 && faccessat(7, "/dev/kvm", R_OK, AT_EACCESS) == 0);
  CHECK(eaccess("/dev/kvm", R_OK) == 0 && euidaccess("/dev/kvm", X_OK) == -1);
  CHECK(faccessat(AT_FDCWD, "/proc", R_OK, AT_EACCESS) == 0 && eaccess("/nowhere", F_OK) == -1 && errno == ENOENT);
  int fd = open_kvm();
  CHECK(fstat(fd, &status) == 0 && S_ISCHR(status.st_mode) && status.st_rdev == makedev(10, 232));
  CHECK(fstatat(fd, "", &status, AT_EMPTY_PATH) == 0 && S_ISCHR(status.st_mode));
  CHECK(statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &extended) == 0 && S_ISCHR(extended.stx_mode));
  CHECK(creat("/dev/kvm", 0600) >= 0);
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

static void spellings(void) {
  struct stat status;
  CHECK(is_kvm(open("//dev/./kvm", O_RDWR)));
  CHECK(chdir("/dev") == 0);
  CHECK(is_kvm(open("kvm", O_RDWR)) && access("./kvm", R_OK) == 0);
  CHECK(chdir("/") == 0 && is_kvm(open("dev/kvm", O_RDWR)));
  int folder = open("/dev", O_PATH | O_DIRECTORY);
  CHECK(is_kvm(openat(folder, "kvm", O_RDWR)));
  CHECK(fstatat(folder, "kvm", &status, 0) == 0 && status.st_rdev == makedev(10, 232));
  CHECK(chdir("/tmp") == 0 && open("kvm", O_RDWR) == -1 && openat(-5, "kvm", O_RDWR) == -1 && errno == EBADF);
  CHECK(access("/sys/module//kvm/parameters/tdp_mmu", R_OK) == 0);
}

struct machine {
  int kvm, vm, vcpu, size;
  void* ram;
  struct kvm_run* run;
};

/* In real mode, from address 0. */
static struct machine new_machine(const void* code, size_t size) {
  struct machine m = {.kvm = open_kvm()};
  m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0);
  m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0);
  CHECK(m.vcpu >= 0);
  m.ram = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(m.ram, code, size);
  struct kvm_userspace_memory_region slot = {.memory_size = 4096, .userspace_addr = (unsigned long)m.ram};
  CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
  m.size = ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  m.run = mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
  CHECK(m.run != MAP_FAILED);
  struct kvm_sregs sregs;
  struct kvm_regs regs = {.rflags = 2};
  CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = sregs.cs.selector = 0;
  CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
  return m;
}

static void end_machine(struct machine m) {
  CHECK(munmap(m.run, m.size) == 0 && close(m.vcpu) == 0 && close(m.vm) == 0 && close(m.kvm) == 0);
  CHECK(munmap(m.ram, 4096) == 0);
}

static int count_in(const char* folder) {
  DIR* entries = opendir(folder);
  int count = 0;
  while (readdir(entries)) ++count;
  closedir(entries);
  return count;
}

/* out 0x10, al; hlt. */
static void run(void) {
  static const unsigned char code[] = {0xb0, 0x2a, 0xe6, 0x10, 0xf4};
  struct machine m = new_machine(code, sizeof code);
  CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_IO && m.run->io.port == 0x10);
  CHECK(*((unsigned char*)m.run + m.run->io.data_offset) == 0x2a);
  CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT);
  end_machine(m);
}

/* A VM with a thread inside the library, which ends with it. */
static void new_vm_with_thread(int fds[2]) {
  fds[0] = open_kvm();
  fds[1] = ioctl(fds[0], KVM_CREATE_VM, 0);
  int event = eventfd(0, 0);
  struct kvm_irqfd irqfd = {.fd = event, .gsi = 1};
  CHECK(ioctl(fds[1], KVM_CREATE_IRQCHIP, 0) == 0 && ioctl(fds[1], KVM_IRQFD, &irqfd) == 0 && close(event) == 0);
}

static void endings(void) {
  int fds[2], tasks = 0, files = 0;
  for (int way = 0; way < 6; ++way) {
    new_vm_with_thread(fds);
    int lowest = fds[0] < fds[1] ? fds[0] : fds[1], highest = fds[0] < fds[1] ? fds[1] : fds[0];
    CHECK(close_range(lowest, highest, 8) == -1 && errno == EINVAL && is_kvm(fds[0]));
    CHECK(close_range(lowest, highest, CLOSE_RANGE_CLOEXEC) == 0 && is_kvm(fds[0]));
    CHECK(close_range(highest, lowest - 1, 0) == -1 && errno == EINVAL && is_kvm(fds[0]));
    switch (way) {
      case 0: CHECK(close(fds[0]) == 0 && close(fds[1]) == 0); break;
      case 1:
        for (int i = 0; i < 2; ++i) {
          FILE* file = fdopen(fds[i], "r+");
          CHECK(file && fclose(file) == 0);
        }
        break;
      case 2:
        for (int i = 0; i < 2; ++i) CHECK(dup2(STDIN_FILENO, fds[i]) == fds[i]);
        break;
      case 3: CHECK(close_range(fds[0], fds[0], 0) == 0 && close_range(fds[1], fds[1], 0) == 0); break;
      case 4:
        CHECK(dup2(fds[0], 1000) == 1000 && dup2(fds[1], 1001) == 1001);
        CHECK(close(fds[0]) == 0 && close(fds[1]) == 0 && close_range(1000, ~0u, 0) == 0);
        break;
      case 5:
        dup2(fds[0], 1000), dup2(fds[1], 1001);
        CHECK(close(fds[0]) == 0 && close(fds[1]) == 0);
        closefrom(1000);
        break;
    }
    CHECK(ioctl(fds[1], KVM_CHECK_EXTENSION, 0) == -1 && errno == (way == 2 ? ENOTTY : EBADF));
    if (way == 2) CHECK(close(fds[0]) == 0 && close(fds[1]) == 0);
    /* What is still there of the first belongs to the library. */
    if (way == 0) tasks = count_in("/proc/self/task"), files = count_in("/proc/self/fd");
    CHECK(count_in("/proc/self/task") == tasks && count_in("/proc/self/fd") == files);
  }
}

static int resident_kib(void) {
  int pages = 0, all;
  FILE* file = fopen("/proc/self/statm", "r");
  CHECK(file && fscanf(file, "%d %d", &all, &pages) == 2 && fclose(file) == 0);
  return pages * 4;
}

static void machines(void) {
  static const unsigned char code[] = {0xf4};
  struct machine many[200];
  int files = 0, kib = 0;
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 200; ++i) many[i] = new_machine(code, sizeof code);
    for (int i = 0; i < 200; ++i) {
      CHECK(ioctl(many[i].vcpu, KVM_RUN, 0) == 0 && many[i].run->exit_reason == KVM_EXIT_HLT);
      end_machine(many[i]);
    }
    if (round == 0) files = count_in("/proc/self/fd");
  }
  CHECK(count_in("/proc/self/fd") == files);
  /* One after the other: what the allocator keeps for the next does not count. */
  for (int i = 0; i < 400; ++i) {
    struct machine m = new_machine(code, sizeof code);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
    end_machine(m);
    if (i == 100) kib = resident_kib();
  }
  CHECK(resident_kib() < kib + 2048);
}

static void* count_down(void* unused) {
  (void)unused;
  /* mov cx, 1000; again: in al, 0x20; loop again; hlt */
  static const unsigned char code[] = {0xb9, 0xe8, 0x03, 0xe4, 0x20, 0xe2, 0xfc, 0xf4};
  struct machine m = new_machine(code, sizeof code);
  int reads = 0;
  while (ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_IO) ++reads;
  CHECK(reads == 1000 && m.run->exit_reason == KVM_EXIT_HLT);
  end_machine(m);
  return NULL;
}

static void threads(void) {
  pthread_t all[8];
  for (int i = 0; i < 8; ++i) CHECK(pthread_create(&all[i], NULL, count_down, NULL) == 0);
  for (int i = 0; i < 8; ++i) CHECK(pthread_join(all[i], NULL) == 0);
}

static const unsigned char endless[] = {0xeb, 0xfe}; /* jmp $ */
static volatile sig_atomic_t signals;
static struct kvm_run* volatile signalled;

static void on_signal(int number) {
  (void)number;
  ++signals;
  signalled->immediate_exit = 1;
}

static void start_timer(void) {
  struct itimerval soon = {.it_value = {.tv_usec = 20000}};
  CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
}

/* The client's handlers end KVM_RUN. */
static void handler(void) {
  struct machine m = new_machine(endless, sizeof endless);
  signalled = m.run;
  struct sigaction action = {.sa_handler = on_signal}, old;
  CHECK(sigaction(SIGALRM, &action, NULL) == 0 && sigaction(SIGALRM, NULL, &old) == 0);
  CHECK(old.sa_handler == on_signal);
  for (int i = 1; i < 5; ++i) {
    start_timer();
    m.run->immediate_exit = 0;
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR && signals == i);
  }
  end_machine(m);
}

/* Until it is told to end. */
static int wait_for(pid_t child);

/* Memory of the engine direct is in a file; MOVED_TO_A_FILE says that it has to be. */
static int is_in_a_file(const void* address) {
  FILE* maps = fopen("/proc/self/maps", "r");
  char line[512];
  int found = 0;
  while (fgets(line, sizeof line, maps)) {
    unsigned long begin, end;
    if (sscanf(line, "%lx-%lx", &begin, &end) == 2 && begin <= (unsigned long)address && end > (unsigned long)address)
      found = strstr(line, "memfd:guest RAM") != NULL;
  }
  fclose(maps);
  return found;
}

/* What private memory has to be to its owner, whatever KVM does with it. */
static void memory(void) {
  const size_t page = 4096, size = 8 << 20;
  int vm = ioctl(open_kvm(), KVM_CREATE_VM, 0);
  volatile char* ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(vm >= 0 && ram != MAP_FAILED && madvise((void*)ram, size, MADV_DONTFORK) == 0);
  ram[0] = ram[page] = ram[size - 1] = 1;
  struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (unsigned long)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
  CHECK(is_in_a_file((void*)ram) == (getenv("MOVED_TO_A_FILE") != NULL));
  CHECK(ram[0] == 1 && ram[page] == 1 && ram[size - 1] == 1 && ram[2 * page] == 0);
  int descriptors = count_in("/proc/self/fd");
  CHECK(madvise((void*)(ram + page), page, MADV_DONTNEED) == 0);
  CHECK(ram[0] == 1 && ram[page] == 0 && ram[size - 1] == 1);
  ram[page] = 2;
  CHECK(madvise((void*)ram, size / 2, MADV_FREE) == 0 && ram[size - 1] == 1);

  pid_t child = fork();
  if (child == 0) {
    unsigned char there;
    _exit(mincore((void*)ram, page, &there) == -1 && errno == ENOMEM ? 0 : 1);
  }
  CHECK(wait_for(child) == 0);

  /* Another mapping in the middle of it is another mapping. */
  volatile char* other =
      mmap((void*)(ram + 4 * page), page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS, -1, 0);
  CHECK(other == ram + 4 * page);
  other[0] = ram[3 * page] = ram[5 * page] = 3;
  CHECK(madvise((void*)(ram + 3 * page), 3 * page, MADV_DONTNEED) == 0);
  CHECK(ram[3 * page] == 0 && other[0] == 3 && ram[5 * page] == 0);

  volatile char* grown = mremap((void*)(ram + 5 * page), size - 5 * page, size, MREMAP_MAYMOVE);
  CHECK(grown != MAP_FAILED && grown[size - 5 * page - 1] == 1 && grown[size - 1] == 0);
  CHECK(mprotect((void*)grown, page, PROT_NONE) == 0 && mprotect((void*)grown, page, PROT_READ | PROT_WRITE) == 0);
  slot.memory_size = 0;
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
  CHECK(munmap((void*)grown, size) == 0 && munmap((void*)ram, 5 * page) == 0);
  CHECK(count_in("/proc/self/fd") == descriptors - (getenv("MOVED_TO_A_FILE") != NULL));
}

static void linger(void) {
  static const unsigned char code[] = {0xe4, 0x20, 0xeb, 0xfc}; /* again: in al, 0x20; jmp again */
  struct machine m = new_machine(code, sizeof code);
  signalled = m.run;
  struct sigaction action = {.sa_handler = on_signal};
  CHECK(sigaction(SIGTERM, &action, NULL) == 0);
  CHECK(puts("lingering") >= 0 && fflush(stdout) == 0);
  while (!signals) ioctl(m.vcpu, KVM_RUN, 0);
}

/* SIGUSR2 is the client's. */
static void own_usr2(void) {
  static const unsigned char code[] = {0xf4};
  struct sigaction action = {.sa_handler = on_signal}, old;
  CHECK(sigaction(SIGUSR2, NULL, &old) == 0 && old.sa_handler == SIG_DFL);
  struct machine m = new_machine(code, sizeof code);
  signalled = m.run;
  CHECK(sigaction(SIGUSR2, NULL, &old) == 0 && old.sa_handler == SIG_DFL);
  CHECK(sigaction(SIGUSR2, &action, &old) == 0 && old.sa_handler == SIG_DFL);
  CHECK(raise(SIGUSR2) == 0 && signals == 1);
  CHECK(close(m.vm) == 0 && raise(SIGUSR2) == 0 && signals == 2);
}

/* A handler that libc does not know of is left alone, and ends KVM_RUN by what it sets. */
__asm__("restore_signal: mov $15, %eax; syscall");
extern void restore_signal(void);

static void raw_handler(void) {
  struct {
    void (*handler)(int);
    unsigned long flags;
    void (*restorer)(void);
    unsigned long mask;
  } wanted = {on_signal, 0x04000000 /* SA_RESTORER */, restore_signal, 0}, seen;
  struct machine m = new_machine(endless, sizeof endless);
  signalled = m.run;
  CHECK(syscall(SYS_rt_sigaction, SIGALRM, &wanted, NULL, 8) == 0);
  start_timer();
  CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR && signals == 1);
  CHECK(syscall(SYS_rt_sigaction, SIGALRM, NULL, &seen, 8) == 0);
  CHECK(seen.handler == on_signal && seen.flags == wanted.flags);
  end_machine(m);
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

static void* run_until_told(void* machine) {
  struct machine* m = machine;
  CHECK(ioctl(m->vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
  return NULL;
}

/* While another thread is in the guest. */
static void busy_fork(void) {
  struct machine m = new_machine(endless, sizeof endless);
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, run_until_told, &m) == 0);
  for (int i = 0; i < 20; ++i) {
    pid_t child = fork();
    if (child == 0) {
      CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EIO);
      CHECK(close(m.vcpu) == 0 && close(m.vm) == 0);
      run();
      _exit(0);
    }
    CHECK(wait_for(child) == 0);
  }
  struct sigaction action = {.sa_handler = on_signal};
  signalled = m.run;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0 && pthread_kill(thread, SIGUSR1) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  end_machine(m);
}

/* The child has the parent's memory, but descriptors and handlers of its own. */
static void vfork_child(void) {
  static const unsigned char code[] = {0xf4};
  struct machine m = new_machine(code, sizeof code);
  static volatile int copy;
  signalled = m.run;
  CHECK(signal(SIGSEGV, on_signal) == SIG_DFL);
  pid_t child = vfork();
  if (child == 0) {
    copy = dup(m.kvm);
    int ok = is_kvm(m.kvm) && close(m.vcpu) == 0 && dup2(0, m.vm) == m.vm && close_range(m.kvm, m.kvm, 0) == 0 &&
             signal(SIGSEGV, SIG_IGN) == on_signal;
    closefrom(3);
    _exit(!ok);
  }
  CHECK(wait_for(child) == 0);
  CHECK(is_kvm(m.kvm) && ioctl(m.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
  CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT);
  CHECK(raise(SIGSEGV) == 0 && signals == 1);
  CHECK(fcntl(copy, F_GETFD) == -1 && dup2(STDIN_FILENO, copy) == copy);
  CHECK(ioctl(copy, KVM_GET_API_VERSION, 0) == -1 && errno == ENOTTY);
  end_machine(m);
}

static void exec(void) {
  pid_t child = fork();
  if (child == 0) {
    execl("/proc/self/exe", "client", "run", NULL);
    exit(1);
  }
  CHECK(wait_for(child) == 0);
}

/* What a new program can do with the descriptors of the old one. */
enum { inherited_kvm = 40, inherited_vm, inherited_vcpu, not_inherited };

static void heir(void) {
  CHECK(is_kvm(inherited_kvm) && ioctl(inherited_kvm, KVM_CREATE_VM, 0) >= 0);
  CHECK(ioctl(inherited_vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == EIO);
  CHECK(ioctl(inherited_vcpu, KVM_RUN, 0) == -1 && errno == EIO);
  CHECK(ioctl(not_inherited, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
  int copy = dup(inherited_kvm);
  CHECK(is_kvm(copy) && close(inherited_kvm) == 0 && is_kvm(copy));
  CHECK(ioctl(inherited_kvm, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
}

static void inherited(void) {
  static const unsigned char code[] = {0xf4};
  struct machine m = new_machine(code, sizeof code);
  CHECK(dup2(m.kvm, inherited_kvm) >= 0 && dup2(m.vm, inherited_vm) >= 0 && dup2(m.vcpu, inherited_vcpu) >= 0);
  CHECK(dup3(m.kvm, not_inherited, O_CLOEXEC) >= 0);
  extern char** environ;
  char* arguments[] = {"client", "heir", NULL};
  posix_spawn_file_actions_t actions;
  pid_t child;
  CHECK(posix_spawn_file_actions_init(&actions) == 0);
  CHECK(posix_spawn_file_actions_addclose(&actions, m.vm) == 0);
  CHECK(posix_spawn(&child, "/proc/self/exe", &actions, NULL, arguments, environ) == 0 && wait_for(child) == 0);
  child = fork();
  if (child == 0) {
    execv("/proc/self/exe", arguments);
    exit(1);
  }
  CHECK(wait_for(child) == 0);
  CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
}

static void send_fds(int socket, const int fds[3]) {
  char space[CMSG_SPACE(3 * sizeof(int))], byte = 0;
  struct iovec data = {&byte, 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
  struct cmsghdr* header = CMSG_FIRSTHDR(&message);
  *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(3 * sizeof(int))};
  memcpy(CMSG_DATA(header), fds, 3 * sizeof(int));
  CHECK(sendmsg(socket, &message, 0) == 1);
}

static void receive_fds(int socket, int fds[3]) {
  char space[CMSG_SPACE(3 * sizeof(int))], byte;
  struct iovec data = {&byte, 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
  CHECK(recvmsg(socket, &message, 0) == 1 && CMSG_FIRSTHDR(&message));
  memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), 3 * sizeof(int));
}

/* Over a socket, to another process and to this one. */
static void passed(void) {
  static const unsigned char code[] = {0xf4};
  int sockets[2], fds[3];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
  pid_t child = fork();
  if (child == 0) {
    receive_fds(sockets[1], fds);
    CHECK(is_kvm(fds[0]) && ioctl(fds[0], KVM_CREATE_VM, 0) >= 0);
    CHECK(ioctl(fds[1], KVM_CREATE_VCPU, 1) == -1 && errno == EIO);
    CHECK(ioctl(fds[2], KVM_RUN, 0) == -1 && errno == EIO);
    exit(0);
  }
  struct machine m = new_machine(code, sizeof code);
  const int ours[] = {m.kvm, m.vm, m.vcpu};
  send_fds(sockets[0], ours);
  CHECK(wait_for(child) == 0);
  send_fds(sockets[0], ours);
  receive_fds(sockets[1], fds);
  for (int closed = 0; closed < 2; ++closed) {
    CHECK(is_kvm(fds[0]) && ioctl(fds[1], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
    CHECK(ioctl(fds[2], KVM_GET_TSC_KHZ, 0) > 0);
    if (!closed) CHECK(close(m.vcpu) == 0 && close(m.vm) == 0 && close(m.kvm) == 0);
  }
  CHECK(ioctl(fds[2], KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT);
  CHECK(close(fds[2]) == 0 && close(fds[1]) == 0 && close(fds[0]) == 0);
}

int main(int count, char** arguments) {
  static const struct {
    const char* name;
    void (*run)(void);
  } cases[] = {{"device", device},
               {"duplicates", duplicates},
               {"paths", paths},
               {"spellings", spellings},
               {"parameters", parameters},
               {"fork", forked},
               {"busy_fork", busy_fork},
               {"vfork", vfork_child},
               {"exec", exec},
               {"inherited", inherited},
               {"heir", heir},
               {"linger", linger},
               {"own_usr2", own_usr2},
               {"passed", passed},
               {"errors", errors},
               {"foreign", foreign},
               {"run", run},
               {"endings", endings},
               {"threads", threads},
               {"machines", machines},
               {"raw_handler", raw_handler},
               {"handler", handler},
               {"memory", memory}};
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    if (count == 2 && strcmp(arguments[1], cases[i].name) == 0) {
      cases[i].run();
      return 0;
    }
  fprintf(stderr, "no such case\n");
  return 64;
}
