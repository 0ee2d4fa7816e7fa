// The kernel's words for a mapping are proc_pid_smaps(5)'s.
#include "os/client_ram.h"

#include <linux/falloc.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include "os/memory_file.h"
#include "os/proc_lines.h"

namespace anykvm::os {

namespace {

constexpr u64 least_size = 4u << 20;
/// What is copied at most: a client that has filled its RAM before waits for nothing longer than this takes.
constexpr u64 most_copied = 256u << 20;

/// A part of guest RAM. Entries do not overlap.
struct Part {
  u64 begin, end;
  int fd;      ///< of the file that it was moved to; -1: it is as the client made it
  u64 offset;  ///< in the file
  ino_t inode;
  bool forbidden;  ///< to be mapped by other processes
};
constexpr unsigned most_parts = 256;
constinit Part parts[most_parts];
constinit unsigned part_count = 0;

/// All parts lie between these; read without the lock, so that other memory costs nothing more.
constinit std::atomic<u64> lowest{~0ull}, highest{0};
constinit std::atomic<u64> changes{0};
constinit std::atomic<u64> moved{0};
constinit std::atomic<const char*> reason{nullptr};
constinit std::atomic<bool> watched{false};

/// The move in progress or the last one. A thread that meets its read-only memory waits until `moves` is even.
constinit std::atomic<u32> moves{0};

constinit std::atomic_flag locked = ATOMIC_FLAG_INIT;

/// Signals are blocked while it is held, so that a handler on this thread cannot wait for it.
class Lock {
 public:
  Lock() {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
    while (locked.test_and_set(std::memory_order_acquire)) sched_yield();
  }
  ~Lock() {
    locked.clear(std::memory_order_release);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  sigset_t before_;
};

bool may_overlap(u64 begin, u64 size) {
  return begin < highest.load(std::memory_order_acquire) && begin + size > lowest.load(std::memory_order_acquire);
}

void include(u64 begin, u64 end) {
  if (begin < lowest.load()) lowest = begin;
  if (end > highest.load()) highest = end;
}

void changed() { changes.fetch_add(1, std::memory_order_release); }

bool add(const Part& part) {
  if (part_count == most_parts) return false;
  parts[part_count++] = part;
  include(part.begin, part.end);
  return true;
}

/// No part has the address in its middle any more. false: there is no room for that.
bool split(u64 address) {
  for (unsigned n = 0; n < part_count; ++n) {
    Part& part = parts[n];
    if (address <= part.begin || address >= part.end) continue;
    if (part_count == most_parts) return false;
    Part upper = part;
    upper.begin = address;
    upper.offset += address - part.begin;
    part.end = address;
    return add(upper);
  }
  return true;
}
bool split(u64 begin, u64 end) { return split(begin) && split(end); }

template <class F>
void for_each_in(u64 begin, u64 end, F f) {
  for (unsigned n = 0; n < part_count; ++n)
    if (parts[n].begin < end && parts[n].end > begin) f(parts[n]);
}

/// Whether the descriptor still is the one that the part was moved to; the client closes what it likes.
bool has_its_file(const Part& part) {
  struct stat status;
  return part.fd >= 0 && fstat(part.fd, &status) == 0 && status.st_ino == part.inode;
}

/// Its memory is nobody's any more.
void release(const Part& part) {
  if (part.fd < 0) return;
  moved -= part.end - part.begin;
  if (!has_its_file(part)) return;
  // A child may have the descriptor, too.
  fallocate(part.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(part.offset), off_t(part.end - part.begin));
  if (std::none_of(parts, parts + part_count, [&](const Part& other) { return other.inode == part.inode; }))
    close_file(part.fd);
}

/// The parts in [begin, end), at whose limits they are split, are gone.
void drop(u64 begin, u64 end) {
  bool any = false;
  for (unsigned n = 0; n < part_count;) {
    if (parts[n].begin >= end || parts[n].end <= begin) {
      ++n;
      continue;
    }
    const Part gone = std::exchange(parts[n], parts[part_count - 1]);
    --part_count;
    release(gone);
    any = true;
  }
  if (any) changed();
}

long as_result(long result) { return result < 0 ? -errno : result; }

// The system calls themselves: libc's names are those of the interposer, which comes here.
int protect(void* at, std::size_t size, int protection) { return int(syscall(SYS_mprotect, at, size, protection)); }
int advise(void* at, std::size_t size, int advice) { return int(syscall(SYS_madvise, at, size, advice)); }
int unmap(void* at, std::size_t size) { return int(syscall(SYS_munmap, at, size)); }
void* map(void* at, std::size_t size, long protection, long flags, long fd) {
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, size, protection, flags, fd, 0L));
}

bool is_page_aligned(const void* address) { return !(u64(address) & ~page_mask); }
u64 whole_pages(u64 size) { return (size + page_size - 1) & page_mask; }

// --- what the memory is -------------------------------------------------------------------------------------------

/// The flags of VmFlags that keep their meaning behind the move, or are made again.
constexpr std::string_view known_flags[] = {"rd", "wr", "ex", "mr", "mw", "me", "ac", "nr", "sd", "mg",
                                            "hg", "nh", "dc", "dd", "rr", "sr", "um", "uw", "lo"};

struct Memory {
  const char* obstacle = nullptr;  ///< why it cannot be moved
  int protection = 0;
  bool is_shared = false, has_pages = false;
  bool huge = false, never_huge = false, not_dumped = false;
};

bool has_flag(const char* flags, const char* flag) { return std::strstr(flags, flag) != nullptr; }

void add_mapping(Memory& memory, const char* rights, const char* flags, bool has_name, u64 inode) {
  const auto obstacle = [&](bool is, const char* why) {
    if (is && !memory.obstacle) memory.obstacle = why;
  };
  obstacle(has_name || inode, "it belongs to a file or has a name");
  obstacle(rights[0] != 'r' || rights[1] != 'w', "it is not readable and writable");
  obstacle(has_flag(flags, " lo"), "it is locked");
  obstacle(has_flag(flags, " um") || has_flag(flags, " uw"), "a userfaultfd watches it");
  obstacle(!has_flag(flags, " dc"), "a child would inherit it (no MADV_DONTFORK)");
  for (std::string_view rest = flags; !rest.empty();) {
    const auto begin = std::min(rest.find_first_not_of(' '), rest.size());
    const auto flag = rest.substr(begin, rest.find(' ', begin) - begin);
    obstacle(!flag.empty() && std::find(std::begin(known_flags), std::end(known_flags), flag) == std::end(known_flags),
             "it is of an unusual kind");
    rest.remove_prefix(begin + flag.size());
  }
  memory.protection = PROT_READ | PROT_WRITE | (rights[2] == 'x' ? PROT_EXEC : 0);
  memory.huge = has_flag(flags, " hg");
  memory.never_huge = has_flag(flags, " nh");
  memory.not_dumped = has_flag(flags, " dd");
}

/// What [begin, end) consists of.
Memory inspect(u64 begin, u64 end) {
  Memory memory;
  u64 covered = begin, from = 0, to = 0, inode = 0;
  char rights[8] = {};
  bool has_name = false;
  const bool opened = for_each_line("/proc/self/smaps", [&](const char* line) {
    unsigned long low, high, number;
    int name = 0;
    char these[8];
    if (std::sscanf(line, "%lx-%lx %7s %*x %*x:%*x %lu %n", &low, &high, these, &number, &name) == 4) {
      from = low, to = high, inode = number;
      std::memcpy(rights, these, sizeof rights);
      has_name = line[name] != 0 && std::strncmp(line + name, "[anon:", 6) != 0;
      return from < end;
    }
    if (to <= begin) return true;
    unsigned long kib;
    if ((std::sscanf(line, "Rss: %lu", &kib) == 1 || std::sscanf(line, "Swap: %lu", &kib) == 1) && kib)
      memory.has_pages = true;
    if (std::strncmp(line, "VmFlags:", 8) != 0) return true;
    if (from > covered) return false;
    if (rights[3] == 's') memory.is_shared = true;
    add_mapping(memory, rights, line + 8, has_name, inode);
    if (covered > begin && !memory.obstacle) memory.obstacle = "it consists of several mappings";
    covered = to;
    return to < end;
  });
  if (!opened || covered < end) memory.obstacle = "/proc/self/smaps does not tell of it";
  return memory;
}

/// Whether it has a NUMA policy other than the thread's.
bool has_numa_policy(u64 begin) {
  int of_memory = 0, of_thread = 0;
  if (syscall(SYS_get_mempolicy, &of_memory, nullptr, 0, begin, MPOL_F_ADDR) != 0) return false;  // no NUMA
  syscall(SYS_get_mempolicy, &of_thread, nullptr, 0, nullptr, 0);
  return of_memory != MPOL_DEFAULT && of_memory != MPOL_LOCAL && of_memory != of_thread;
}

// --- the move -----------------------------------------------------------------------------------------------------

/// Copies the pages that are there. false: it cannot be told which, or they are too many.
bool copy_pages(u64 begin, u64 end, u8* to) {
  constexpr u64 present_or_swapped = 3ull << 62;
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return false;
  bool good = true;
  u64 copied = 0;
  u64 entries[1024];
  for (u64 at = begin; good && at < end;) {
    const u64 count = std::min<u64>(std::size(entries), (end - at) / page_size);
    const std::size_t bytes = count * sizeof(u64);
    good = pread(pagemap, entries, bytes, off_t(at / page_size * sizeof(u64))) == ssize_t(bytes);
    for (u64 n = 0; good && n < count; ++n, at += page_size) {
      if (!(entries[n] & present_or_swapped)) continue;
      good = (copied += page_size) <= most_copied;
      if (good) std::memcpy(to + (at - begin), reinterpret_cast<const void*>(at), page_size);
    }
  }
  close_file(pagemap);
  return good;
}

/// Has a file of this size mapped somewhere, with what the client had asked of its memory.
struct NewMemory {
  int fd = -1;
  void* at = MAP_FAILED;
  u64 size;
  ino_t inode = 0;

