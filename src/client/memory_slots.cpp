// Memory slots: allocated, set up, disabled, freed.
#include <cerrno>

#include "anykvm/kvm.h"
#include "anykvm/vm.h"
#include "client/vm_state.h"

namespace anykvm {

namespace {
constexpr std::uint64_t page = 4096;
}

Vm::State::Slot& Vm::State::find(MemorySlot slot) {
  const auto index = std::size_t(slot.number());
  if (slot.number() < 0 || index >= slots.size() || !slots[index].allocated)
    throw KvmError(EINVAL, "memory slot that is not allocated");
  return slots[index];
}

void Vm::State::set_region(MemorySlot slot, const Slot& target, std::uint64_t size, std::uint32_t flags) {
  const kvm_userspace_memory_region region{.slot = std::uint32_t(slot.number()),
                                           .flags = flags,
                                           .guest_phys_addr = target.gpa,
                                           .memory_size = size,
                                           .userspace_addr = reinterpret_cast<std::uint64_t>(target.host)};
  handle.ioctl("KVM_SET_USER_MEMORY_REGION", KVM_SET_USER_MEMORY_REGION, &region);
}

Vm::MemorySlot Vm::allocate_memory_slot(std::uint64_t size) {
  if (size == 0 || size % page != 0) throw KvmError(EINVAL, "memory slot of a size that is no multiple of a page");
  const std::scoped_lock lock(state_->slots_mutex);
  auto& slots = state_->slots;
  std::size_t free = 0;
  while (free < slots.size() && slots[free].allocated) ++free;
  if (free == state_->slot_limit) throw KvmError(ENOSPC, "memory slot beyond KVM_CAP_NR_MEMSLOTS");
  if (free == slots.size()) slots.emplace_back();
  slots[free] = {.size = size, .allocated = true};
  return MemorySlot(std::int32_t(free));
}

void Vm::set_up_memory_slot(MemorySlot slot, void* host, std::uint64_t gpa, std::uint32_t flags) {
  const std::scoped_lock lock(state_->slots_mutex);
  auto& current = state_->find(slot);
  auto target = current;
  target.host = host;
  target.gpa = gpa;
  // KVM moves a slot in guest memory, but gives it other host memory only when it is made anew.
  if (current.active && current.host != host) {
    state_->set_region(slot, current, 0, 0);
    current.active = false;
  }
  state_->set_region(slot, target, target.size, flags);
  target.active = true;
  current = target;
}

void Vm::disable_memory_slot(MemorySlot slot) {
  const std::scoped_lock lock(state_->slots_mutex);
  auto& current = state_->find(slot);
  if (!current.active) return;
  state_->set_region(slot, current, 0, 0);
  current.active = false;
}

void Vm::free_memory_slot(MemorySlot slot) {
  disable_memory_slot(slot);
  const std::scoped_lock lock(state_->slots_mutex);
  state_->find(slot) = {};
}

std::vector<std::uint64_t> Vm::dirty_log(MemorySlot slot) const {
  std::uint64_t size;
  {
    const std::scoped_lock lock(state_->slots_mutex);
    size = state_->find(slot).size;
  }
  std::vector<std::uint64_t> bitmap((size / page + 63) / 64);
  kvm_dirty_log log{.slot = std::uint32_t(slot.number())};
  log.dirty_bitmap = bitmap.data();
  state_->handle.ioctl("KVM_GET_DIRTY_LOG", KVM_GET_DIRTY_LOG, &log);
  return bitmap;
}

}  // namespace anykvm
