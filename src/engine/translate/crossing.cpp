// Instructions that begin on one page and end on the next.
//
// A block depends on the bytes of its own page only, and may run wherever that page is mapped; what lies behind it
// there is not known when the block is made. So such an instruction is a step at first. When it has been executed and
// the code behind it has a block, it is translated, too: as a block that first looks whether the jump cache leads from
// the guest address behind the instruction to that very block. If it does, then the next page is the one whose bytes
// the instruction was made from, may be executed, and has not changed: the block behind the instruction begins in the
// 64 bytes that the instruction ends in, and would be gone.
#include <cstring>

#include "engine/translate/translation.h"
#include "engine/translate/translator.h"

namespace anykvm::engine::translate {

using x86::rcx;

namespace {
constexpr unsigned longest_instruction = 15;
/// Two address spaces that have different pages behind the same one would have it translated again and again.
constexpr u8 most_generations = 8;
}  // namespace

void Translation::emit_crossing_guard() {
  const u32 jumps = u32(offsetof(Context, jumps) + request_.mode.number() * sizeof(Context::jumps[0]));
  const auto unless_rcx_zero = [&] {
    u8* const as_expected = a_.jump_if_rcx_zero_later();
    add_cold({.kind = Cold::Kind::crossing, .restores_rcx = true, .site = a_.jump_later()});
    a_.aim_short(as_expected);
  };
  static_assert(behind_in_guard == 2);
  a_.move_immediate64(address_scratch, -reinterpret_cast<u64>(request_.behind));
  a_.store(offsetof(Context, target), address_scratch);
  a_.store(offsetof(Context, temporary), rcx);
  to_page_offset(address_scratch, guests_[0].next);
  a_.extract_bits(index_scratch, address_scratch, offsetof(Context, jump_index_bits));
  static_assert(sizeof(Jump) == 4 * 8);
  a_.rotate_right(index_scratch, index_scratch, 64 - 2);
  a_.load(rcx, jumps + u32(offsetof(Jump, minus_rip)), index_scratch, 3);
  a_.lea(rcx, rcx, address_scratch, 0, 0);
  unless_rcx_zero();
  a_.load(rcx, jumps + u32(offsetof(Jump, code)), index_scratch, 3);
  a_.load(address_scratch, offsetof(Context, target));
  a_.lea(rcx, rcx, address_scratch, 0, 0);
  unless_rcx_zero();
  a_.load(rcx, offsetof(Context, temporary));
}

void Translation::emit_crossing_end() {
  if (request_.supervised) {
    link(falls_to_, exit_flags_live_, 0);
    return;
  }
  to_page_offset(address_scratch, page_size);
  a_.store(offsetof(Context, page_base), address_scratch);
  a_.jump(request_.behind);
}

void Translator::translate_crossing(u64 rip) {
  const unsigned offset = unsigned(rip & ~page_mask), first = unsigned(page_size) - offset;
  if (first >= longest_instruction || cpu_->exit.kind != x86::ExitKind::none || code_dropped_ || !translatable() ||
      cpu_->data_privilege != mode_.privilege || cpu_->mmu.flush_count() != flushes_seen_)
    return;
  if (mode_.narrow && (rip + longest_instruction) >> 32) return;
  const u8* const host = cpu_->mmu.find(rip, 1, x86::Access::fetch, cpu_->fetch_privilege());
  const u8* const next_host = cpu_->mmu.find(rip + first, 1, x86::Access::fetch, cpu_->fetch_privilege());
  if (!host || !next_host) return;
  CodePage *page = cache_.find_page(u64(host) & page_mask), *next = cache_.find_page(u64(next_host));
  if (!page || !next || !page->first_block || !next->first_block) return;
  if (!verify(*next)) return;
  Block* const old = cache_.find(u64(host), block_mode(false));
  if (!old || old->generation == most_generations) return;
  if (!(next->lines & 1)) cache_.take_copy(*next, epoch_);
  u8 bytes[longest_instruction];
  std::memcpy(bytes, cache_.copy_of(*page) + offset, first);
  std::memcpy(bytes + first, cache_.copy_of(*next), sizeof bytes - first);
  Decoded d;
  if (!ZYAN_SUCCESS(decode_instruction(bytes, sizeof bytes, mode_.narrow ? 32 : 64, d)) ||
      d.instruction.length <= first)
    return;
  const u64 behind_at = u64(next_host) + d.instruction.length - first;
  const Block* behind = cache_.find(behind_at, block_mode(false));
  // Behind an unconditional jump the code may never be gone to.
  if (!behind && d.instruction.meta.category == ZYDIS_CATEGORY_UNCOND_BR) behind = make_block(*next, behind_at, false);
  if (!behind || !find(rip + d.instruction.length)) return;
  u64 known;
  std::memcpy(&known, old->code + behind_in_guard, sizeof known);
  if (old->generation && known == -reinterpret_cast<u64>(behind->code)) return;  // it was the jump cache that missed
  Block* const made = make_block(*page, u64(host), true, cache_.copy_of(*next), behind->code);
  if (!made) return;
  made->generation = u8(old->generation + 1);
  cache_.supersede(*old);
  Assembler patch(old->code, old->code + old->code_bytes);
  patch.jump(made->code);
}

}  // namespace anykvm::engine::translate
