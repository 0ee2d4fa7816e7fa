// What translated code asks for most: a TLB refill, the block that an indirect jump leads to. This file is compiled for
// general registers only: the guest's vector registers are in the host's meanwhile.
#include "engine/translate/translator.h"

#include <cstring>

#include "x86/xsave_parts.h"

namespace anykvm::engine::translate {

bool fill_function(Context* context, Gva address, u32 request, const RefillRequest* more) {
  return static_cast<Translator*>(context->translator)->fill(address, more->size, request);
}

bool load_x87_function(Context* context) { return static_cast<Translator*>(context->translator)->load_x87(); }

bool find_function(Context* context, u64 rip, u32 request, u64 rsp) {
  return static_cast<Translator*>(context->translator)->find(rip, request, rsp);
}

/// A branch to an address that is not canonical faults itself: it is taken back, and the reference engine executes it.
bool Translator::find(u64 rip, u32 request, u64 rsp) {
  Chain* const chain = reinterpret_cast<Chain*>(context_->chain);
  context_->chain = 0;
  if (mode_.narrow) {  // a branch may lead over the end of 4 GiB
    rip = u32(rip);
    context_->page_base = u32(context_->page_base);
  }
  if (cpu_->canonical(rip)) {
    const Gva from = context_->page_base;
    if (!find(rip)) return false;
    if (chain) link_chain(*chain, from, rip);
    return true;
  }
  context_->branch = context_->page_base + BranchRequest::offset(request);
  context_->undo = u64(s64(BranchRequest::undo(request)));
  if (BranchRequest::restores(request)) {
    // The push has just found its page here; the MMU may have other pages in the place of this one.
    const TlbEntry& stack = context_->tlb[unsigned(mode_.privilege)][rsp >> 12 & (tlb_entries - 1)];
    if (stack.minus_write == -(rsp & page_mask))
      std::memcpy(reinterpret_cast<u8*>(stack.host + (rsp & ~page_mask)), &context_->replaced, 8);
  }
  context_->faulted = 1;
  context_->enter_at = u64(stubs_.take_back[mode_.vectors]);
  return true;
}

/// Chains hold for one place of the page that they are in: where it comes to run at two, they all begin anew. Not
/// often: a page that keeps doing so has none.
void Translator::note_place(u64 rip, CodePage& page) {
  constexpr u32 most_moves = 8;
  const Gva place = rip & page_mask;
  if (page.moves == most_moves) return;
  if (page.seen_at == place && page.seen_in == era(true)) return;
  if (page.seen_at != place && page.seen_in == era(page.seen_in & 1)) {
    flush_jumps();
    if (++page.moves == most_moves) {
      page.seen_in = 0;
      return;
    }
  }
  page.seen_at = place;
  page.seen_in = era(is_global(rip));
}

void Translator::link_chain(Chain& chain, Gva from, u64 rip) {
  const u8* host = cpu_->mmu.find(from, 1, x86::Access::fetch, cpu_->fetch_privilege());
  const CodePage* page = host ? cache_.find_page(u64(host)) : nullptr;
  if (!page || page->seen_at != from || page->seen_in != era(page->seen_in & 1)) return;
  const bool global = page->seen_in & 1 && is_global(rip);
  if (chains_used_count_[global] == std::size(chains_used_[global])) unlink_chains(global);
  chains_used_[global][chains_used_count_[global]++] = {&chain, rip & page_mask};
  chain.code = context_->enter_at;
}

void Translator::note_jump(u64 rip, CodePage& page, const Block& block) {
  note_place(rip, page);
  const unsigned slot = jump_slot(rip);
  Jump& jump = context_->jumps[mode_.number()][slot];
  jump.minus_rip = -rip;
  jump.code = u64(block.code);
  jump.page_base = rip & page_mask;
  jump_pages_[jump_page_bit(rip) / 64] |= 1ull << jump_page_bit(rip) % 64;
  const bool global = is_global(rip);
  jump_modes_ |= 1u << mode_.number();
  if (jump.never_minus_rip & Jump::listed(global)) return;
  jump.never_minus_rip |= Jump::listed(global);
  jumps_used_[global][jumps_used_count_[global]++] = mode_.number() * jump_entries + slot;
}

bool Translator::verify(CodePage& page) {
  if (page.verified == epoch_) return true;
  if (!SharedCode::is_watched(page.address) || !cache_.is_unchanged(page)) return false;
  page.verified = epoch_;
  return true;
}

/// The run loop decides wherever anything is to be looked at first.
bool Translator::find(u64 rip) {
  if (context_->attention->load(std::memory_order_relaxed) || cpu_->mmu.flush_count() != flushes_seen_ ||
      !shared_.is_quiet())
    return false;
  const u8* host = cpu_->mmu.find(rip, 1, x86::Access::fetch, cpu_->fetch_privilege());
  if (!host) return false;
  CodePage* page = cache_.find_page(u64(host) & page_mask);
  if (!page || !page->first_block) return false;
  if (!verify(*page)) return false;
  const Block* block = cache_.find(u64(host), mode_.number());
  if (!block) return false;
  note_jump(rip, *page, *block);
  aim_link(*block);
  context_->enter_at = u64(block->code);
  context_->page_base = rip & page_mask;
  return true;
}

void Translator::aim_link(const Block& block) {
  const u64 site = context_->link_site;
  context_->link_site = 0;
  if (!site) return;
  const s32 distance = s32(block.code - (reinterpret_cast<u8*>(site) + sizeof distance));
  std::memcpy(reinterpret_cast<void*>(site), &distance, sizeof distance);
}

/// Copied by hand: memcpy() may use vector registers.
bool Translator::load_x87() {
  if (!x87_allowed()) return false;
  if (!context_->x87_missing) return true;
  auto& image = context_->x87_image;
  const void* from = cpu_->state.fpu.x87;
  void* to = image.legacy;
  std::size_t words = x86::xmm_offset / 8;
  __asm__ volatile("rep movsq" : "+S"(from), "+D"(to), "+c"(words)::"memory");
  image.xstate_bv = x86::xfeature::x87;
  __asm__ volatile("xrstor64 %0" ::"m"(image), "a"(u32(x86::xfeature::x87)), "d"(0));
  context_->x87_missing = 0;
  context_->x87_last = context_->x87_settled = context_->x87_operand_segment = 0;
  context_->x87_page = context_->page_base;
  x87_used_ = true;
  return true;
}

bool Translator::fill(Gva address, unsigned size, u32 request) {
  using x86::Access;
  const bool write = FillRequest::write(request);
  const x86::Privilege privilege = FillRequest::privilege(request);
  if (mode_.privilege != privilege || (mode_.narrow && address >> 32)) return false;
  const u8* host = cpu_->mmu.find(address, size, write ? Access::write : Access::read, privilege);
  if (!host) return false;
  const unsigned slot = address >> 12 & (tlb_entries - 1);
  TlbEntry& entry = context_->tlb[unsigned(privilege)][slot];
  const u64 minus_page = -(address & page_mask), host_page = u64(host) & page_mask;
  if (entry.host != host_page || (entry.minus_read != minus_page && entry.minus_write != minus_page)) {
    entry.minus_read = entry.minus_write = minus_other_page(slot);
    entry.host = host_page;
    entry.addend = host_page + minus_page;
    TlbUse& used = tlb_used_[cpu_->mmu.is_global(address, privilege)];
    if (used.count < std::size(used.entries)) used.entries[used.count] = u16(unsigned(privilege) * tlb_entries + slot);
    ++used.count;
  }
  (write ? entry.minus_write : entry.minus_read) = minus_page;
  return true;
}

}  // namespace anykvm::engine::translate
