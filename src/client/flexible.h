// A kernel structure that ends in an array of unknown length (kvm_cpuid2, kvm_msrs …), with room for the array.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>

namespace anykvm {

template <class Header, class Entry>
class Flexible {
 public:
  explicit Flexible(std::size_t count)
      : storage_(std::make_unique<std::max_align_t[]>(
            (sizeof(Header) + count * sizeof(Entry)) / sizeof(std::max_align_t) + 1)),
        count_(count) {}
  explicit Flexible(std::span<const Entry> entries) : Flexible(entries.size()) {
    if (!entries.empty()) std::memcpy(data(), entries.data(), entries.size_bytes());
  }

  Header* operator->() { return header(); }
  Header* header() { return reinterpret_cast<Header*>(storage_.get()); }
  Entry* data() { return reinterpret_cast<Entry*>(reinterpret_cast<std::byte*>(storage_.get()) + sizeof(Header)); }
  /// The first `used` entries.
  std::span<Entry> entries(std::size_t used) { return {data(), used < count_ ? used : count_}; }
  std::span<Entry> entries() { return {data(), count_}; }

 private:
  std::unique_ptr<std::max_align_t[]> storage_;
  std::size_t count_;
};

}  // namespace anykvm