  NewMemory(u64 bytes, const Memory& like) : size(bytes) {
    struct rlimit limit;
    // Beyond it there are signals, not errors.
    if (getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur < size) return;
    fd = memfd_create("guest RAM", MFD_CLOEXEC);
    struct stat status;
    if (fd < 0 || ftruncate(fd, off_t(size)) != 0 || fstat(fd, &status) != 0) return;
    inode = status.st_ino;
    at = map(nullptr, size, like.protection, MAP_SHARED | MAP_NORESERVE, fd);
    if (at == MAP_FAILED) return;
    // What a kernel does not know of a file's memory it need not do.
    if (like.huge) advise(at, size, MADV_HUGEPAGE);
    if (like.never_huge) advise(at, size, MADV_NOHUGEPAGE);
    if (like.not_dumped) advise(at, size, MADV_DONTDUMP);
    if (advise(at, size, MADV_DONTFORK) != 0) unmap(std::exchange(at, MAP_FAILED), size);
  }
  ~NewMemory() {
    if (at != MAP_FAILED) unmap(at, size);
    if (fd >= 0) close_file(fd);
  }
  NewMemory(const NewMemory&) = delete;
  NewMemory& operator=(const NewMemory&) = delete;
};

/// Puts it in the place of what lies there. false: all is as it was.
bool put_in_place(NewMemory& fresh, u64 begin, int protection) {
  void* const place = reinterpret_cast<void*>(begin);
  const long moved_to =
      syscall(SYS_mremap, fresh.at, fresh.size, fresh.size, long(MREMAP_MAYMOVE | MREMAP_FIXED), place);
  if (moved_to != long(begin)) {
    if (protect(place, fresh.size, protection) == 0) return false;
    // It has unmapped what was there. The file has everything.
    if (map(place, fresh.size, protection, MAP_SHARED | MAP_FIXED, fresh.fd) == MAP_FAILED) std::abort();
    advise(place, fresh.size, MADV_DONTFORK);
    unmap(fresh.at, fresh.size);
  }
  fresh.at = MAP_FAILED;
  return true;
}

/// Moves [begin, end) to a file. nullptr, or why not; then all is as it was.
const char* move_to_file(u64 begin, u64 end, bool fresh_only, Part& part) {
  const Memory memory = inspect(begin, end);
  if (memory.is_shared) return nullptr;
  if (memory.obstacle) return memory.obstacle;
  if (fresh_only && memory.has_pages) return "it was in use when it became guest RAM";
  if (has_numa_policy(begin)) return "it has a NUMA policy";
  NewMemory fresh(end - begin, memory);
  if (fresh.at == MAP_FAILED) return "a file for it cannot be had";

  // Whoever stores to it from here on waits in was_being_moved().
  moves.fetch_add(1, std::memory_order_seq_cst);
  const char* obstacle = nullptr;
  const std::size_t size = end - begin;
  void* const place = reinterpret_cast<void*>(begin);
  if (protect(place, size, memory.protection & ~PROT_WRITE) != 0) {
    protect(place, size, memory.protection);
    obstacle = "it cannot be protected";
  } else {
    const bool has_pages = inspect(begin, end).has_pages;
    if (has_pages && (fresh_only || !copy_pages(begin, end, static_cast<u8*>(fresh.at))))
      obstacle = "too much of it is in use";
    else if (!put_in_place(fresh, begin, memory.protection))
      obstacle = "it cannot be replaced";
    if (obstacle) protect(place, size, memory.protection);
  }
  if (!obstacle) {
    part.fd = std::exchange(fresh.fd, -1);
    part.inode = fresh.inode;
  }
  moves.fetch_add(1, std::memory_order_seq_cst);
  return obstacle;
}

/// A part of guest RAM that is new.
void take(u64 begin, u64 end, bool fresh) {
  Part part{begin, end, -1, 0, 0, false};
  if (part_count == most_parts || end - begin < least_size) return;
  include(begin, end);  // before the move: was_being_moved() asks
  if (const char* const obstacle = move_to_file(begin, end, fresh, part))
    reason = obstacle;
  else if (part.fd >= 0)
    moved += end - begin;
  add(part);
  changed();
}

}  // namespace

