// Pages of user code that have bytes of instructions which must not run natively (page_scan.h).
//
// Where such bytes are certain to be that instruction, a copy of the page runs that has UD2 in its place: the process
// stops there, and the reference engine executes it. Where they are certain to be in the middle of another, they stay
// in it. Certain is what the translator has met as an instruction, and what follows from there; the rest of the page's
// code stays translated until it is.
#pragma once

#include <functional>
#include <span>

#include "engine/direct/page_scan.h"
#include "os/memory_file.h"

namespace anykvm::engine::direct {

/// What the translator knows of a page of code: the offsets at which instructions begin, one bit each. Returns false
/// when it does not watch for changes of the page.
struct KnownCode {
  bool (*instructions)(void* arg, const u8* host, u64 (&begins)[64]);
  void* arg;
};

class CodePages {
 public:
  static constexpr unsigned most_copies = 512;

  CodePages() = default;
  ~CodePages();
  CodePages(const CodePages&) = delete;
  CodePages& operator=(const CodePages&) = delete;

  /// Forgets all; false: no memory.
  bool begin();
  /// Has the copies, one behind the other.
  int fd() const { return fd_; }

  static constexpr int as_it_is = -1, unwanted = -2;
  /// How the page at a guest address may run: as_it_is, unwanted, or the number of a copy.
  /// host_of: where another page of the same address space lies; nullptr: nobody knows.
  int judge(const u8* host, Gva page, const KnownCode& known, bool hides_xsave,
            const std::function<const u8*(Gva page)>& host_of);
  /// Whether a copy is still one of the page.
  bool is_current(int copy) const;

 private:
  struct Copy {
    const u8* host;
    u8 original[page_size];
  };
  struct Failure {
    const u8* host;
    u32 known;  ///< instructions that were not enough
  };

  bool prove(const Copy& copy, Gva page, const KnownCode& known, std::span<const Suspect> suspects,
             const std::function<const u8*(Gva page)>& host_of, u64& patched);

  u8* copies() const { return static_cast<u8*>(copies_.data()); }
  Copy* originals() const { return static_cast<Copy*>(originals_.data()); }

  int fd_ = -1;
  os::Mapping copies_, originals_;
  os::Mapping flow_;  ///< code_pages.cpp's Flow
  unsigned count_ = 0;
  Failure failures_[256] = {};
};

}  // namespace anykvm::engine::direct
