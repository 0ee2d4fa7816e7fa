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

  /// Where an operand can be accessed, or cannot, that lies on its page as it does at gva.
  u8* shown(Gva gva) const { return at_ + (gva & ~page_mask); }
  u8* hidden(Gva gva) const { return at_ + 2 * page_size + (gva & ~page_mask); }
  /// Where an operand can be accessed only in front of its byte `end`, or from its byte `begin` on.
  u8* shown_up_to(unsigned end) const { return at_ + 2 * page_size - end; }
  u8* shown_from(unsigned begin) const { return at_ + 4 * page_size - begin; }
  bool contains(const void* address) const {
    const auto at = static_cast<const u8*>(address);
    return at >= at_ && at < at_ + pages * page_size;
  }

 private:
  static constexpr unsigned pages = 5;  ///< accessible, accessible, not, not, accessible
  u8* at_;
};

}  // namespace anykvm::engine
