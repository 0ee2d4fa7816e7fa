/* A /dev/kvm that answers at once and can do nothing: QEMU comes to its first KVM_RUN with it as soon as it can. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { run_pages = 3, most_fds = 4096 };
static char is_kvm[most_fds];

static int make(const char* name) {
  int fd = memfd_create(name, MFD_CLOEXEC);
  if (fd < 0 || fd >= most_fds || ftruncate(fd, run_pages * 4096) != 0) return -1;
  is_kvm[fd] = 1;
  return fd;
}

int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  unsigned mode = va_arg(rest, unsigned);
  va_end(rest);
  return strcmp(path, "/dev/kvm") == 0 ? make("kvm") : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open(const char* path, int flags, ...) __attribute__((alias("open64")));

/* What QEMU 7.2 insists on. */
static int extension(unsigned long number) {
  switch (number) {
    case KVM_CAP_NR_VCPUS:
    case KVM_CAP_MAX_VCPUS:
    case KVM_CAP_MAX_VCPU_ID: return 255;
    case KVM_CAP_NR_MEMSLOTS: return 509;
    case KVM_CAP_IRQ_ROUTING: return 4096;
    case KVM_CAP_MCE: return 32;
    case KVM_CAP_XSAVE2: return 4096;
    case KVM_CAP_COALESCED_MMIO: return 2;
    case KVM_CAP_ADJUST_CLOCK:
    case KVM_CAP_ASYNC_PF:
    case KVM_CAP_CLOCKSOURCE:
    case KVM_CAP_DEBUGREGS:
    case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
    case KVM_CAP_EXT_CPUID:
    case KVM_CAP_GET_TSC_KHZ:
    case KVM_CAP_IMMEDIATE_EXIT:
    case KVM_CAP_INTERNAL_ERROR_DATA:
    case KVM_CAP_IOEVENTFD:
    case KVM_CAP_IRQCHIP:
    case KVM_CAP_IRQFD:
    case KVM_CAP_IRQ_INJECT_STATUS:
    case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
    case KVM_CAP_MP_STATE:
    case KVM_CAP_NOP_IO_DELAY:
    case KVM_CAP_PIT2:
    case KVM_CAP_PIT_STATE2:
    case KVM_CAP_READONLY_MEM:
    case KVM_CAP_SET_GUEST_DEBUG:
    case KVM_CAP_SET_IDENTITY_MAP_ADDR:
    case KVM_CAP_SET_TSS_ADDR:
    case KVM_CAP_SIGNAL_MSI:
    case KVM_CAP_SYNC_MMU:
    case KVM_CAP_TSC_CONTROL:
    case KVM_CAP_USER_MEMORY:
    case KVM_CAP_VCPU_EVENTS:
    case KVM_CAP_X86_ROBUST_SINGLESTEP:
    case KVM_CAP_XCRS:
    case KVM_CAP_XSAVE: return 1;
    default: return 0;
  }
}

/* The host's own leaves, and KVM's. */
static int supported_cpuid(struct kvm_cpuid2* list) {
  enum { room = 100 };
  if (list->nent < room) {
    errno = E2BIG;
    return -1;
  }
  unsigned count = 0;
  for (int extended = 0; extended < 2; ++extended) {
    unsigned base = extended ? 0x80000000 : 0, ebx;
    for (unsigned leaf = base; leaf <= __get_cpuid_max(base, &ebx) && count < room - 2; ++leaf) {
      struct kvm_cpuid_entry2 entry = {.function = leaf};
      __cpuid_count(leaf, 0, entry.eax, entry.ebx, entry.ecx, entry.edx);
      list->entries[count++] = entry;
    }
  }
  list->entries[count++] =
      (struct kvm_cpuid_entry2){.function = 0x40000000, .eax = 0x40000001, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d};
  list->entries[count++] = (struct kvm_cpuid_entry2){.function = 0x40000001, .eax = 0x01007efb};
  list->nent = count;
  return 0;
}

int ioctl(int fd, unsigned long request, ...) {
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  if (fd < 0 || fd >= most_fds || !is_kvm[fd]) return (int)syscall(SYS_ioctl, fd, request, argument);
  switch ((unsigned)request) {
    case KVM_GET_API_VERSION: return KVM_API_VERSION;
    case KVM_CHECK_EXTENSION: return extension((unsigned long)argument);
    case KVM_CREATE_VM: return make("vm");
    case KVM_CREATE_VCPU: return make("vcpu");
    case KVM_GET_VCPU_MMAP_SIZE: return run_pages * 4096;
    case KVM_GET_TSC_KHZ: return 2000000;
    case KVM_GET_SUPPORTED_CPUID: return supported_cpuid(argument);
    case KVM_GET_MSR_INDEX_LIST: ((struct kvm_msr_list*)argument)->nmsrs = 0; return 0;
    case KVM_GET_MSRS:
    case KVM_SET_MSRS: return (int)((struct kvm_msrs*)argument)->nmsrs;
    default: return 0;
  }
}
