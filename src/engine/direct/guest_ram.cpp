#include "engine/direct/guest_ram.h"

#include <algorithm>

namespace anykvm::engine::direct {

void GuestRam::find(x86::Machine& machine) {
  version_ = machine.ram_version();
  part_count_ = file_count_ = 0;
  x86::RamRange ranges[most_parts];
  const unsigned count = machine.ram(ranges, most_parts);
  for (unsigned n = 0; n < count && part_count_ < most_parts; ++n)
    part_count_ += os::find_shared_mappings(ranges[n].host, ranges[n].host + ranges[n].size, parts_ + part_count_,
                                            most_parts - part_count_);
  for (unsigned n = 0; n < part_count_; ++n)
    if (std::find(files_, files_ + file_count_, parts_[n].fd) == files_ + file_count_)
      files_[file_count_++] = parts_[n].fd;
}

const os::SharedMapping* GuestRam::part_of(const u8* host) const {
  for (unsigned n = 0; n < part_count_; ++n)
    if (host >= parts_[n].begin && host < parts_[n].end) return &parts_[n];
  return nullptr;
}

}  // namespace anykvm::engine::direct
