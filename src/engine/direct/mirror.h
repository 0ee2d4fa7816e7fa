// What one host process has mapped of one guest address space: the guest's page tables, as far as it was asked for, in
// the host's. Like a TLB it may have what the tables had since the last flush, and no more.
#pragma once

#include "engine/direct/code_pages.h"
#include "engine/direct/guest_ram.h"
#include "engine/direct/host_process.h"
#include "os/memory_file.h"
#include "x86/paging.h"

namespace anykvm::engine::direct {

class Mirror {
 public:
  Mirror();
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  /// The process has mapped nothing.
  void begin(HostProcess& process, const GuestRam& ram, CodePages& code, bool hides_xsave);

  enum class Fault : u8 {
    mapped,    ///< the access will succeed
    guests,    ///< for the reference engine: it faults, or leaves RAM
    unwanted,  ///< code that must not run natively
  };
  /// The process has met a page fault at an address.
  Fault resolve(x86::Cpu& cpu, Gva address, x86::Access access, const KnownCode& known);
  /// Takes away what flushes of the TLB, and stores to code, may have made wrong since the last call. false: that was
  /// most of it, as when the address space is another program's now.
  bool follow_changes(x86::Cpu& cpu);
  /// See Direct.
  void forbid_stores(u64 host);

 private:
  /// Rights of a page in the process; a page that is writable is not executable.
  enum Rights : u8 {
    none = 0,
    readable = 1,
    writable = 2,
    executable = 4,
    copied = 8,  ///< and it has a copy of the page (code_pages.h)
  };
  struct Page {
    u64 guest = 0;  ///< its address, Rights in the low bits; 0: free
    u64 host = 0;
  };
  static constexpr unsigned slots = 1u << 17, most_pages = slots / 2, most_calls = 20000;

  Page& slot_of(Gva page) const;
  void put(Gva page, const u8* host, Rights rights);
  void clear();
  void forget_all();
  bool check(x86::Cpu& cpu, Page& page);
  Rights rights_of(x86::Cpu& cpu, const x86::PageWalk& walk, const x86::HostPage& page) const;
  int judge(x86::Cpu& cpu, const u8* host, Gva page, const KnownCode& known);
  void map_copy(Gva page, const u8* host, int copy);
  void drop(Page& page);
  void drop_copy(Gva page);
  void map_around(x86::Cpu& cpu, Gva page, bool large);
  void map_run(Gva begin, u64 pages, const u8* host, Rights rights);

  HostProcess* process_ = nullptr;
  const GuestRam* ram_ = nullptr;
  CodePages* code_ = nullptr;
  const os::Mapping memory_;
  Page* const table_;  ///< [slots], open addressing
  u32* const used_;    ///< [count_]: which slots are not free
  u32 count_ = 0, calls_ = 0;
  u64 flushes_seen_ = 0;
  /// Pages of which it has a copy.
  struct Copied {
    Gva page;
    int copy;
  };
  Copied copied_[64];
  unsigned copied_count_ = 0;
  bool hides_xsave_ = false;
};

}  // namespace anykvm::engine::direct