void watch_client_ram() {
  watched = true;
  // A child has none of its parent's RAM that matters, and must not wait for its parent's threads.
  static constinit std::atomic_flag registered = ATOMIC_FLAG_INIT;
  if (registered.test_and_set()) return;
  pthread_atfork(nullptr, nullptr, [] {
    part_count = 0;
    lowest = ~0ull;
    highest = 0;
    moved = 0;
    moves = 0;
    locked.clear();
  });
}

void share_client_ram(u8* host, std::size_t size, bool fresh) {
  if (!watched || size < least_size) return;
  const u64 begin = u64(host), end = begin + size;
  const Lock lock;
  for (u64 at = begin; at < end;) {
    u64 next = end, covered = at;
    for_each_in(at, end, [&](const Part& part) {
      if (part.begin <= at)
        covered = part.end;
      else
        next = std::min(next, part.begin);
    });
    if (covered > at) {
      at = covered;
      continue;
    }
    take(at, next, fresh);
    at = next;
  }
}

u64 client_ram_changes() { return changes.load(std::memory_order_acquire); }

bool may_be_mirrored(const u8* begin, const u8* end) {
  bool may = true;
  const Lock lock;
  for_each_in(u64(begin), u64(end), [&](const Part& part) { may &= !part.forbidden; });
  return may;
}

