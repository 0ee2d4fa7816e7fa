// Guest RAM as the files that other processes can map.
#pragma once

#include <span>

#include "os/client_ram.h"
#include "os/shared_mappings.h"
#include "x86/machine.h"

namespace anykvm::engine::direct {

class GuestRam {
 public:
  static constexpr unsigned most_parts = 64;

  /// Finds the files of the machine's RAM, as far as other processes may map it. Reads /proc; some milliseconds.
  void find(x86::Machine& machine);
  /// Whether anything is as find() has left it.
  bool is_current(x86::Machine& machine) const {
    return version_ == machine.ram_version() && changes_ == os::client_ram_changes();
  }
  /// The part that has this address; nullptr: none.
  const os::SharedMapping* part_of(const u8* host) const;
  /// The files, each once; at most most_parts.
  std::span<const int> files() const { return {files_, file_count_}; }

 private:
  os::SharedMapping parts_[most_parts];
  int files_[most_parts];
  unsigned part_count_ = 0, file_count_ = 0;
  u64 version_ = ~u64(0), changes_ = 0;
};

}  // namespace anykvm::engine::direct
