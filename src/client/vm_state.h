// What a Vm keeps beside its descriptor.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "anykvm/vm.h"

namespace anykvm {

struct Vm::State {
  KvmHandle handle;
  std::size_t vcpu_mmap_size = 0;
  std::atomic<bool> has_irq_chip = false;
  std::atomic<std::uint32_t> next_vcpu_id = 0;

  /// A slot's number is its index.
  struct Slot {
    std::uint64_t size = 0;
    std::uint64_t gpa = 0;
    void* host = nullptr;
    bool allocated = false;
    bool active = false;
  };
  mutable std::mutex slots_mutex;
  std::vector<Slot> slots;
  std::size_t slot_limit = 0;

  /// The slot when it is allocated; throws KvmError EINVAL otherwise. With the mutex held.
  Slot& find(MemorySlot slot);
  void set_region(MemorySlot slot, const Slot& target, std::uint64_t size, std::uint32_t flags);
};

}  // namespace anykvm