ClientRamReport client_ram_report() { return {moved, reason}; }

long client_madvise(void* address, std::size_t length, int advice) {
  const u64 begin = u64(address), size = whole_pages(length);
  const bool clears = advice == MADV_DONTNEED || advice == MADV_FREE || advice == MADV_DONTNEED_LOCKED;
  if (!clears || !is_page_aligned(address) || !may_overlap(begin, size))
    return as_result(syscall(SYS_madvise, address, length, advice));
  const Lock lock;
  long result = 0;
  for (u64 at = begin; at < begin + size && result == 0;) {
    u64 end = begin + size;
    const Part* in_file = nullptr;
    for_each_in(at, end, [&](const Part& part) {
      if (part.fd < 0) return;
      if (part.begin <= at)
        in_file = &part;
      else
        end = std::min(end, part.begin);
    });
    if (in_file) end = std::min(end, in_file->end);
    const auto piece = reinterpret_cast<void*>(at);
    if (!in_file)
      result = as_result(syscall(SYS_madvise, piece, end - at, advice));
    else if (advice == MADV_DONTNEED_LOCKED)
      result = as_result(fallocate(in_file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                   off_t(in_file->offset + at - in_file->begin), off_t(end - at)));
    else
      result = as_result(syscall(SYS_madvise, piece, end - at, MADV_REMOVE));
    at = end;
  }
  return result;
}

