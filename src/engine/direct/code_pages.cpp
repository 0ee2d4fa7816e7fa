#include "engine/direct/code_pages.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "engine/native/decoded.h"
#include "engine/translate/shared_code.h"
#include "os/memory_file.h"

namespace anykvm::engine::direct {

namespace {

constexpr std::size_t copies_bytes = std::size_t(CodePages::most_copies) * page_size;

/// The instructions that follow from those known, in a page of code and what is near it.
class Flow {
 public:
  void begin(const u8* host) {
    std::fill(std::begin(host_), std::end(host_), nullptr);
    host_[nearby] = host;
    std::memset(length_, 0, sizeof length_);
    waiting_count_ = 0;
  }
  /// A page in the neighbourhood, `distance` pages from the center; nullptr: there is none.
  void add(s64 distance, const u8* host) { host_[nearby + distance] = host; }
  const u8* page(s64 distance) const { return host_[nearby + distance]; }

  /// Follows from the instructions that are known of a page.
  void follow(s64 distance, const u64 (&begins)[64]) {
    for (unsigned word = 0; word < std::size(begins); ++word)
      for (u64 bits = begins[word]; bits; bits &= bits - 1)
        follow((nearby + distance) * s64(page_size) + word * 64 + std::countr_zero(bits));
  }

  /// Of the instruction in the center that has the byte; -1: none is known to.
  int begin_of(unsigned offset) const {
    const u8* const lengths = length_ + nearby * page_size;
    for (unsigned distance = 0; distance < 15 && distance <= offset; ++distance)
      if (lengths[offset - distance] > distance) return int(offset - distance);
    return -1;
  }
  bool begins_at(unsigned offset) const { return length_[nearby * page_size + offset]; }

  static constexpr s64 nearby = 24;

 private:
  static constexpr s64 pages = 2 * nearby + 1;

  void follow(s64 begin) {
    push(begin);
    while (waiting_count_) {
      for (s64 at = waiting_[--waiting_count_]; is_new(at);) {
        Decoded d;
        const u8* const page = host_[at / s64(page_size)];
        const unsigned offset = unsigned(at % s64(page_size)), room = std::min<unsigned>(page_size - offset, 15);
        if (!ZYAN_SUCCESS(decode_instruction(page + offset, room, 64, d))) break;
        const ZydisDecodedInstruction& i = d.instruction;
        length_[at] = i.length;
        at += i.length;
        if (i.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE && d.is_immediate(0)) push(at + d.operands[0].imm.value.s);
        if (i.meta.category == ZYDIS_CATEGORY_UNCOND_BR || i.meta.category == ZYDIS_CATEGORY_RET ||
            d.mnemonic() == ZYDIS_MNEMONIC_UD2 || d.mnemonic() == ZYDIS_MNEMONIC_HLT ||
            d.mnemonic() == ZYDIS_MNEMONIC_INT3)
          break;
      }
    }
  }

  bool is_new(s64 at) const {
    return at >= 0 && at < pages * s64(page_size) && host_[at / s64(page_size)] && !length_[at];
  }
  void push(s64 at) {
    if (is_new(at) && waiting_count_ < std::size(waiting_)) waiting_[waiting_count_++] = u32(at);
  }

  const u8* host_[pages];
  u8 length_[pages * page_size];  ///< of the instruction that begins there; 0: none is known to
  u32 waiting_[16384];
  unsigned waiting_count_;
};

/// What has been proven of pages, by their contents: for all vCPUs of this process. Nothing is ever taken out.
class Proofs {
 public:
  bool find(const u8* page, bool hides_xsave, u64& patched) const {
    const unsigned count = count_.load(std::memory_order_acquire);
    for (unsigned n = 0; n < count; ++n) {
      if (proofs_[n].hides_xsave != hides_xsave || std::memcmp(proofs_[n].page, page, page_size)) continue;
      patched = proofs_[n].patched;
      return true;
    }
    return false;
  }
  void add(const u8* page, bool hides_xsave, u64 patched) {
    const std::scoped_lock lock(adding_);
    if (!proofs_) {
      void* const memory = os::Mapping::lazy(most * sizeof(Proof)).release();
      if (!memory) return;
      proofs_ = static_cast<Proof*>(memory);
    }
    const unsigned n = count_.load(std::memory_order_relaxed);
    if (n == most) return;
    std::memcpy(proofs_[n].page, page, page_size);
    proofs_[n].hides_xsave = hides_xsave;
    proofs_[n].patched = patched;
    count_.store(n + 1, std::memory_order_release);
  }

