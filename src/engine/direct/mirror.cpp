#include "engine/direct/mirror.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "engine/translate/shared_code.h"

namespace anykvm::engine::direct {

using x86::Access;
using x86::Privilege;

namespace {

constexpr u64 lowest = 0x10000, end_of_user = 0x7ffffffff000;
constexpr u64 rights_bits = 15;
/// Pages that are mapped with the one that was asked for, as far as the guest has used them before.
constexpr u64 around = 16;
constexpr u64 large_page_pages = 512;

}  // namespace

Mirror::Mirror()
    : memory_(os::Mapping::lazy(slots * (sizeof(Page) + sizeof(u32)))),
      table_(static_cast<Page*>(memory_.data())),
      used_(reinterpret_cast<u32*>(table_ + slots)) {
  if (!table_) throw std::bad_alloc();
}

void Mirror::clear() {
  if (count_) madvise(table_, slots * sizeof(Page), MADV_DONTNEED);
  count_ = calls_ = copied_count_ = 0;
}

void Mirror::begin(HostProcess& process, const GuestRam& ram, CodePages& code, bool hides_xsave) {
  process_ = &process;
  ram_ = &ram;
  code_ = &code;
  hides_xsave_ = hides_xsave;
  clear();
}

void Mirror::forget_all() {
  process_->unmap(lowest, area_address - lowest);
  process_->unmap(area_address + STUB_AREA_SIZE, end_of_user - area_address - STUB_AREA_SIZE);
  clear();
}

/// The page's own, or a free one.
Mirror::Page& Mirror::slot_of(Gva page) const {
  u32 slot = u32((page >> 12) * 0x9e3779b97f4a7c15 >> 40) % slots;
  while (table_[slot].guest && (table_[slot].guest & page_mask) != page) slot = (slot + 1) % slots;
  return table_[slot];
}

void Mirror::put(Gva page, const u8* host, Rights rights) {
  Page& slot = slot_of(page);
  if (!slot.guest) used_[count_++] = u32(&slot - table_);
  slot = {page | rights, u64(host)};
}

void Mirror::map_run(Gva begin, u64 pages, const u8* host, Rights rights) {
  const os::SharedMapping* part = ram_->part_of(host);
  const int protection = PROT_READ | (rights & writable ? PROT_WRITE : 0) | (rights & executable ? PROT_EXEC : 0);
  process_->map(begin, pages * page_size, protection, part->fd, part->offset + u64(host - part->begin));
  ++calls_;
  for (u64 n = 0; n < pages; ++n) put(begin + n * page_size, host + n * page_size, rights);
}

int Mirror::judge(x86::Cpu& cpu, const u8* host, Gva page, const KnownCode& known) {
  return code_->judge(host, page, known, hides_xsave_, [&cpu](Gva other) -> const u8* {
    x86::PageWalk walk;
    return x86::canonical(other) && x86::probe_page(cpu, other, walk) ? cpu.machine.page(walk.page, false).host
                                                                      : nullptr;
  });
}

/// A page of code, as a copy that may run.
void Mirror::map_copy(Gva page, const u8* host, int copy) {
  process_->map(page, page_size, PROT_READ | PROT_EXEC, code_->fd(), u64(copy) * page_size);
  ++calls_;
  put(page, host, Rights(readable | executable | copied));
  copied_[copied_count_++] = {page, copy};
}

/// It has not the copy of the page any more.
void Mirror::drop_copy(Gva page) {
  for (unsigned n = 0; n < copied_count_; ++n)
    if (copied_[n].page == page) copied_[n--] = copied_[--copied_count_];
}

void Mirror::drop(Page& page) {
  if (page.guest & copied) drop_copy(page.guest & page_mask);
  page.guest &= page_mask;
}

/// What the page may have without anything to be noted in the guest's tables, or told to anybody.
Mirror::Rights Mirror::rights_of(x86::Cpu& cpu, const x86::PageWalk& walk, const x86::HostPage& page) const {
  if (!page.host || !walk.user || !walk.accessed || !ram_->part_of(page.host)) return none;
  const bool stores = walk.writable && walk.dirty && page.writable &&
                      !translate::SharedCode::is_watched(u64(page.host)) && cpu.code_watch.written;
  return Rights(readable | (stores ? writable : 0));
}

Mirror::Fault Mirror::resolve(x86::Cpu& cpu, Gva address, Access access, const KnownCode& known) {
  const Gva page = address & page_mask;
  if (page < lowest || page >= end_of_user || HostProcess::is_in_area(page)) return Fault::guests;
  x86::Mmu::Translation where;
  if (cpu.mmu.translate(cpu, address, access, Privilege::user, where) != x86::Result::ok || !where.host)
    return Fault::guests;
  auto* const host = reinterpret_cast<const u8*>(u64(where.host) & page_mask);
  if (!ram_->part_of(host)) return Fault::guests;
  const int how = access == Access::fetch ? judge(cpu, host, page, known) : CodePages::as_it_is;
  if (how == CodePages::unwanted || (how >= 0 && copied_count_ == std::size(copied_))) return Fault::unwanted;
  const Rights wanted = Rights(readable | (access == Access::write   ? writable
                                           : access == Access::fetch ? executable
                                                                     : 0));
  const Page before = slot_of(page);
  const auto had = Rights(before.guest && before.host == u64(host) ? before.guest & rights_bits : 0);
  if ((had & wanted) == wanted) return Fault::guests;  // it is not for want of a mapping
  if (had & copied) drop_copy(page);                   // it is going to have the page itself
  if (count_ > most_pages || calls_ > most_calls) forget_all();

  if (how >= 0) return map_copy(page, host, how), Fault::mapped;
  x86::PageWalk walk;
  if (access == Access::read && x86::probe_page(cpu, page, walk)) {
    const x86::HostPage whole = cpu.machine.page(walk.page, false);
    const Rights more = rights_of(cpu, walk, whole);
    if (whole.host == host && more & writable) {
      cpu.code_watch.written(cpu.code_watch.engine, host);
      map_run(page, 1, host, more);
      return map_around(cpu, page, walk.large), Fault::mapped;
    }
  }
  map_run(page, 1, host, wanted);
  map_around(cpu, page, access == Access::write && x86::probe_page(cpu, page, walk) && walk.large);
  return Fault::mapped;
}

/// Pages near one that has just been mapped, which get the same rights if they can have them.
void Mirror::map_around(x86::Cpu& cpu, Gva page, bool large) {
  const auto like = Rights(slot_of(page).guest & rights_bits);
  const u64 pages = large ? large_page_pages : around;
  const Gva begin = page & ~(pages * page_size - 1);
  Gva run = 0;
  u64 run_pages = 0;
  const u8* run_host = nullptr;
  const auto end_run = [&] {
    if (run_pages) map_run(run, run_pages, run_host, like);
    run_pages = 0;
  };
  for (Gva at = begin; at < begin + pages * page_size; at += page_size) {
    const Page known = slot_of(at);
    x86::PageWalk walk;
    const u8* host = nullptr;
    if (at >= lowest && !(known.guest & rights_bits) && !HostProcess::is_in_area(at) &&
        x86::probe_page(cpu, at, walk)) {
      const x86::HostPage there = cpu.machine.page(walk.page, false);
      const Rights rights = rights_of(cpu, walk, there);
      const bool suits = like & executable ? rights && walk.executable && !walk.writable &&
                                                 !find_suspects(there.host, hides_xsave_, nullptr, 0)
                         : like & writable ? (rights & writable) != 0
                                           : rights == readable && !walk.executable;
      if (suits) host = there.host;
    }
    if (run_pages && (host != run_host + run_pages * page_size || ram_->part_of(host) != ram_->part_of(run_host)))
      end_run();
    if (!host) continue;
    if (like & writable) cpu.code_watch.written(cpu.code_watch.engine, host);
    if (!run_pages++) run = at, run_host = host;
  }
  end_run();
}

/// Whether the guest's tables still have the page as it is mapped.
bool Mirror::check(x86::Cpu& cpu, Page& page) {
  x86::PageWalk walk;
  const auto had = Rights(page.guest & rights_bits);
  if (!x86::probe_page(cpu, page.guest & page_mask, walk)) return false;
  const x86::HostPage now = cpu.machine.page(walk.page, false);
  const Rights rights = rights_of(cpu, walk, now);
  if (u64(now.host) != page.host || !rights) return false;
  if (had & writable && !(rights & writable)) return false;
  return !(had & executable) ||
         (walk.executable && (had & copied || !find_suspects(now.host, hides_xsave_, nullptr, 0)));
}

void Mirror::forbid_stores(u64 host) {
  for (u32 n = 0; n < count_; ++n) {
    Page& page = table_[used_[n]];
    if ((page.host ^ host) & translate::SharedCode::address_bits || !(page.guest & writable)) continue;
    process_->unmap(page.guest & page_mask, page_size);
    drop(page);
  }
}

bool Mirror::follow_changes(x86::Cpu& cpu) {
  for (unsigned n = 0; n < copied_count_; ++n) {
    if (code_->is_current(copied_[n].copy)) continue;
    const Gva page = copied_[n].page;
    process_->unmap(page, page_size);
    drop(slot_of(page));
    n = -1u;
  }
  const u64 now = cpu.mmu.flush_count();
  if (now == flushes_seen_) return true;
  Gva flushed[x86::Mmu::most_pages_told];
  const int count = cpu.mmu.pages_flushed_since(std::exchange(flushes_seen_, now), flushed);
  constexpr unsigned most_wrong = 256;
  unsigned looked_at = 0, wrong = 0;
  const auto look_at = [&](Page& page) {
    if (!(page.guest & rights_bits)) return;
    ++looked_at;
    if (check(cpu, page)) return;
    drop(page);
    if (++wrong <= most_wrong) process_->unmap(page.guest, page_size);
  };
  if (count >= 0) {
    for (int n = 0; n < count; ++n)
      if (Page& page = slot_of(flushed[n]); page.guest) look_at(page);
  } else {
    for (u32 n = 0; n < count_ && wrong <= most_wrong; ++n) look_at(table_[used_[n]]);
  }
  if (wrong > most_wrong) forget_all();
  constexpr unsigned enough_to_tell = 32;
  return looked_at < enough_to_tell || wrong * 2 < looked_at;
}

}  // namespace anykvm::engine::direct