long client_munmap(void* address, std::size_t length) {
  const u64 begin = u64(address), size = whole_pages(length);
  if (!is_page_aligned(address) || !may_overlap(begin, size)) return as_result(syscall(SYS_munmap, address, length));
  const Lock lock;
  if (!split(begin, begin + size)) return -ENOMEM;
  const long result = as_result(syscall(SYS_munmap, address, length));
  if (result == 0) drop(begin, begin + size);
  return result;
}

long client_mmap(void* address, std::size_t length, int protection, int flags, int fd, off_t offset) {
  const u64 begin = u64(address), size = whole_pages(length);
  const auto map = [&] {
    return as_result(syscall(SYS_mmap, address, length, long(protection), long(flags), long(fd), offset));
  };
  const bool replaces = (flags & MAP_FIXED) && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE;
  if (!replaces || !is_page_aligned(address) || !may_overlap(begin, size)) return map();
  const Lock lock;
  if (!split(begin, begin + size)) return -ENOMEM;
  const long result = map();
  if (result == long(begin)) drop(begin, begin + size);
  return result;
}

long client_mremap(void* old, std::size_t old_length, std::size_t length, int flags, void* wanted) {
  const u64 begin = u64(old), old_size = whole_pages(old_length), size = whole_pages(length);
  const auto remap = [&] { return as_result(syscall(SYS_mremap, old, old_length, length, long(flags), wanted)); };
  const bool replaces = flags & MREMAP_FIXED;
  if (!is_page_aligned(old) || (!may_overlap(begin, old_size + 1) && !(replaces && may_overlap(u64(wanted), size))))
    return remap();
  const Lock lock;
  u64 in_files = 0;
  for_each_in(begin, begin + std::max<u64>(old_size, 1), [&](const Part& part) { in_files += part.fd >= 0; });
  // Of private memory there is no second mapping; and that which it leaves behind would be empty.
  if (in_files && (old_size == 0 || flags & MREMAP_DONTUNMAP)) return -EINVAL;
  if (!split(begin, begin + old_size) || !split(begin + std::min(size, old_size)) ||
      (replaces && !split(u64(wanted), u64(wanted) + size)))
    return -ENOMEM;
  if (in_files && size > old_size) {
    for (unsigned n = 0; n < part_count; ++n) {
      const Part& part = parts[n];
      struct stat status;
      if (part.end != begin + old_size || part.fd < 0) continue;
      if (!has_its_file(part) || fstat(part.fd, &status) != 0 ||
          part.offset + (part.end - part.begin) != u64(status.st_size) ||
          ftruncate(part.fd, off_t(u64(status.st_size) + size - old_size)) != 0)
        return -ENOMEM;
    }
  }
  const long result = remap();
  if (result < 0) return result;
  if (replaces) drop(u64(wanted), u64(wanted) + size);
  if (size < old_size) drop(begin + size, begin + old_size);
  for_each_in(begin, begin + std::min(old_size, size), [&](Part& part) {
    part.begin += u64(result) - begin;
    part.end += u64(result) - begin;
    if (part.end == u64(result) + old_size && size > old_size) {
      part.end += size - old_size;
      if (part.fd >= 0) moved += size - old_size;
    }
    include(part.begin, part.end);
  });
  changed();
  return result;
}

long client_mprotect(void* address, std::size_t length, int protection) {
  const u64 begin = u64(address), size = whole_pages(length);
  const long result = as_result(syscall(SYS_mprotect, address, length, protection));
  constexpr int all = PROT_READ | PROT_WRITE;
  if ((protection & all) != all && may_overlap(begin, size)) client_watches_faults(begin, size);
  return result;
}

void client_watches_faults(u64 begin, u64 size) {
  if (!may_overlap(begin, size)) return;
  const Lock lock;
  for_each_in(begin, begin + size, [](Part& part) { part.forbidden = true; });
  changed();
}

bool was_being_moved(const void* address) {
  /// What `moves` was when a store of this thread was tried again. initial-exec: reached without __tls_get_addr.
  [[gnu::tls_model("initial-exec")]] static constinit thread_local u32 tried_at = 0;
  if (!may_overlap(u64(address), 1)) return false;
  while (moves.load(std::memory_order_seq_cst) & 1) sched_yield();
  const u32 now = moves.load(std::memory_order_seq_cst);
  return std::exchange(tried_at, now) != now;
}

}  // namespace anykvm::os
