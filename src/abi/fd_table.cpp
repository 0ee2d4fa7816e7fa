#include "abi/fd_table.h"

#include <algorithm>
#include <cerrno>
#include <new>

#include "abi/descriptor_file.h"
#include "abi/vm_file.h"
#include "os/memory_file.h"
#include "os/process_identity.h"

namespace anykvm::abi {
namespace {

/// 16 million descriptors in two levels; a chunk appears with the first descriptor in it and stays.
constexpr u32 chunk_slots = 4096, chunks = 4096;
using Slot = std::atomic<OpenFile*>;
struct Chunk {
  Slot slots[chunk_slots] = {};
};
constinit std::atomic<Chunk*> table[chunks] = {};

Slot* find_slot(int fd) {
  const u32 number = static_cast<u32>(fd);
  if (number >= chunk_slots * chunks) return nullptr;
  Chunk* chunk = table[number / chunk_slots].load(std::memory_order_acquire);
  return chunk ? &chunk->slots[number % chunk_slots] : nullptr;
}

int make_slot(int fd, Slot*& out) {
  const u32 number = static_cast<u32>(fd);
  if (number >= chunk_slots * chunks) return -EMFILE;
  auto& entry = table[number / chunk_slots];
  Chunk* chunk = entry.load(std::memory_order_acquire);
  if (!chunk) {
    Chunk* fresh = new (std::nothrow) Chunk;
    if (!fresh) return -ENOMEM;
    if (entry.compare_exchange_strong(chunk, fresh, std::memory_order_acq_rel))
      chunk = fresh;
    else
      delete fresh;
  }
  out = &chunk->slots[number % chunk_slots];
  return 0;
}

/// Every open file there is, in use or free: they are recycled, never freed, and leak checkers want to see them held.
constinit std::atomic<OpenFile*> every_file{nullptr};

/// Free open files are linked from the fork-safe section's pointer. A forked child starts with none: it leaves its
/// parent's alone, whose list may have been half changed at the fork.
OpenFile* allocate() {
  {
    os::ForkSafeSection section;
    if (auto* file = static_cast<OpenFile*>(section.value())) {
      section.value() = file->next_free;
      return file;
    }
  }
  auto* file = new (std::nothrow) OpenFile;
  if (!file) return nullptr;
  file->next_made = every_file.load(std::memory_order_relaxed);
  while (!every_file.compare_exchange_weak(file->next_made, file, std::memory_order_release)) {
  }
  return file;
}

void release(OpenFile* file) {
  // What another process's threads and locks are part of cannot be taken apart here: a forked child leaves it.
  if (file->kind != FdKind::system && file->process != os::process_identity()) return;
  file->vm = nullptr;
  file->vcpu = nullptr;
  file->keeps.reset();
  os::ForkSafeSection section;
  file->next_free = static_cast<OpenFile*>(section.value());
  section.value() = file;
}

/// One more reference, unless it is the first: the file is free then.
bool take_reference(OpenFile* file) {
  u32 count = file->references.load(std::memory_order_relaxed);
  while (count != 0 && !file->references.compare_exchange_weak(count, count + 1, std::memory_order_acq_rel)) {
  }
  return count != 0;
}

/// Makes fd stand for file, which brings the reference.
int install(int fd, OpenFile* file) {
  Slot* slot = nullptr;
  if (const int error = make_slot(fd, slot)) return error;
  if (OpenFile* stale = slot->exchange(file, std::memory_order_acq_rel)) drop_reference(stale);
  return 0;
}

}  // namespace

void drop_reference(OpenFile* file) {
  if (file->references.fetch_sub(1, std::memory_order_acq_rel) == 1) release(file);
}

FileReference::FileReference(int fd) {
  Slot* slot = find_slot(fd);
  if (!slot) return;
  while (OpenFile* file = slot->load(std::memory_order_acquire)) {
    if (!take_reference(file)) continue;  // closed since: the slot says so by now
    if (slot->load(std::memory_order_acquire) == file) {
      file_ = file;
      return;
    }
    drop_reference(file);
  }
}

int install_descriptor(int fd, NewFile meaning) {
  OpenFile* file = allocate();
  if (!file) return -ENOMEM;
  file->kind = meaning.kind;
  file->process = os::process_identity();
  file->number.store(file_number(fd), std::memory_order_relaxed);
  file->vm = meaning.vm;
  file->vcpu = meaning.vcpu;
  file->keeps = std::move(meaning.keeps);
  file->references.store(1, std::memory_order_release);
  const int error = install(fd, file);
  if (error) drop_reference(file);
  return error;
}

int install_duplicate(int fd, int copy) {
  FileReference original(fd);
  if (!original) {
    Slot* slot = find_slot(copy);
    if (slot)
      if (OpenFile* stale = slot->exchange(nullptr, std::memory_order_acq_rel)) drop_reference(stale);
    return -EBADF;
  }
  OpenFile* file = original.share();
  const int error = install(copy, file);
  if (error) drop_reference(file);
  return error;
}

int install_by_number(int fd, u64 number) {
  for (OpenFile* file = every_file.load(std::memory_order_acquire); file; file = file->next_made) {
    if (file->number.load(std::memory_order_relaxed) != number || !take_reference(file)) continue;
    const bool same = file->number.load(std::memory_order_relaxed) == number;  // not recycled meanwhile
    const int error = same ? install(fd, file) : -EBADF;
    if (error) drop_reference(file);
    if (same) return error;
  }
  return -EBADF;
}

void forget_descriptors(u32 first, u32 last) {
  last = std::min(last, chunk_slots * chunks - 1);
  for (u32 number = first; number <= last; ++number) {
    Chunk* chunk = table[number / chunk_slots].load(std::memory_order_acquire);
    if (!chunk) {
      number |= chunk_slots - 1;  // the next chunk's
      continue;
    }
    if (OpenFile* file = chunk->slots[number % chunk_slots].exchange(nullptr, std::memory_order_acq_rel))
      drop_reference(file);
  }
}

int close_descriptor(int fd) {
  Slot* slot = find_slot(fd);
  OpenFile* file = slot ? slot->exchange(nullptr, std::memory_order_acq_rel) : nullptr;
  if (!file) return -EBADF;
  // The meaning goes first: as soon as the number is closed, another thread may get it for something else.
  os::close_file(fd);
  drop_reference(file);
  return 0;
}

}  // namespace anykvm::abi
