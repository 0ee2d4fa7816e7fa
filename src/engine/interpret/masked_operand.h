// Pages to run a masked memory access on, accessible and not side by side.
#pragma once

#include <sys/mman.h>

#include <new>

#include "x86/types.h"

namespace anykvm::engine {

/// One engine's.
class ProbePages {
 public:
  ProbePages() {
    void* at = mmap(nullptr, pages * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    at_ = static_cast<u8*>(at);
    mprotect(at_, 2 * page_size, PROT_READ | PROT_WRITE);
    mprotect(at_ + 4 * page_size, page_size, PROT_READ | PROT_WRITE);
  }
  ~ProbePages() { munmap(at_, pages * page_size); }
  ProbePages(const ProbePages&) = delete;
  ProbePages& operator=(const ProbePages&) = delete;

  /// Where an operand that begins on an accessible page or not, and ends on one or not, lies as it does in the guest.
  /// It crosses a page: the second page is the other.
  u8* place(Gva gva, bool first, bool last, bool crosses) const {
    const unsigned page = first ? (last || !crosses ? 0 : 1) : (last && crosses ? 3 : 2);
    return at_ + page * page_size + (gva & ~page_mask);
  }
  bool contains(const void* address) const {
    const auto at = static_cast<const u8*>(address);
    return at >= at_ && at < at_ + pages * page_size;
  }

 private:
  static constexpr unsigned pages = 5;  ///< accessible, accessible, not, not, accessible
  u8* at_;
};

}  // namespace anykvm::engine
