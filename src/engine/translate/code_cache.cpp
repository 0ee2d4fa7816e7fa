#include "engine/translate/code_cache.h"

#include <sys/mman.h>
#include <x86intrin.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace anykvm::engine::translate {

namespace {

template <class T>
T* map(std::size_t count, int protection = PROT_READ | PROT_WRITE) {
  void* at = mmap(nullptr, count * sizeof(T), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(at);
}
template <class T>
void give_back(T* at, std::size_t count) {
  madvise(at, count * sizeof(T), MADV_DONTNEED);
}

constexpr u8 place_escape = 0xff;

u32 mix(u64 value) { return u32((value * 0x9e3779b97f4a7c15) >> 40); }
u32 tag_of(u64 address, unsigned mode) { return u32(address * 32 + mode); }

}  // namespace

static_assert(CodeCache::segment_bytes + CodeCache::blocks_in_segment * (sizeof(Block) + 3 * sizeof(u64)) <=
              CodeCache::segment_units * CodeMemory::unit_bytes);
static_assert(CodeCache::pages_at_once * (page_size + sizeof(CodePage) + 2 * sizeof(u32)) <=
              CodeCache::pages_units * CodeMemory::unit_bytes);

CodeCache::CodeCache(CodeMemory& memory)
    : memory_(memory),
      most_segments_(memory.units() / segment_units),
      max_blocks_(most_segments_ * blocks_in_segment),
      most_copies_(memory.units() / pages_units),
      max_pages_(most_copies_ * pages_at_once),
      code_(map<u8>(most_segments_ * segment_bytes, PROT_READ | PROT_WRITE | PROT_EXEC)),
      blocks_(map<Block>(max_blocks_)),
      block_index_(map<IndexEntry>(slots_for(most_segments_))),
      pages_(map<CodePage>(max_pages_)),
      copies_(map<u8>(max_pages_ * page_size)),
      page_index_(map<u32>(std::bit_ceil(2 * max_pages_))),
      page_slots_(std::bit_ceil(2 * max_pages_)),
      ages_(most_segments_),
      blocks_used_(most_segments_) {
  memory_.join();
  (void)memory_.take(0, units());
  ages_[0] = age_;
  blocks_used_[0] = 1;
  widen_index();
}

CodeCache::~CodeCache() {
  memory_.leave(units());
  munmap(code_, most_segments_ * segment_bytes);
  munmap(blocks_, max_blocks_ * sizeof(Block));
  munmap(block_index_, slots_for(most_segments_) * sizeof(IndexEntry));
  munmap(pages_, max_pages_ * sizeof(CodePage));
  munmap(copies_, max_pages_ * page_size);
  munmap(page_index_, page_slots_ * sizeof(u32));
}

/// Neighbours share a line of the host's cache: who looks for one block looks for those around it, too.
u32 CodeCache::block_slot(u64 address, unsigned mode) const {
  return (mix((address >> 8) * 32 + mode) * 8 + (address >> 5 & 7)) & (block_slots_ - 1);
}

Block* CodeCache::find(u64 address, unsigned mode) {
  const u32 tag = tag_of(address, mode);
  for (u32 slot = block_slot(address, mode); block_index_[slot].number; slot = next_slot(slot)) {
    if (block_index_[slot].tag != tag) continue;
    Block& block = blocks_[block_index_[slot].number];
    if (block.address == address && block.mode == mode) return &block;
  }
  return nullptr;
}

void CodeCache::index(u32 number) {
  const Block& block = blocks_[number];
  u32 slot = block_slot(block.address, block.mode);
  while (block_index_[slot].number) slot = next_slot(slot);
  block_index_[slot] = {tag_of(block.address, block.mode), number};
}

void CodeCache::widen_index() {
  const u32 wanted = slots_for(held_);
  if (wanted <= block_slots_) return;
  translate::give_back(block_index_, block_slots_);
  block_slots_ = wanted;
  for (u32 segment = 0; segment < most_segments_; ++segment)
    for (u32 n = !segment; n < blocks_used_[segment]; ++n) {
      const u32 number = segment * blocks_in_segment + n;
      if (blocks_[number].address && !blocks_[number].superseded) index(number);
    }
}

CodePage* CodeCache::find_page(u64 address) {
  for (u32 slot = mix(address) & (page_slots_ - 1); page_index_[slot]; slot = (slot + 1) & (page_slots_ - 1))
    if (pages_[page_index_[slot]].address == address) return &pages_[page_index_[slot]];
  return nullptr;
}

CodePage* CodeCache::page_for(u64 address) {
  if (CodePage* page = find_page(address)) return page;
  u32 number = 0;
  for (unsigned attempt = 0; !number; ++attempt) {
    if (free_pages_) {
      number = free_pages_;
      free_pages_ = pages_[number].first_block;
    } else if (page_count_ < copied_ * pages_at_once) {
      number = page_count_++;
    } else if (attempt == 0) {
      free_unused_pages();
    } else if (copied_ < most_copies_ && memory_.take(units(), pages_units)) {
      ++copied_;
    } else {
      return nullptr;
    }
  }
  u32 slot = mix(address) & (page_slots_ - 1);
  while (page_index_[slot]) slot = (slot + 1) & (page_slots_ - 1);
  page_index_[slot] = number;
  pages_[number] = {.address = address};
  return &pages_[number];
}

/// Of one that has no blocks.
void CodeCache::free_page(u32 number) {
  CodePage& page = pages_[number];
  u32 hole = mix(page.address) & (page_slots_ - 1);
  while (page_index_[hole] != number) hole = (hole + 1) & (page_slots_ - 1);
  for (u32 slot = (hole + 1) & (page_slots_ - 1); page_index_[slot]; slot = (slot + 1) & (page_slots_ - 1)) {
    const u32 distance = (slot - mix(pages_[page_index_[slot]].address)) & (page_slots_ - 1);
    if (distance < ((slot - hole) & (page_slots_ - 1))) continue;
    page_index_[hole] = page_index_[slot];
    hole = slot;
  }
  page_index_[hole] = 0;
  page = {.first_block = free_pages_};
  free_pages_ = number;
}

/// Whose blocks were dropped and not made again.
void CodeCache::free_unused_pages() {
  for (u32 number = 1; number < page_count_; ++number) {
    CodePage& page = pages_[number];
    if (page.address && !page.first_block && !is_lively(page)) free_page(number);
  }
}

void CodeCache::take_copy(CodePage& page, u64 epoch) {
  // Nobody writes to a page that has blocks and keeps them.
  if (page.first_block && page.copied == epoch) return;
  page.copied = epoch;
  u8* const copy = copies_ + (&page - pages_) * page_size;
  for (unsigned line = 0; line < page_size / line_bytes; ++line)
    if (!(page.lines >> line & 1))
      std::memcpy(copy + line * line_bytes, reinterpret_cast<const u8*>(page.address) + line * line_bytes, line_bytes);
}

bool CodeCache::is_unchanged(const CodePage& page) const {
  const auto now = reinterpret_cast<const volatile u64*>(page.address);
  const auto then = reinterpret_cast<const u64*>(copy_of(page));
  for (u64 lines = page.lines; lines; lines &= lines - 1) {
    const unsigned first = unsigned(__builtin_ctzll(lines)) * line_bytes / 8;
    u64 differences = 0;
    for (unsigned n = first; n < first + line_bytes / 8; ++n) differences |= now[n] ^ then[n];
    if (differences) return false;
  }
  return true;
}

Block* CodeCache::add(CodePage& page, u64 address, unsigned mode, CodeRoom used, u32 code_bytes, const u8* places,
                      u32 instructions, u64 lines) {
  if (blocks_used_[segment_] == blocks_in_segment) return nullptr;
  const u32 number = segment_ * blocks_in_segment + blocks_used_[segment_];
  Block& block = blocks_[number];
  block = {.address = address,
           .code = room().hot,
           .next_in_page = page.first_block,
           .code_bytes = code_bytes,
           .places = places,
           .instructions = u16(instructions),
           .mode = u8(mode)};
  index(number);
  ++blocks_used_[segment_];
  page.first_block = number;
  page.lines |= lines;
  hot_used_ = aligned(std::size_t(used.hot - hot_of(segment_)));
  cold_used_ = aligned(std::size_t(used.cold - cold_of(segment_)));
  return &block;
}

const Block* CodeCache::block_with(const u8* host) const {
  // Numbers and code addresses of a segment grow together.
  const u32 segment = u32(std::size_t(host - code_) / segment_bytes), none = segment * blocks_in_segment + !segment;
  u32 first = none, behind = segment * blocks_in_segment + blocks_used_[segment];
  while (first < behind) {
    const u32 middle = (first + behind) / 2;
    if (blocks_[middle].code <= host)
      first = middle + 1;
    else
      behind = middle;
  }
  if (first == none) return nullptr;
  const Block& block = blocks_[first - 1];
  return host < block.code + block.code_bytes ? &block : nullptr;
}

PlaceInBlock PlaceReader::next() {
  if (*at_ != place_escape) {
    last_.code = u16(last_.code + at_[0]);
    last_.offset = u16(last_.offset + at_[1]);
    at_ += 2;
  } else {
    std::memcpy(&last_.code, at_ + 1, 2);
    std::memcpy(&last_.offset, at_ + 3, 2);
    at_ += 5;
  }
  return last_;
}

void PlaceWriter::put(PlaceInBlock place) {
  const int code = place.code - last_.code, offset = place.offset - last_.offset;
  if (code >= 0 && code < place_escape && offset >= 0 && offset <= 0xff) {
    to_.word(u32(code | offset << 8));
  } else {
    to_.byte(place_escape);
    to_.word(place.code);
    to_.word(place.offset);
  }
  last_ = place;
}

int CodeCache::instruction_at(const Block& block, const u8* host) {
  int found = -1;
  PlaceReader places(block.places);
  for (u32 n = 0; n < block.instructions; ++n) {
    const PlaceInBlock place = places.next();
    if (block.code + place.code > host) break;
    found = place.offset;
  }
  return found;
}

void CodeCache::mark_instructions(const CodePage& page, u64 (&begins)[page_size / 64]) const {
  for_each_block(page, [&begins](const Block& block) {
    if (Mode::is_narrow(block.mode)) return;
    PlaceReader places(block.places);
    for (u32 n = 0; n < block.instructions; ++n) {
      const unsigned offset = places.next().offset;
      begins[offset / 64] |= 1ull << offset % 64;
    }
  });
}

/// Takes a block out of the index, if it is there, and moves those behind it up that would not be found any more.
void CodeCache::remove(u32 number) {
  u32 hole = block_slot(blocks_[number].address, blocks_[number].mode);
  while (block_index_[hole].number != number) {
    if (!block_index_[hole].number) return;
    hole = next_slot(hole);
  }
  for (u32 slot = next_slot(hole); block_index_[slot].number; slot = next_slot(slot)) {
    const Block& block = blocks_[block_index_[slot].number];
    const u32 wanted = block_slot(block.address, block.mode);
    if (((slot - wanted) & (block_slots_ - 1)) < ((slot - hole) & (block_slots_ - 1))) continue;
    block_index_[hole] = block_index_[slot];
    hole = slot;
  }
  block_index_[hole] = {};
}

void CodeCache::supersede(Block& block) {
  remove(u32(&block - blocks_));
  block.generation = 0;
  block.superseded = true;
}

void CodeCache::forget(CodePage& page) {
  for (u32 number = page.first_block; number; number = blocks_[number].next_in_page) {
    remove(number);
    blocks_[number].address = 0;
  }
  page.first_block = 0;
  page.lines = 0;
}

void CodeCache::drop(CodePage& page) {
  forget(page);
  const u64 now = __rdtsc();
  if (now - page.since > rewrites_window) {
    page.since = now;
    page.rewritten = page.stepped = 0;
  }
  ++page.rewritten;
}

bool CodeCache::is_lively(const CodePage& page) const {
  return !patient_ && page.rewritten > most_rewrites && __rdtsc() - page.since <= rewrites_window;
}

bool CodeCache::is_too_lively(CodePage& page) const {
  if (!is_lively(page)) return false;
  if (++page.stepped < most_steps) return true;
  page.rewritten = page.stepped = 0;
  return false;
}

void CodeCache::begin_segment(u32 segment) {
  segment_ = segment;
  ages_[segment] = ++age_;
  hot_used_ = segment ? 0 : kept_;
  cold_used_ = 0;
  blocks_used_[segment] = !segment;
}

u32 CodeCache::oldest(u32 first) const {
  u32 found = first;
  for (u32 segment = first; segment < most_segments_; ++segment)
    if (ages_[segment] && (!ages_[found] || ages_[segment] < ages_[found])) found = segment;
  return found;
}

void CodeCache::empty_segment(u32 segment) {
  const u32 first = segment * blocks_in_segment;
  for (u32 number = first + !segment; number < first + blocks_used_[segment]; ++number) {
    if (!blocks_[number].address) continue;
    CodePage& page = *find_page(blocks_[number].address & page_mask);
    forget(page);
    free_page(u32(&page - pages_));
  }
  blocks_used_[segment] = !segment;
  // Another block may come to lie where a forgotten one was that somebody knows.
  for (u32 number = 1; number < max_blocks_; ++number) {
    if (number % blocks_in_segment >= blocks_used_[number / blocks_in_segment]) {
      number += blocks_in_segment - 1 - number % blocks_in_segment;
      continue;
    }
    Block& block = blocks_[number];
    if (!block.generation || !block.address) continue;
    u64 minus_behind;
    std::memcpy(&minus_behind, block.code + behind_in_guard, sizeof minus_behind);
    const Block* behind = minus_behind ? block_with(reinterpret_cast<const u8*>(-minus_behind)) : nullptr;
    if (!behind || !behind->address) std::memset(block.code + behind_in_guard, 0, sizeof minus_behind);
  }
}

void CodeCache::evict() {
  if (held_ < most_segments_ && memory_.take(units(), segment_units)) {
    ++held_;
    widen_index();
    begin_segment(u32(std::find(ages_.begin(), ages_.end(), 0u) - ages_.begin()));
    return;
  }
  const u32 segment = oldest(0);
  empty_segment(segment);
  begin_segment(segment);
}

void CodeCache::give_back() {
  if (held_ == 1) return;
  // The first stays, which has the common stubs.
  const u32 segment = oldest(1);
  empty_segment(segment);
  ages_[segment] = 0;
  --held_;
  if (segment == segment_) {
    const u32 other = oldest(0);
    empty_segment(other);
    begin_segment(other);
  }
  translate::give_back(hot_of(segment), segment_bytes);
  translate::give_back(blocks_ + segment * blocks_in_segment, blocks_in_segment);
  memory_.give_back(segment_units);
}

void CodeCache::clear() {
  translate::give_back(code_ + segment_bytes, (most_segments_ - 1) * segment_bytes);
  translate::give_back(blocks_, max_blocks_);
  translate::give_back(block_index_, block_slots_);
  translate::give_back(pages_, max_pages_);
  translate::give_back(copies_, max_pages_ * page_size);
  translate::give_back(page_index_, page_slots_);
  std::fill(blocks_used_.begin(), blocks_used_.end(), 0);
  std::fill(ages_.begin(), ages_.end(), 0);
  memory_.give_back(units() - segment_units);
  held_ = 1;
  copied_ = 0;
  begin_segment(0);
  page_count_ = 1;
  free_pages_ = 0;
}

}  // namespace anykvm::engine::translate
