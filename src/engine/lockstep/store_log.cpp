#include "engine/lockstep/store_log.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace anykvm::engine::lockstep {

namespace {

void* map(std::size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return at;
}

}  // namespace

StoreLog::StoreLog(u32 instructions)
    : most_stores_(instructions * 80),
      most_bytes_(instructions * u32(page_size)),
      stores_(static_cast<Store*>(map(most_stores_ * sizeof(Store)))),
      before_(static_cast<u8*>(map(most_bytes_))),
      after_(static_cast<u8*>(map(most_bytes_))) {}

StoreLog::~StoreLog() {
  munmap(stores_, most_stores_ * sizeof(Store));
  munmap(before_, most_bytes_);
  munmap(after_, most_bytes_);
}

void StoreLog::note(u8* host, u32 size, Gva gva) {
  if (count_ == most_stores_ || most_bytes_ - bytes_ < size) __builtin_trap();  // the constructor was told too little
  stores_[count_++] = {host, gva, size, bytes_};
  std::memcpy(before_ + bytes_, host, size);
  bytes_ += size;
}

void StoreLog::take_back() {
  for (u32 n = 0; n < count_; ++n) std::memcpy(after_ + stores_[n].at, stores_[n].host, stores_[n].size);
  put_back();
}

void StoreLog::put_back() const {
  for (u32 n = count_; n-- > 0;) std::memcpy(stores_[n].host, before_ + stores_[n].at, stores_[n].size);
}

void StoreLog::store_again() const {
  for (u32 n = 0; n < count_; ++n) std::memcpy(stores_[n].host, after_ + stores_[n].at, stores_[n].size);
}

PageCopies::PageCopies() : copies_(static_cast<u8*>(map(std::size_t(most_pages) * page_size))) {}
PageCopies::~PageCopies() { munmap(copies_, std::size_t(most_pages) * page_size); }

void PageCopies::clear() {
  for (u32 n = 0; n < count_; ++n) {
    u32 at = slot(pages_[n]);
    while (index_[at]) {
      index_[at] = 0;
      at = (at + 1) % slots;
    }
  }
  count_ = 0;
}

u8* PageCopies::find(const u8* host) {
  const auto page = reinterpret_cast<const u8*>(u64(host) & page_mask);
  for (u32 at = slot(page); index_[at]; at = (at + 1) % slots)
    if (pages_[index_[at] - 1] == page) return copy(index_[at] - 1u);
  return nullptr;
}

void PageCopies::take(u8* page) {
  if (find(page) || count_ == most_pages) return;
  u32 at = slot(page);
  while (index_[at]) at = (at + 1) % slots;
  std::memcpy(copy(count_), page, page_size);
  pages_[count_++] = page;
  index_[at] = u16(count_);
}

}  // namespace anykvm::engine::lockstep
