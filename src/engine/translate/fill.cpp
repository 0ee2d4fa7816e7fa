// A TLB refill from translated code. This file is compiled for general registers only: the guest's vector registers are
// in the host's meanwhile.
#include "engine/translate/translator.h"

namespace anykvm::engine::translate {

bool fill_function(Context* context, Gva address, u32 request) {
  return static_cast<Translator*>(context->translator)->fill(address, request);
}

bool Translator::fill(Gva address, u32 request) {
  using x86::Access;
  const bool write = FillRequest::write(request);
  const x86::Privilege privilege = FillRequest::privilege(request);
  if (mode_.privilege != privilege) return false;
  const u8* host =
      cpu_->mmu.lookup(address, FillRequest::size(request), write ? Access::write : Access::read, privilege);
  if (!host) return false;
  const unsigned slot = address >> 12 & (tlb_entries - 1);
  TlbEntry& entry = context_->tlb[unsigned(privilege)][slot];
  const u64 minus_page = -(address & page_mask), host_page = u64(host) & page_mask;
  if (entry.host != host_page || (entry.minus_read != minus_page && entry.minus_write != minus_page)) {
    entry.minus_read = entry.minus_write = minus_other_page(slot);
    entry.host = host_page;
    if (tlb_used_count_ < std::size(tlb_used_))
      tlb_used_[tlb_used_count_] = u16(unsigned(privilege) * tlb_entries + slot);
    ++tlb_used_count_;
  }
  (write ? entry.minus_write : entry.minus_read) = minus_page;
  return true;
}

}  // namespace anykvm::engine::translate