 private:
  static constexpr unsigned most = 2048;
  struct Proof {
    u8 page[page_size];
    u64 patched;
    bool hides_xsave;
  };
  std::mutex adding_;
  Proof* proofs_ = nullptr;
  std::atomic<unsigned> count_{0};
};

constinit Proofs proofs;
static_assert(std::is_trivially_destructible_v<Proofs>);  // vCPUs may outlive static objects

}  // namespace

CodePages::~CodePages() {
  if (fd_ >= 0) os::close_file(fd_);
}

bool CodePages::begin() {
  count_ = 0;
  std::memset(failures_, 0, sizeof failures_);
  if (fd_ < 0) fd_ = os::create_memory_file("anykvm code", copies_bytes);
  if (fd_ >= 0 && !copies()) copies_ = os::Mapping(fd_, copies_bytes);
  if (!originals()) originals_ = os::Mapping::lazy(most_copies * sizeof(Copy));
  if (!flow_.data()) flow_ = os::Mapping::lazy(sizeof(Flow));
  return copies() && originals() && flow_.data();
}

bool CodePages::is_current(int copy) const {
  const Copy& known = originals()[copy];
  return translate::SharedCode::is_watched(u64(known.host)) && !std::memcmp(known.host, known.original, page_size);
}

int CodePages::judge(const u8* host, Gva page, const KnownCode& known, bool hides_xsave,
                     const std::function<const u8*(Gva page)>& host_of) {
  if (!find_suspects(host, hides_xsave, nullptr, 0)) return as_it_is;
  for (unsigned n = 0; n < count_; ++n)
    if (originals()[n].host == host && is_current(int(n))) return int(n);
  if (count_ == most_copies) return unwanted;
  // What is proven is so of this copy, whoever writes to the page meanwhile.
  Copy& copy = originals()[count_];
  copy.host = host;
  std::memcpy(copy.original, host, page_size);
  constexpr unsigned most_suspects = 64;
  Suspect suspects[most_suspects];
  const unsigned count = find_suspects(copy.original, hides_xsave, suspects, most_suspects);
  if (count > most_suspects) return unwanted;
  u64 patched = 0;
  if (!translate::SharedCode::is_watched(u64(host)) || !proofs.find(copy.original, hides_xsave, patched)) {
    if (!prove(copy, page, known, {suspects, count}, host_of, patched)) return unwanted;
    proofs.add(copy.original, hides_xsave, patched);
  }
  u8* const runs = copies() + count_ * page_size;
  std::memcpy(runs, copy.original, page_size);
  for (; patched; patched &= patched - 1) {
    const unsigned offset = suspects[std::countr_zero(patched)].offset;
    runs[offset] = 0x0f, runs[offset + 1] = 0x0b;
  }
  return int(count_++);
}

/// patched: of which suspects it is certain that they are what they look like, one bit each; of the others it is
/// certain that they are not. false: it is not certain of all.
bool CodePages::prove(const Copy& copy, Gva page, const KnownCode& known, std::span<const Suspect> suspects,
                      const std::function<const u8*(Gva page)>& host_of, u64& patched) {
  u64 begins[64] = {};
  if (!known.instructions(known.arg, copy.host, begins)) return false;
  u32 known_count = 0;
  for (u64 word : begins) known_count += u32(std::popcount(word));
  // What did not do will not do before more is known.
  Failure& failure = failures_[u64(copy.host) / page_size % std::size(failures_)];
  if (failure.host == copy.host && known_count < failure.known + failure.known / 4) return false;
  failure = {copy.host, known_count};

  Flow& flow = *static_cast<Flow*>(flow_.data());
  flow.begin(copy.original);
  flow.follow(0, begins);
  const auto proven = [&] {
    return std::all_of(suspects.begin(), suspects.end(), [&](const Suspect& suspect) {
      const bool at_begin = suspect.at_end && suspect.offset == 0;
      return at_begin ? flow.begins_at(0) : flow.begin_of(suspect.offset) >= 0;
    });
  };
  if (!proven()) {
    // What leads there from near.
    for (s64 distance = -Flow::nearby; distance <= Flow::nearby; ++distance)
      if (distance) flow.add(distance, host_of(page + u64(distance) * page_size));
    for (s64 distance = -Flow::nearby; distance <= Flow::nearby && !proven(); ++distance) {
      const u8* const near = distance ? flow.page(distance) : nullptr;
      u64 others[64] = {};
      if (near && known.instructions(known.arg, near, others)) flow.follow(distance, others);
    }
  }
  if (!proven()) return false;

  patched = 0;
  for (unsigned n = 0; n < suspects.size(); ++n) {
    const unsigned offset = suspects[n].offset;
    if (suspects[n].at_end && offset == 0) continue;
    const unsigned begin = unsigned(flow.begin_of(offset));
    // Prefixes may come before; whatever else does has it as a part of itself.
    Decoded d;
    const unsigned room = std::min<unsigned>(page_size - begin, 15);
    if (suspects[n].at_end || !ZYAN_SUCCESS(decode_instruction(copy.original + begin, room, 64, d))) return false;
    if (d.instruction.raw.prefix_count == offset - begin) patched |= 1ull << n;
  }
  return true;
}

}  // namespace anykvm::engine::direct
