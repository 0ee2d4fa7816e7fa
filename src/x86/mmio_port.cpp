// The replay of memory-mapped reads and the queue of memory-mapped writes.
#include <cstring>

#include "x86/cpu.h"

namespace anykvm::x86 {

bool MmioPort::take_read(Gpa gpa, void* data, unsigned length) {
  if (read_position_ + length <= read_size_) {
    std::memcpy(data, read_data_ + read_position_, length);
    read_position_ += length;
    return true;
  }
  wanted_ = {.gpa = gpa, .length = u8(length)};
  return false;
}

void MmioPort::reply(const void* data) {
  if (read_size_ + wanted_.length > max_read_bytes) return;
  std::memcpy(read_data_ + read_size_, data, wanted_.length);
  read_size_ += wanted_.length;
}

bool MmioPort::queue_write(Gpa gpa, const void* data, unsigned length) {
  if (write_count_ == max_writes) return false;
  Fragment& fragment = writes_[write_count_++];
  fragment = {.gpa = gpa, .length = u8(length)};
  std::memcpy(fragment.data, data, length);
  return true;
}

}  // namespace anykvm::x86
