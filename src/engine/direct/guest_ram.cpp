#include "engine/direct/guest_ram.h"

#include <algorithm>

namespace anykvm::engine::direct {

void GuestRam::find(x86::Machine& machine) {
  version_ = machine.ram_version();
  changes_ = os::client_ram_changes();
  part_count_ = file_count_ = 0;
  x86::RamRange ranges[most_parts];
  const unsigned count = machine.ram(ranges, most_parts);
  for (unsigned n = 0; n < count && part_count_ < most_parts; ++n)
    part_count_ += os::find_shared_mappings(ranges[n].host, ranges[n].host + ranges[n].size, parts_ + part_count_,
                                            most_parts - part_count_);
  part_count_ = unsigned(
      std::remove_if(parts_, parts_ + part_count_,
                     [](const os::SharedMapping& part) { return !os::may_be_mirrored(part.begin, part.end); }) -
      parts_);
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
