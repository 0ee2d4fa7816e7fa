#include "engine/translate/code_cache.h"

#include <sys/mman.h>
#include <x86intrin.h>

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
void forget(T* at, std::size_t count) {
  madvise(at, count * sizeof(T), MADV_DONTNEED);
}

u32 mix(u64 value) { return u32((value * 0x9e3779b97f4a7c15) >> 40); }

}  // namespace

CodeCache::CodeCache()
    : code_(map<u8>(code_bytes, PROT_READ | PROT_WRITE | PROT_EXEC)),
      blocks_(map<Block>(max_blocks)),
      block_index_(map<u32>(block_slots)),
      pages_(map<CodePage>(max_pages)),
      copies_(map<u8>(max_pages * page_size)),
      page_index_(map<u32>(page_slots)) {}

CodeCache::~CodeCache() {
  munmap(code_, code_bytes);
  munmap(blocks_, max_blocks * sizeof(Block));
  munmap(block_index_, block_slots * sizeof(u32));
  munmap(pages_, max_pages * sizeof(CodePage));
  munmap(copies_, max_pages * page_size);
  munmap(page_index_, page_slots * sizeof(u32));
}

u32 CodeCache::block_slot(u64 address, unsigned mode) { return mix(address * 8 + mode) % block_slots; }

Block* CodeCache::find(u64 address, unsigned mode) {
  for (u32 slot = block_slot(address, mode); block_index_[slot]; slot = (slot + 1) % block_slots) {
    if (block_index_[slot] == removed) continue;
    Block& block = blocks_[block_index_[slot]];
    if (block.address == address && block.mode == mode) return &block;
  }
  return nullptr;
}

CodePage* CodeCache::find_page(u64 address) {
  for (u32 slot = mix(address) % page_slots; page_index_[slot]; slot = (slot + 1) % page_slots)
    if (pages_[page_index_[slot]].address == address) return &pages_[page_index_[slot]];
  return nullptr;
}

CodePage* CodeCache::page_for(u64 address) {
  u32 slot = mix(address) % page_slots;
  for (; page_index_[slot]; slot = (slot + 1) % page_slots)
    if (pages_[page_index_[slot]].address == address) return &pages_[page_index_[slot]];
  if (page_count_ == max_pages) return nullptr;
  page_index_[slot] = page_count_;
  CodePage& page = pages_[page_count_++];
  page = {.address = address};
  return &page;
}

void CodeCache::take_copy(CodePage& page) {
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

Block* CodeCache::add(CodePage& page, u64 address, unsigned mode, std::size_t used, u32 code_bytes, u32 instructions,
                      u64 lines) {
  if (block_count_ == max_blocks) return nullptr;
  u32 slot = block_slot(address, mode);
  while (block_index_[slot] && block_index_[slot] != removed) slot = (slot + 1) % block_slots;
  block_index_[slot] = block_count_;
  Block& block = blocks_[block_count_];
  block = {.address = address,
           .code = free_code(),
           .next_in_page = page.first_block,
           .code_bytes = code_bytes,
           .instructions = u16(instructions),
           .mode = u8(mode)};
  page.first_block = block_count_++;
  page.lines |= lines;
  code_used_ += aligned(used);
  return &block;
}

const Block* CodeCache::block_with(const u8* host) const {
  // Numbers and code addresses grow together.
  u32 first = 1, behind = block_count_;
  while (first < behind) {
    const u32 middle = (first + behind) / 2;
    if (blocks_[middle].code <= host)
      first = middle + 1;
    else
      behind = middle;
  }
  if (first == 1) return nullptr;
  const Block& block = blocks_[first - 1];
  return host < block.code + block.code_bytes ? &block : nullptr;
}

int CodeCache::instruction_at(const Block& block, const u8* host) {
  const u8* places = block.code + block.code_bytes;
  int found = -1;
  for (u32 n = 0; n < block.instructions; ++n) {
    PlaceInBlock place;
    std::memcpy(&place, places + n * sizeof place, sizeof place);
    if (block.code + place.code > host) break;
    found = place.offset;
  }
  return found;
}

void CodeCache::supersede(const Block& block) {
  const u32 number = u32(&block - blocks_);
  for (u32 slot = block_slot(block.address, block.mode); block_index_[slot]; slot = (slot + 1) % block_slots)
    if (block_index_[slot] == number) {
      block_index_[slot] = removed;
      break;
    }
}

void CodeCache::drop(CodePage& page) {
  for (u32 number = page.first_block; number; number = blocks_[number].next_in_page) supersede(blocks_[number]);
  page.first_block = 0;
  page.lines = 0;
  const u64 now = __rdtsc();
  if (now - page.since > rewrites_window) {
    page.since = now;
    page.rewritten = 0;
  }
  ++page.rewritten;
}

bool CodeCache::is_too_lively(const CodePage& page) const {
  return !patient_ && page.rewritten > most_rewrites && __rdtsc() - page.since <= rewrites_window;
}

void CodeCache::clear() {
  forget(blocks_, max_blocks);
  forget(block_index_, block_slots);
  forget(pages_, max_pages);
  forget(copies_, max_pages * page_size);
  forget(page_index_, page_slots);
  code_used_ = code_kept_;
  block_count_ = page_count_ = 1;
}

}  // namespace anykvm::engine::translate
