// One mapping, seen by the guest as one or two pieces.
#include "vmm/guest_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

namespace anykvm::vmm {

GuestMemory::GuestMemory(u64 size, Backing backing) : size_((size + page_size - 1) & page_mask) {
  // Two MiB more than asked for, to begin at a large page: the host then backs guest RAM by large pages.
  void* mapped = MAP_FAILED;
  constexpr u64 large_page = 2u << 20;
  if (size_ != 0)
    mapped = mmap(nullptr, size_ + large_page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  else
    errno = EINVAL;
  if (mapped == MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), "guest memory of " + std::to_string(size_) + " bytes");
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const auto aligned = (begin + large_page - 1) & ~(large_page - 1);
  if (aligned != begin) munmap(mapped, aligned - begin);
  const auto end = begin + size_ + large_page;
  if (aligned + size_ != end) munmap(reinterpret_cast<void*>(aligned + size_), end - aligned - size_);
  host_ = reinterpret_cast<u8*>(aligned);
  bool usable = mprotect(host_, size_, PROT_READ | PROT_WRITE) == 0;
  if (usable && backing == Backing::file) {
    file_ = memfd_create("guest memory", MFD_CLOEXEC);
    usable = file_ >= 0 && ftruncate(file_, static_cast<off_t>(size_)) == 0 &&
             mmap(host_, size_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_, 0) != MAP_FAILED;
  }
  if (!usable) {
    const int error = errno;
    munmap(host_, size_);
    if (file_ >= 0) close(file_);
    throw std::system_error(error, std::generic_category(), "guest memory of " + std::to_string(size_) + " bytes");
  }
  madvise(host_, size_, MADV_HUGEPAGE);

  const u64 low = std::min<u64>(size_, hole_begin);
  regions_.push_back({0, low, host_});
  if (low < size_) regions_.push_back({hole_end, size_ - low, host_ + low});
}

GuestMemory::~GuestMemory() {
  munmap(host_, size_);
  if (file_ >= 0) close(file_);
}

std::span<u8> GuestMemory::at(Gpa gpa, u64 size) const {
  for (const Region& region : regions_)
    if (gpa >= region.base && gpa - region.base < region.size && size <= region.size - (gpa - region.base))
      return {region.host + (gpa - region.base), size};
  return {};
}

bool GuestMemory::write(Gpa gpa, std::span<const u8> bytes) const {
  const auto target = at(gpa, bytes.size());
  if (target.size() != bytes.size()) return false;
  if (!bytes.empty()) std::memcpy(target.data(), bytes.data(), bytes.size());
  return true;
}

bool GuestMemory::read(Gpa gpa, std::span<u8> bytes) const {
  const auto source = at(gpa, bytes.size());
  if (source.size() != bytes.size()) return false;
  if (!bytes.empty()) std::memcpy(bytes.data(), source.data(), bytes.size());
  return true;
}

}  // namespace anykvm::vmm
